"""The scripts, as far as they go without a GPU; what they share with one another is not the package's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CODE = """
import runpy, sys
for path in sys.argv[1:]:
    runpy.run_path(path, run_name="imported")
"""


def test_scripts_can_be_imported() -> None:
    """Each finds what it imports, which for some is functions of others."""
    paths = [str(path) for path in sorted((ROOT / "scripts").glob("*.py"))]
    assert len(paths) > 5
    command = [sys.executable, "-c", CODE, *paths]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'scripts'}:{ROOT}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
