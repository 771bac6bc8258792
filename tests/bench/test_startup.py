"""The start-up benchmark: what it makes of the processes that it starts."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest

from mini_infer.bench.startup import bench_startup
from mini_infer.exceptions import MiniInferError


def test_cold_then_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with the same caches, which were empty and are gone afterwards."""
    homes: list[str] = []

    def run(command: list[str], *, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert json.loads(command[-1]) == {"model": "x"}
        assert os.path.isdir(os.path.dirname(env["MINI_INFER_HOME"]))
        homes.append(env["MINI_INFER_HOME"])
        answer = {"wall": 3.0 - len(homes), "phases": {"import": 1.0}}
        return subprocess.CompletedProcess(command, 0, "noise\n" + json.dumps(answer) + "\n", "")

    monkeypatch.setattr(subprocess, "run", run)
    rows = bench_startup({"model": "x"})
    assert [(row.caches, row.wall_s, row.phases) for row in rows] == [
        ("cold", 2.0, {"import": 1.0}),
        ("warm", 1.0, {"import": 1.0}),
    ]
    assert homes[0] == homes[1] and not os.path.exists(os.path.dirname(homes[0]))


@pytest.mark.parametrize(
    ("stderr", "reason"), [("Traceback\n  ...\nConfigError: max_model_len is 9\n", "ConfigError: max_model"), ("", "7")]
)
def test_a_start_that_fails(monkeypatch: pytest.MonkeyPatch, stderr: str, reason: str) -> None:
    """One line says why: what the process said last, or its exit status."""
    failed = subprocess.CompletedProcess([], 7, "", stderr)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: failed)
    with pytest.raises(MiniInferError, match=f"that was to start failed: .*{reason}") as error:
        bench_startup({"model": "x"})
    assert "Traceback" not in str(error.value)
