"""The engine's options. Frozen: nobody writes them after construction."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from mini_infer.exceptions import ConfigError
from mini_infer.sampling import MAX_SEED

DTYPES = ("float16", "bfloat16", "float32")
DEFAULT_DTYPE = "float16"
DEVICES = ("auto", "cpu", "cuda")
LOAD_FORMATS = ("auto", "dummy")
PREEMPTION_MODES = ("auto", "swap", "recompute")
BUCKET_POLICIES = ("cost", "round_up")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Options of an `LLMEngine`. An unknown keyword is a TypeError, a value out of bounds a ConfigError.

    Attributes:
        model: Hugging Face model name, or a local folder with ``config.json`` and ``*.safetensors``; a path will do.
        tokenizer: Name or folder of the tokenizer. Default: the model's.
        max_num_seqs: Most sequences that decode at once; also the largest decode bucket.
        max_model_len: Most tokens of one sequence, prompt and output together. Default: what the model was made for.
        block_size: Tokens of one KV cache block.
        gpu_memory_utilization: Share of the GPU's memory that this engine may use, everything counted: weights,
            graphs, workspace and KV cache. Others on the GPU have theirs beside it: two engines fit with 0.45 each.
            On a CPU: the share of a quarter of the *free* memory that the KV cache may grow to.
        dtype: Type of weights, activations and KV cache. A CPU always computes in float32, and says so.
        trust_remote_code: Let the tokenizer run code from the model's repository. The model itself never does.
        device: "auto" takes the GPU if there is one.
        seed: Seed of every request that brings none of its own, and of dummy weights.
        load_format: "auto" reads safetensors; "dummy" makes random weights of the model's shape.
        num_gpu_blocks: KV cache blocks on the device. Default: what the memory leaves.
        swap_space_gib: CPU memory for preempted sequences, in GiB. 0 turns swapping off.
        num_cpu_blocks: The same in blocks; wins over ``swap_space_gib``.
        preemption: What happens to a sequence that loses its blocks: "swap" (falls back to recompute when the CPU
            blocks are used up), "recompute", or "auto": whichever was measured to cost less.
        enable_prefix_caching: Keep full blocks of finished prompts for later prompts that begin alike.
        max_prefill_tokens: Most prompt tokens of one step; the largest prefill bucket. It bounds how long sequences
            that decode wait for a token while prompts are computed. Default: 8192 on a GPU, 512 on a CPU.
        max_prefill_seqs: Most prompts packed into one prefill step.
        prefill_share: While sequences decode, prefill may take at most this share of the time, by measured cost, but
            for one decode step after every prefill step, which is always run. More of it is throughput and time to
            the first token, less of it is time between tokens; the longest time between two tokens is that of one
            prefill step, which ``max_prefill_tokens`` bounds, and a decode step. 1 lets waiting prompts go first.
        decode_buckets: Batch sizes to build steps for. ``max_num_seqs`` is always added. Default: a dense table.
        prefill_buckets: Token counts to build steps for. ``max_prefill_tokens`` is always added. Default: a dense
            table.
        bucket_policy: How sizes are mapped to buckets: "cost" takes the cheapest one that holds a batch, and cuts
            prefill chunks where that costs less than padding; "round_up" pads everything up to the next larger one.
        capture_graphs: Capture the steps as CUDA graphs. Off: every step runs eagerly.
        steps_in_flight: Steps launched before the first one's tokens are read; 1 waits for every step. Default: 2 on a
            GPU, 1 on a CPU.
        measure_costs: Time the buckets at start. Off: costs are taken as proportional to size.
        measure_steps: Time every step as it runs, for `EngineStats.step_times`. For benchmarks: each step is kept.
        progress: Show progress bars for long work when the output is a terminal.

    Raises:
        ConfigError: a value cannot work; the message names the option, the value and the bound.
    """

    model: str
    tokenizer: str | None = None
    max_num_seqs: int = 256
    max_model_len: int | None = None
    block_size: int = 16
    gpu_memory_utilization: float = 0.9
    dtype: str = DEFAULT_DTYPE
    trust_remote_code: bool = False
    device: str = "auto"
    seed: int = 0
    load_format: str = "auto"
    num_gpu_blocks: int | None = None
    swap_space_gib: float = 1.0
    num_cpu_blocks: int | None = None
    preemption: str = "auto"
    enable_prefix_caching: bool = True
    max_prefill_tokens: int | None = None
    max_prefill_seqs: int = 64
    prefill_share: float = 0.97
    decode_buckets: Sequence[int] | None = None
    prefill_buckets: Sequence[int] | None = None
    bucket_policy: str = "cost"
    capture_graphs: bool = True
    steps_in_flight: int | None = None
    measure_costs: bool = True
    measure_steps: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("model", "tokenizer"):
            if isinstance(getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(getattr(self, name)))
        _check_text("model", self.model)
        if self.tokenizer is not None:
            _check_text("tokenizer", self.tokenizer)
        for name in ("max_num_seqs", "max_prefill_seqs"):
            _check_int(name, getattr(self, name), low=1)
        _check_int("seed", self.seed, low=0, high=MAX_SEED)
        for name in ("max_model_len", "num_gpu_blocks", "max_prefill_tokens", "steps_in_flight"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), low=1)
        if self.num_cpu_blocks is not None:
            _check_int("num_cpu_blocks", self.num_cpu_blocks, low=0)
        _check_int("block_size", self.block_size, low=1)
        if self.block_size & (self.block_size - 1) or self.block_size > 256:
            raise ConfigError(f"block_size must be a power of two of at most 256, got {self.block_size}")
        _check_fraction("gpu_memory_utilization", self.gpu_memory_utilization)
        _check_fraction("prefill_share", self.prefill_share)
        if not _is_number(self.swap_space_gib) or not 0 <= self.swap_space_gib < math.inf:
            raise ConfigError(f"swap_space_gib must be a finite number of at least 0, got {self.swap_space_gib!r}")
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("device", self.device, DEVICES)
        _check_choice("load_format", self.load_format, LOAD_FORMATS)
        _check_choice("preemption", self.preemption, PREEMPTION_MODES)
        _check_choice("bucket_policy", self.bucket_policy, BUCKET_POLICIES)
        for name in (
            "trust_remote_code",
            "enable_prefix_caching",
            "capture_graphs",
            "measure_costs",
            "measure_steps",
            "progress",
        ):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("decode_buckets", "prefill_buckets"):
            sizes = getattr(self, name)
            if sizes is not None:
                object.__setattr__(self, name, _bucket_sizes(name, sizes))


def _bucket_sizes(name: str, sizes: object) -> tuple[int, ...]:
    if isinstance(sizes, str) or not isinstance(sizes, Sequence) or not sizes:
        raise ConfigError(f"{name} must be a non-empty list of sizes, got {sizes!r}")
    for size in sizes:
        _check_int(name, size, low=1)
    return tuple(sorted(set(sizes)))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name} must be a non-empty string, got {value!r}")


def _check_int(name: str, value: object, *, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be an integer, got {value!r}")
    if value < low:
        raise ConfigError(f"{name} must be at least {low}, got {value}")
    if high is not None and value > high:
        raise ConfigError(f"{name} must be at most {high}, got {value}")


def _check_fraction(name: str, value: float) -> None:
    if not _is_number(value) or not 0 < value <= 1:
        raise ConfigError(f"{name} must be in (0, 1], got {value!r}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
