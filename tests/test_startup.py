"""From a configuration to an engine: device, type, length, memory, and what is said about each."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mini_infer import EngineConfig, LLMEngine
from mini_infer.buckets import BucketTable
from mini_infer.builder import CPU_CONTEXT_ROWS, GRAPH_MARGIN, RunnerBuilder
from mini_infer.device_memory import estimate_plan
from mini_infer.exceptions import ConfigError, MiniInferError, ModelNotFoundError, OutOfMemoryError
from mini_infer.graphs.spec import ModelSpec
from mini_infer.loader import read_model_files
from mini_infer.machine_plan import MachinePlan
from mini_infer.memory.plan import MemoryPlan
from mini_infer.shape import Shape, choose_dtype, log_dtype
from mini_infer.startup import assemble, check_coverage, keep, revised, with_costs, with_true_graphs
from mini_infer.step import CaptureRecord, StepKind
from tests.tiny_engines import make_tiny_folder, tiny_config
from tests.tiny_tokenizers import save_tiny_tokenizer

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def spec(folder: Path) -> ModelSpec:
    return read_model_files(folder).spec


# Type


def shape_with(folder: Path, dtype: str, device: torch.device, trained: str | None) -> Shape:
    spec = replace(read_model_files(folder).spec, dtype=trained)
    return Shape(tiny_config(folder, dtype=dtype), spec, device, choose_dtype(dtype, device), 64)


@pytest.mark.parametrize(("name", "level"), [("float16", "INFO"), ("bfloat16", "WARNING")])
def test_a_cpu_says_that_it_takes_float32(
    folder: Path, name: str, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The default was not asked for: no warning then."""
    with caplog.at_level(logging.INFO):
        log_dtype(shape_with(folder, name, CPU, "bfloat16"))
    assert [record.levelname for record in caplog.records] == [level]
    assert name in caplog.text
    assert "float32" in caplog.text


