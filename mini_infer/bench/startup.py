"""How long a process takes from its start to the first token of its first request, by phase."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

from mini_infer.exceptions import MiniInferError

_CHILD = """
import json, os, sys, time
begun = float(os.environ["MINI_INFER_BENCH_BEGUN"])
options = json.loads(sys.argv[1])
from mini_infer import EngineConfig, LLMEngine, SamplingParams
imported = time.time()
with LLMEngine(EngineConfig(**options)) as engine:
    built = time.time()
    next(iter(engine.stream([1, 2, 3, 4], sampling_params=SamplingParams(temperature=0.0, max_tokens=1))))
    done = time.time()
    report = engine.stats().startup
phases = {"import": imported - begun, **report.phases}
phases["between"] = built - imported - report.total
phases["first token"] = done - built
print(json.dumps({"phases": phases, "wall": done - begun}))
"""


@dataclass(frozen=True, slots=True)
class StartupRow:
    """One start.

    Attributes:
        caches: "cold" (nothing compiled, nothing measured) or "warm" (the second start).
        wall_s: Seconds from the start of the process to the first token.
        phases: Seconds by phase; they add up to ``wall_s``.
    """

    caches: str
    wall_s: float
    phases: dict[str, float]


def bench_startup(options: dict[str, Any]) -> list[StartupRow]:
    """Start twice with compile caches of their own: empty at first, then as the first start left them.

    Args:
        options: Keywords of `EngineConfig`.
    """
    caches = tempfile.mkdtemp(prefix="mini_infer-startup-")
    try:
        return [_start(options, name, caches) for name in ("cold", "warm")]
    finally:
        shutil.rmtree(caches, ignore_errors=True)


def _start(options: dict[str, Any], name: str, caches: str) -> StartupRow:
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": f"{caches}/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
        "CUDA_CACHE_PATH": f"{caches}/cuda",
        "MINI_INFER_HOME": f"{caches}/mini_infer",
        "MINI_INFER_BENCH_BEGUN": repr(time.time()),
    }
    result = subprocess.run(
        [sys.executable, "-c", _CHILD, json.dumps(options)], env=environment, capture_output=True, text=True
    )
    if result.returncode != 0:
        reason = next(reversed(result.stderr.strip().splitlines()), f"exit status {result.returncode}")
        raise MiniInferError(f"the process that was to start failed: {reason}")
    answer = json.loads(result.stdout.strip().splitlines()[-1])
    return StartupRow(name, answer["wall"], answer["phases"])
