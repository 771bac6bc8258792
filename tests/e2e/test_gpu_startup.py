"""Starts on a GPU in processes of their own: the second one tunes and compiles nothing, and the memory plan holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mini_infer.bench.workloads import shape_folder

pytestmark = [pytest.mark.gpu, pytest.mark.alone]

ROOT = Path(__file__).parents[2]

CHILD = """
import json, sys, threading
import triton

counts = {"compiled": 0, "from the cache": 0, "loaded": 0}
one_by_one = []

def compiled(*, src, cache_hit, **_):
    counts["from the cache" if cache_hit else "compiled"] += 1
    if not cache_hit and threading.current_thread() is threading.main_thread():
        one_by_one.append(src.name)

def loaded(*_):
    counts["loaded"] += 1

triton.knobs.compilation.listener = compiled
triton.knobs.runtime.kernel_load_end_hook.add(loaded)

import torch
from mini_infer import EngineConfig, LLMEngine, SamplingParams

def used():
    free, total = torch.cuda.mem_get_info()
    return total - free

options = json.loads(sys.argv[1])
with LLMEngine(EngineConfig(**options)) as engine:
    at_start, used_at_start = dict(counts), used()
    draws = [SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True),
             SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=1, max_tokens=9, ignore_eos=True,
                            frequency_penalty=0.5)]
    for count, length in ((1, 3), (3, 40), (options["max_num_seqs"] + 3, 7), (2, 100)):
        prompts = [[(7 * row + column) % 300 for column in range(length)] for row in range(count)]
        engine.generate(prompts, sampling_params=[draws[row % 2] for row in range(count)])
    stats = engine.stats()
    print(json.dumps({
        "at start": at_start,
        "at the end": counts,
        "one by one": one_by_one,
        "used": [used_at_start, used()],
        "total": torch.cuda.mem_get_info()[1],
        "plan loaded": stats.plan_loaded,
        "off graph": stats.off_graph_steps,
        "graphs": [[record.kind.value, record.bucket, record.bytes, record.step_ms] for record in stats.graphs],
        "costs": [stats.decode_costs, stats.prefill_costs],
        "graph bytes": stats.memory.graphs,
        "reserve": stats.memory.reserve,
    }))
"""


def start(options: dict[str, Any], home: Path) -> dict[str, Any]:
    """Start an engine in a fresh process with its caches under ``home``, generate a little, and report."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(home / "triton"), "MINI_INFER_HOME": str(home / "mini_infer")}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps({"progress": False, "load_format": "dummy", **options})],
        env=environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**report, "log": done.stderr}


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two starts of a small bare shape, one after the other, with caches that were empty before."""
    folder = tmp_path_factory.mktemp("model")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "max_position_embeddings": 512,
    }
    (folder / "config.json").write_text(json.dumps(config))
    options = {
        "model": str(folder),
        "dtype": "bfloat16",
        "max_num_seqs": 12,
        "max_prefill_tokens": 128,
        "num_gpu_blocks": 60,
        "num_cpu_blocks": 40,
        "preemption": "swap",
    }
    home = tmp_path_factory.mktemp("home")
    return [start(options, home) for _ in range(2)]


def test_the_second_start_compiles_nothing(starts: list[dict[str, Any]]) -> None:
    """The first start compiles; the second finds every kernel in Triton's cache."""
    first, second = starts
    assert first["at start"]["compiled"] > 0
    assert second["at start"]["compiled"] == 0
    assert second["at start"]["from the cache"] > 0


def test_the_first_start_compiles_the_steps_kernels_ahead(starts: list[dict[str, Any]]) -> None:
    """None of a step's kernels waits to be launched: only edits of rows and swaps are left."""
    assert set(starts[0]["one by one"]) <= {"_edit_rows_kernel", "_copy_blocks_kernel"}


def test_nothing_is_compiled_or_loaded_while_serving(starts: list[dict[str, Any]]) -> None:
    """After a start, the first or a later one, no request meets a kernel that is not on the GPU yet."""
    for report in starts:
        assert report["at the end"] == report["at start"]
        assert report["off graph"] == 0


def test_the_second_start_measures_nothing(starts: list[dict[str, Any]]) -> None:
    """It has the first one's costs and captures the buckets that the first one kept, no others."""
    first, second = starts
    assert (first["plan loaded"], second["plan loaded"]) == (False, True)
    assert first["costs"] == second["costs"]
    assert [entry[:2] for entry in first["graphs"]] == [entry[:2] for entry in second["graphs"]]
    assert all(step_ms is not None for kind, _, _, step_ms in second["graphs"] if kind == "decode")


@pytest.mark.parametrize("utilization", [0.3, 0.8])
def test_memory_stays_within_the_budget(utilization: float, tmp_path: Path) -> None:
    """Everything counted, other processes too: no more is used than `gpu_memory_utilization`, after the start and after
    serving, on a first start that measures and on a second one that trusts the plan."""
    options = {
        "model": shape_folder("qwen3-0.6b"),
        "dtype": "bfloat16",
        "max_num_seqs": 64,
        "max_model_len": 2048,
        "gpu_memory_utilization": utilization,
    }
    for _ in range(2):
        report = start(options, tmp_path)
        budget = int(report["total"] * utilization)
        assert max(report["used"]) <= budget
        assert min(report["used"]) > budget - (1 << 30), "what is left is the reserve, and that is small"
        assert report["reserve"] >= 0
        assert report["graph bytes"] >= sum(size for _, _, size, _ in report["graphs"])
        assert "more than was set aside" not in report["log"]