def test_no_word_where_there_is_nothing_to_say(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What was asked for is what is used: silence."""
    with caplog.at_level(logging.DEBUG):
        for dtype, device, trained in (
            ("float32", CPU, "bfloat16"),
            ("bfloat16", GPU, "bfloat16"),
            ("bfloat16", GPU, "float16"),
            ("float16", GPU, "float16"),
            ("float16", GPU, None),
            ("float32", GPU, "bfloat16"),
        ):
            log_dtype(shape_with(folder, dtype, device, trained))
    assert not caplog.records


def test_float16_for_a_bfloat16_model(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The contract's default meets most of today's models: it is used as asked, and the risk is named."""
    with caplog.at_level(logging.WARNING):
        log_dtype(shape_with(folder, "float16", GPU, "bfloat16"))
    assert "trained in bfloat16" in caplog.text
    assert "overflow" in caplog.text


def test_the_type_is_logged_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With the contract's default dtype on a CPU, the user reads what is used instead; the KV cache is float32."""
    config = EngineConfig(model=str(folder), device="cpu", max_model_len=64, measure_costs=False)
    with caplog.at_level(logging.INFO):
        parts = assemble(config)
    assert caplog.text.count("computes in float32 instead") == 1
    assert parts.shape.dtype is torch.float32
    assert parts.runner._kv.blocks.dtype is torch.float32
    caplog.clear()
    with caplog.at_level(logging.INFO):
        estimate_plan(config)
    assert caplog.text.count("computes in float32 instead") == 1


# Length


@pytest.mark.parametrize("block_size", [1, 16, 256])
def test_the_shortest_sequence(folder: Path, block_size: int) -> None:
    """max_model_len=2: one token in, one out, whatever the block size."""
    with LLMEngine(tiny_config(folder, max_model_len=2, block_size=block_size)) as engine:
        output = engine.generate([[5]], max_tokens=9)[0]
    assert len(output.token_ids) == 1
    assert output.finish_reason in ("length", "stop")


# Memory


@pytest.mark.parametrize("phase", ["load_params", "RunnerBuilder.build"])
def test_a_gpu_that_is_full_under_way(folder: Path, monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    """PyTorch's own error while weights or KV cache are allocated becomes the documented one."""

    def fail(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(f"mini_infer.startup.{phase}", fail)
    with pytest.raises(OutOfMemoryError, match=r"20\.00 GiB") as raised:
        LLMEngine(tiny_config(folder))
    assert "gpu_memory_utilization" in str(raised.value)


def memory_plan(graphs: int) -> MemoryPlan:
    return MemoryPlan("a GPU", 2000, 1800, 400, 100, graphs, 10, 99, 0, 16)


def test_the_true_size_of_the_graphs(caplog: pytest.LogCaptureFixture) -> None:
    """What they turned out to take is what is reported; the reserve has the difference. Too little is a warning."""
    with caplog.at_level(logging.WARNING):
        assert with_true_graphs(memory_plan(200), 150) == memory_plan(150)
    assert not caplog.records
    assert memory_plan(150).reserve == memory_plan(200).reserve + 50
    with caplog.at_level(logging.WARNING):
        assert with_true_graphs(memory_plan(200 << 20), 712 << 20).graphs == 712 << 20
    assert "0.500 GiB more than was set aside" in caplog.text


@pytest.mark.parametrize(
    ("stored", "measured", "expected"),
    [(100, 100, 100), (100, 101, 101), (100, 99, 100), (GRAPH_MARGIN, 0, GRAPH_MARGIN), (17 << 30, 1 << 30, 1 << 30)],
)
def test_what_the_next_start_sets_aside(stored: int, measured: int, expected: int) -> None:
    """More at once; less if it is much less: then another process was measured as well, now or then."""
    assert revised(stored, measured) == expected


def test_what_cannot_be_kept(
    folder: Path, spec: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A start that has measured everything is not lost with a folder that cannot be written."""
    (tmp_path / "a file").touch()
    monkeypatch.setenv("MINI_INFER_HOME", str(tmp_path / "a file"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    plan = MachinePlan(0, 0, (1,), (1,), {1: 1.0}, {1: 1.0}, None, 0.0, 9)
    keep(Shape(tiny_config(folder), spec, GPU, torch.float16, 64), plan)
    assert "is not kept" in caplog.text and "MINI_INFER_HOME" in caplog.text


# Graphs


class FakeGraphs:
    """Stands in for a `GraphSet` where there is no GPU."""

    def __init__(self, decode_sizes: Sequence[int], prefill_sizes: Sequence[int], missing: set[int]) -> None:
        self.bytes = 0
        self._sizes = {StepKind.DECODE: set(decode_sizes) - missing, StepKind.PREFILL: set(prefill_sizes)}
        self.ledger = [
            CaptureRecord(kind, size, 0.1, 5) for kind, sizes in self._sizes.items() for size in sorted(sizes)
        ]

    def sizes(self, kind: StepKind) -> frozenset[int]:
        return frozenset(self._sizes[kind])

    def keep(self, kind: StepKind, sizes: Sequence[int]) -> list[CaptureRecord]:
        dropped = [record for record in self.ledger if record.kind is kind and record.bucket not in sizes]
        self.ledger = [record for record in self.ledger if record not in dropped]
        self._sizes[kind] &= set(sizes)
        return dropped


def capture_on_a_cpu(monkeypatch: pytest.MonkeyPatch, missing: set[int]) -> None:
    """Let the engine believe that steps are captured, all but the decode buckets that are to be missing."""
    monkeypatch.setattr(Shape, "captures", True)
    monkeypatch.setattr(
        RunnerBuilder, "capture", lambda self, runner, decode, prefill: FakeGraphs(decode, prefill, missing)
    )


def test_no_start_without_a_graph_for_every_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket of the scheduler's that was not captured is found at the start, not by the first batch that needs it."""
    capture_on_a_cpu(monkeypatch, missing={3, 4})
    with pytest.raises(ConfigError, match=r"no captured graph for decode steps of 3-4, .* \[3, 4\]; .* \[1, 2, 5\]"):
        LLMEngine(tiny_config(folder, max_num_seqs=5))
    capture_on_a_cpu(monkeypatch, missing=set())
    assert len(assemble(tiny_config(folder, max_num_seqs=5)).graphs) > 5


def test_coverage_is_by_the_cheapest_bucket(folder: Path) -> None:
    """What counts is where the scheduler sends a batch, which need not be the smallest bucket that holds it."""
    table = BucketTable([2, 4, 8, 16], 16, {2: 1.0, 4: 3.0, 8: 2.0, 16: 4.0})
    check_coverage(StepKind.DECODE, table, [2, 8, 16])
    with pytest.raises(ConfigError, match=r"prefill steps of 1-2, 9-16, which run in buckets \[2, 16\]"):
        check_coverage(StepKind.PREFILL, table, [4, 8])


def test_the_ledger_has_what_steps_cost() -> None:
    """As measured after the capture, by kind and bucket; None where nothing was measured."""
    ledger = [CaptureRecord(kind, bucket, 0.1, 5) for kind in (StepKind.DECODE, StepKind.PREFILL) for bucket in (1, 2)]
    plan = MachinePlan(0, 0, (1, 2), (1, 2), {1: 0.5, 2: 0.75}, {2: 3.0}, None, 0.0, 10_000)
    assert [record.step_ms for record in with_costs(ledger, plan)] == [0.5, 0.75, None, 3.0]
    assert with_costs(ledger, None) == ledger


def test_default_buckets_are_pruned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of captured steps, those of buckets that save nothing are dropped: from the graphs, the table and the ledger.

    Small batches keep their own.
    """
    capture_on_a_cpu(monkeypatch, missing=set())
    monkeypatch.setattr(
        "mini_infer.runner.ModelRunner.measure_decode",
        lambda self, buckets, limit_s: {size: 1.0 if size <= 24 else 2.0 + size / 1000 for size in buckets},
    )
    monkeypatch.setattr(
        "mini_infer.runner.ModelRunner.measure_prefill",
        lambda self, buckets, max_chunks, limit_s: {size: float(size) for size in buckets},
    )
    for listed, expected in ((None, (*range(1, 17), 24, 40)), ([1, 2, 3, 4], (1, 2, 3, 4, 40))):
        parts = assemble(
            tiny_config(folder, max_num_seqs=40, max_prefill_tokens=48, measure_costs=True, decode_buckets=listed)
        )
        table = parts.scheduler.decode_buckets
        assert table.sizes == expected
        assert listed or table.exact_cost(32) == 2.032, "what was dropped still says what padding costs"
        assert parts.scheduler.prefill_buckets.sizes == (16, 32, 48)
        decode = [record for record in parts.graphs if record.kind is StepKind.DECODE]
        assert tuple(record.bucket for record in decode) == expected
        assert [record.step_ms for record in decode] == [table.costs[record.bucket] for record in decode]


@pytest.mark.parametrize(
    ("swap_ms", "cpu_blocks", "measured", "gpu_blocks", "covered"),
    [
        (None, 0, 9, 9, True),
        (None, 5, 9, 9, False),  # the earlier start had nothing to swap
        (0.5, 5, 9, 9, True),
        (0.5, 0, 9, 10, False),  # and fewer blocks, over which contexts and prompts were shorter
        (0.5, 0, 10, 9, True),
        (0.5, 0, 10_000, 1_000_000, True),  # more than measuring makes use of
    ],
)
def test_what_an_earlier_start_measured(
    folder: Path, swap_ms: float | None, cpu_blocks: int, measured: int, gpu_blocks: int, covered: bool
) -> None:
    """It counts if it says all that this start must know."""
    params: Any = None
    builder = RunnerBuilder(Shape.of(tiny_config(folder)), params)
    stored = MachinePlan(0, 0, (1,), (1,), {1: 1.0}, {1: 1.0}, swap_ms, 0.0, measured)
    plan = MemoryPlan("a GPU", 0, 0, 0, 0, 0, 1, gpu_blocks, cpu_blocks, block_size=16)
    assert builder.covers(stored, plan) == covered


def test_what_is_measured_reaches_the_scheduler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost of context by the largest bucket that is not too large; without measuring there is none."""
    asked: list[tuple[int, int]] = []

    def measure_context(self: object, bucket: int, *, max_rows: int, num_tokens: int) -> float:
        asked.append((bucket, max_rows))
        return 0.25

    monkeypatch.setattr("mini_infer.runner.ModelRunner.measure_context", measure_context)
    for listed in (None, [40], [6, 9], [1]):
        parts = assemble(tiny_config(folder, max_num_seqs=40, measure_costs=True, decode_buckets=listed))
        assert parts.scheduler.context_ms_per_token == 0.25
    assert asked == [(2, CPU_CONTEXT_ROWS), (40, CPU_CONTEXT_ROWS), (6, CPU_CONTEXT_ROWS), (1, 1)]
    assert assemble(tiny_config(folder)).scheduler.context_ms_per_token == 0.0
    assert len(asked) == 4


def test_a_start_measures_context(folder: Path) -> None:
    """On a CPU, too: something between nothing and a millisecond a token."""
    parts = assemble(tiny_config(folder, measure_costs=True))
    assert 0.0 <= parts.scheduler.context_ms_per_token < 1.0


# Tokenizer and model


def test_a_bare_shape_starts_without_transformers(folder: Path, tmp_path: Path) -> None:
    """Importing that library takes longer than all the rest of such a start."""
    shutil.copy(folder / "config.json", tmp_path)
    code = (
        "import sys\n"
        "from mini_infer import EngineConfig, LLMEngine\n"
        "config = EngineConfig(model=sys.argv[1], device='cpu', dtype='float32', load_format='dummy', max_num_seqs=2,\n"
        "                      max_model_len=64, measure_costs=False, progress=False)\n"
        "with LLMEngine(config) as engine: assert engine.generate([[5, 6]], max_tokens=2)[0].token_ids\n"
        "print({'transformers', 'tokenizers', 'huggingface_hub', 'gguf'} & {*sys.modules})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parents[1],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "set()"


def test_a_tokenizer_that_is_not_there_costs_no_weights(folder: Path, tmp_path: Path) -> None:
    """It is looked for before the weights are read."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelNotFoundError, match="no tokenizer"):
        LLMEngine(tiny_config(tmp_path))


def test_a_broken_tokenizer(folder: Path, tmp_path: Path) -> None:
    """Read beside the weights, its error is raised all the same; dummy weights do not excuse it."""
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    for load_format in ("auto", "dummy"):
        with pytest.raises(ModelNotFoundError, match="cannot be read"):
            LLMEngine(tiny_config(tmp_path / "model", load_format=load_format))


def test_a_tokenizer_of_its_own(folder: Path, tmp_path: Path) -> None:
    """The model's folder needs none when another is named."""
    (tmp_path / "model").mkdir()
    (tmp_path / "tokenizer").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, tmp_path / "model")
    with pytest.raises(ModelNotFoundError, match=r"no tokenizer.*name another in `tokenizer`"):
        LLMEngine(tiny_config(tmp_path / "model"))
    save_tiny_tokenizer(tmp_path / "tokenizer")  # and nothing else
    with LLMEngine(tiny_config(tmp_path / "model", tokenizer=str(tmp_path / "tokenizer"))) as engine:
        assert engine.generate("hello", max_tokens=2)[0].prompt_token_ids


def test_a_tokenizer_that_was_named_is_never_done_without(folder: Path, tmp_path: Path) -> None:
    """Dummy weights need no tokenizer, but one that the user named and that is not there is an error."""
    for tokenizer in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ModelNotFoundError, match=str(tokenizer)):
            LLMEngine(tiny_config(folder, load_format="dummy", tokenizer=str(tokenizer)))


def test_dummy_weights_of_a_bare_shape(folder: Path, tmp_path: Path) -> None:
    """A config.json is enough; the engine then takes token ids, and seeds decide the weights."""
    shutil.copy(folder / "config.json", tmp_path)
    outputs = []
    for seed in (0, 0, 1):
        with LLMEngine(tiny_config(tmp_path, load_format="dummy", seed=seed)) as engine:
            assert engine.tokenizer is None
            assert not engine.has_chat_template
            output = engine.generate([[5, 6, 7]], max_tokens=20, temperature=0.0)[0]
            assert output.text == ""
            outputs.append((output.token_ids, round(output.cumulative_logprob, 4)))
    assert outputs[0] == outputs[1]
    assert outputs[0] != outputs[2]


# The report


def test_report(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every phase in order, adding up to the total; logged together with the memory plan."""
    with caplog.at_level(logging.INFO):
        parts = assemble(tiny_config(folder, measure_costs=True))
    assert list(parts.report.phases) == [
        "config", "waiting", "weights", "tokenizer", "memory", "kv cache", "capture", "costs", "scheduler",
    ]  # fmt: skip
    assert sum(parts.report.phases.values()) == pytest.approx(parts.report.total)
    assert parts.report.describe() in caplog.text
    assert parts.plan.describe() in caplog.text
    assert parts.graphs == ()
    assert not parts.plan_loaded


def test_costs_are_measured_or_assumed(folder: Path) -> None:
    """Measured: a positive time for each bucket. Not measured: proportional, and said so."""
    parts = assemble(tiny_config(folder, measure_costs=True))
    for table in (parts.scheduler.decode_buckets, parts.scheduler.prefill_buckets):
        assert table.measured
        assert min(table.costs.values()) > 0
    parts = assemble(tiny_config(folder))
    assert not parts.scheduler.decode_buckets.measured
    assert parts.scheduler.decode_buckets.costs == pytest.approx({1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0})


def test_measuring_leaves_no_trace(folder: Path) -> None:
    """Measured steps run on padding: tokens afterwards are those of an engine that measured nothing."""
    outputs = []
    for measure in (False, True):
        with LLMEngine(tiny_config(folder, measure_costs=measure, num_cpu_blocks=4)) as engine:
            outputs.append(engine.generate([[9, 8, 7], [3]], max_tokens=30, temperature=0.0))
            assert engine.stats().costs_measured is measure
            assert engine.stats().decode_steps <= 30
    assert [o.token_ids for o in outputs[0]] == [o.token_ids for o in outputs[1]]


@pytest.mark.parametrize("sizes", [None, [1], [2, 4], [100]])
def test_buckets_are_total(folder: Path, sizes: list[int] | None) -> None:
    """Whatever sizes the user names, every batch up to max_num_seqs and every chunk has a bucket."""
    parts = assemble(
        tiny_config(folder, max_num_seqs=5, decode_buckets=sizes, prefill_buckets=sizes, max_prefill_tokens=24)
    )
    for size in range(1, 6):
        assert parts.scheduler.decode_buckets.bucket(size) >= size
    for size in range(1, 25):
        assert parts.scheduler.prefill_buckets.bucket(size) >= size
    assert (parts.scheduler.decode_buckets.largest, parts.scheduler.prefill_buckets.largest) == (5, 24)


def test_every_error_at_the_start_is_ours(folder: Path, tmp_path: Path) -> None:
    """One except clause catches whatever is wrong with a model or an option."""
    (tmp_path / "config.json").write_text("{}")
    for options in (
        {"model": str(tmp_path)},
        {"model": str(tmp_path / "nothing")},
        {"model": str(folder), "max_model_len": 100_000},
        {"model": str(folder), "num_gpu_blocks": 1},
    ):
        with pytest.raises(MiniInferError):
            LLMEngine(EngineConfig(device="cpu", **options))
