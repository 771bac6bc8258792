"""Triton without a GPU: in processes of their own, where nothing is interpreted, a stub driver names the target."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PREAMBLE = """
import os, threading
from pathlib import Path
import torch, triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

launched, compiled, launchers = [], [], []

def ahead():
    return threading.current_thread().name.startswith("compile")

class Launcher:
    def __init__(self, src, metadata):
        self.name = src.name
        launchers.append((src.name, ahead()))
    def __call__(self, *args): launched.append(self.name)

class Utils:
    def get_device_properties(self, device): return {"max_shared_mem": 227 * 1024}
    def load_binary(self, name, binary, shared, device): return object(), 0, 0, 0, 1024

class Driver:
    launcher_cls, utils = Launcher, Utils()
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0
    def get_active_torch_device(self): return torch.device("cpu")

def listener(*, src, cache_hit, **_):
    assert not cache_hit
    compiled.append((src.name, ahead()))

triton.runtime.driver.set_active(Driver())
triton.knobs.compilation.listener = listener
run = JITFunction.run
"""
"""What a script begins with. `launched` has the names of the kernels that were launched, `compiled` and `launchers`
those that were compiled and got a launcher, and whether one of the threads of `compile_ahead` did it."""


def run_without_gpu(code: str, folder: Path) -> None:
    """Run a script, given a folder as its argument; what it asserts must hold."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = folder / "script.py"  # Triton reads the source of its kernels
    script.write_text(code)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        cwd=root,
        env={**environment, "TRITON_CACHE_DIR": str(folder / "triton"), "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
