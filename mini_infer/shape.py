"""What decides the steps that an engine has: model, options and device together, apart from the weights."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

import mini_infer
from mini_infer.buckets import BucketTable, decode_bucket_sizes, prefill_bucket_sizes
from mini_infer.config import DEFAULT_DTYPE, EngineConfig
from mini_infer.exceptions import ConfigError
from mini_infer.graphs.spec import ModelSpec
from mini_infer.kernels.linear_plan import LinearPlan
from mini_infer.loader import find_model, read_model_files
from mini_infer.machine_plan import PlanKey

logger = logging.getLogger(__name__)

GPU_PREFILL_TOKENS = 8192
CPU_PREFILL_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides the steps that an engine has, apart from the weights.

    Attributes:
        config: The engine's options.
        spec: The model.
        device: Where it runs.
        dtype: Type of weights, activations and KV cache.
        max_model_len: Most tokens of one sequence.
    """

    config: EngineConfig
    spec: ModelSpec
    device: torch.device
    dtype: torch.dtype
    max_model_len: int

    @classmethod
    def of(cls, config: EngineConfig, spec: ModelSpec | None = None) -> Shape:
        """The shape of a configuration.

        Args:
            config: The engine's options.
            spec: The model's facts. Default: read from its config.json; no weights are fetched.

        Raises:
            ModelNotFoundError, UnsupportedModelError: there is no such model, or it cannot be run.
            ConfigError: options that do not fit the model or the machine.
        """
        device = choose_device(config.device)  # first: without a GPU, a model need not be fetched to say so
        if spec is None:
            spec = read_model_files(find_model(config.model, weights=False)).spec
        dtype = choose_dtype(config.dtype, device)
        return cls(config, spec, device, dtype, choose_max_model_len(config.max_model_len, spec))

    @property
    def max_blocks(self) -> int:
        """Blocks of the longest sequence."""
        return -(-self.max_model_len // self.config.block_size)

    @property
    def captures(self) -> bool:
        """True if the steps are captured as CUDA graphs."""
        return self.device.type == "cuda" and self.config.capture_graphs

    @property
    def decode_sizes(self) -> tuple[int, ...]:
        """Decode buckets, as the user or the default has them."""
        config = self.config
        return BucketTable(config.decode_buckets or decode_bucket_sizes(config.max_num_seqs), config.max_num_seqs).sizes

    @property
    def prefill_sizes(self) -> tuple[int, ...]:
        """Prefill buckets, as the user or the default has them."""
        largest = self.max_prefill_tokens
        return BucketTable(self.config.prefill_buckets or prefill_bucket_sizes(largest), largest).sizes

    @property
    def max_prefill_tokens(self) -> int:
        """Most tokens of a prefill step."""
        if self.config.max_prefill_tokens is not None:
            return self.config.max_prefill_tokens
        return GPU_PREFILL_TOKENS if self.device.type == "cuda" else CPU_PREFILL_TOKENS

    def plan_key(self) -> PlanKey:
        """Everything that measurements on this machine depend on."""
        config = self.config
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {
            "spec": repr(self.spec),
            "dtype": str(self.dtype),
            "device": gpu,
            "linear_plan": hashlib.sha256(LinearPlan.for_gpu(gpu).to_json().encode()).hexdigest(),
            "cuda": str(torch.version.cuda),
            "torch": torch.__version__,
            "mini_infer": mini_infer.__version__,
            "code": code_digest(),
            "block_size": str(config.block_size),
            "max_model_len": str(self.max_model_len),
            "max_num_seqs": str(config.max_num_seqs),
            "max_prefill_seqs": str(config.max_prefill_seqs),
            "decode_sizes": repr(self.decode_sizes),
            "prefill_sizes": repr(self.prefill_sizes),
            "listed": f"decode {config.decode_buckets is not None}, prefill {config.prefill_buckets is not None}",
            "captures": str(self.captures),
        }


def code_digest() -> str:
    """A digest of what a step is made of: the kernels, and the functions that put them together."""
    digest = hashlib.sha256()
    for package in ("kernels", "graphs"):
        for path in sorted((Path(mini_infer.__file__).parent / package).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def choose_device(name: str) -> torch.device:
    """The device to run on.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda' but PyTorch sees no GPU; use device='cpu', or install a CUDA build of PyTorch")
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type to compute in: what was asked for, but float32 on a CPU."""
    dtype: torch.dtype = torch.float32 if device.type == "cpu" else getattr(torch, name)
    return dtype


def choose_max_model_len(asked: int | None, spec: ModelSpec) -> int:
    """The longest sequence.

    Raises:
        ConfigError: longer than the model was made for, or too short for a prompt token and a generated one.
    """
    if asked is None:
        return spec.max_position_embeddings
    if not 2 <= asked <= spec.max_position_embeddings:
        raise ConfigError(
            f"max_model_len must be between 2 and the model's {spec.max_position_embeddings}, got {asked}"
        )
    return asked


def log_dtype(shape: Shape) -> None:
    """Say where the type is another than was asked for, or than the model was trained in."""
    asked = shape.config.dtype
    if shape.device.type == "cpu" and asked != "float32":
        level = logging.INFO if asked == DEFAULT_DTYPE else logging.WARNING  # the default was not asked for
        logger.log(level, "dtype=%r: on a CPU the engine computes in float32 instead", asked)
    elif shape.dtype == torch.float16 and shape.spec.dtype == "bfloat16":
        logger.warning(
            "dtype='float16', but the model was trained in bfloat16, whose range is wider: large activations may "
            "overflow. dtype='bfloat16' is safer"
        )
