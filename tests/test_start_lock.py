"""Engines that start on one GPU take turns."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mini_infer.start_lock import one_start_at_a_time

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)

OTHER = """
import sys, torch
from types import SimpleNamespace
from mini_infer.start_lock import one_start_at_a_time

torch.cuda.get_device_properties = lambda device: SimpleNamespace(uuid=sys.argv[1])
with one_start_at_a_time(torch.device("cuda", 0)):
    print("begun", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINI_INFER_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1"))
    return tmp_path


def start_another(gpu: str) -> subprocess.Popen[str]:
    """Another process that begins a start, and ends it when it is told to."""
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER, gpu], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "begun\n"
    return other


def test_nobody_to_wait_for(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One start after the other, and a CPU, which anybody may start on."""
    for device in (GPU, GPU, CPU):
        with one_start_at_a_time(device):
            pass
    assert not caplog.records
    with one_start_at_a_time(CPU), one_start_at_a_time(CPU):
        pass


def test_an_error_ends_the_turn() -> None:
    with pytest.raises(KeyError), one_start_at_a_time(GPU):
        raise KeyError
    with one_start_at_a_time(GPU):
        pass


@pytest.mark.parametrize("end", ["told", "killed"])
def test_waits_for_another_process(end: str, caplog: pytest.LogCaptureFixture) -> None:
    """Which is said once; it ends with that process, however that ends."""
    other = start_another("GPU-1")
    threading.Timer(0.5, other.kill if end == "killed" else lambda: other.communicate("\n")).start()
    begun = time.perf_counter()
    with caplog.at_level(logging.WARNING), one_start_at_a_time(GPU):
        assert time.perf_counter() - begun > 0.4
    assert caplog.text.count("waiting for another engine") == 1
    other.wait()


def test_another_gpu_is_another_turn() -> None:
    other = start_another("GPU-2")
    with one_start_at_a_time(GPU):
        assert other.poll() is None
    other.communicate("\n")


def test_no_folder_to_agree_in(home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The start goes on, and says so."""
    (home / "a file").touch()
    monkeypatch.setenv("MINI_INFER_HOME", str(home / "a file"))
    with one_start_at_a_time(GPU):
        pass
    assert "get in each other's way" in caplog.text
