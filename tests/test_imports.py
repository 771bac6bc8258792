"""Who may import whom. Dependencies point one way; the host side's logic needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mini_infer"

BASE = ("typing", "exceptions")
RECORDS = ("config", "sampling", "buckets", "outputs")
STEPS = ("step", "output_table", "request", "rows")
MEMORY = ("memory",)
SCHEDULER = ("growth", "preemption", "places", "prefill", "scheduler")
TOP = ("engine", "server", "cli", "__main__")
ARRAYS = ("torch", "numpy")


@dataclass(frozen=True)
class Rule:
    """What a module or a folder may import.

    Attributes:
        ours: Modules and folders of mini_infer, beside the folder itself. None: all but those of ``never``.
        others: Packages beside the standard library. None: all.
        never: Modules and folders of mini_infer that are out of the question.
    """

    ours: tuple[str, ...] | None = None
    others: tuple[str, ...] | None = None
    never: tuple[str, ...] = TOP


# The longest name that fits a module decides; modules that do not exist yet are ruled already.
RULES = {
    "typing": Rule((), ()),
    "exceptions": Rule((), ()),
    **{name: Rule((*BASE, *RECORDS), ()) for name in RECORDS},
    **{name: Rule((*BASE, *RECORDS, *STEPS), ("numpy",)) for name in STEPS},
    "memory": Rule((*BASE, *RECORDS, *MEMORY), ()),
    **{name: Rule((*BASE, *RECORDS, *STEPS, *MEMORY, *SCHEDULER), ("numpy",)) for name in SCHEDULER},
    "kernels": Rule(BASE, (*ARRAYS, "triton")),
    "graphs": Rule((*BASE, "config", "sampling", "step", "kernels"), (*ARRAYS, "triton", "tqdm")),
    "graphs.spec": Rule(BASE, ()),
    "loader": Rule(never=(*TOP, "runner", "scheduler")),
    "measuring": Rule((*BASE, *RECORDS, "step"), ()),
    "runner": Rule(never=(*TOP, "scheduler", "memory.block_manager", "memory.prefix_cache")),
    "engine": Rule(never=("server", "cli", "__main__")),
    "server": Rule(never=("cli", "__main__")),
    "cli": Rule(never=("__main__",)),
    "bench": Rule(never=("server", "cli", "__main__")),
    "__main__": Rule(never=()),
    "__init__": Rule(never=("server", "cli", "__main__")),
    "": Rule(),
}


def module_name(path: Path) -> str:
    """memory.plan for mini_infer/memory/plan.py; a folder's __init__ is the folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def package_files() -> list[Path]:
    """Every module of the package, through the links to kernels/ and graphs/."""
    folders = [PACKAGE, *(folder for folder in PACKAGE.iterdir() if folder.is_dir() and folder.name != "__pycache__")]
    nested = [path for folder in folders[1:] for path in folder.rglob("*.py")]
    return sorted({*PACKAGE.glob("*.py"), *nested})


def is_within(name: str, folders: tuple[str, ...]) -> bool:
    return any(name == folder or name.startswith(folder + ".") for folder in folders)


def rule_of(name: str) -> Rule:
    return RULES[max((key for key in RULES if key == "" or is_within(name, (key,))), key=len)]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of every import in a file, also inside functions and under TYPE_CHECKING."""
    yield from imports_of(path.read_text(encoding="utf-8"), str(path))


def imports_of(source: str, path: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            if base in ("mini_infer", "mini_infer.memory", "mini_infer.graphs", "mini_infer.kernels"):
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, base


def violations(name: str, found: Iterator[tuple[int, str]]) -> list[str]:
    """What module ``name`` must not import."""
    rule = rule_of(name)
    home = (name.split(".")[0],)
    bad = []
    for line, imported in found:
        top, _, rest = imported.partition(".")
        if top != "mini_infer":
            if top and top not in sys.stdlib_module_names and rule.others is not None and top not in rule.others:
                bad.append(f"line {line}: {imported}")
        elif rest == "__version__" or (is_within(rest, home) and "." in name):
            continue
        elif is_within(rest, rule.never) or (rule.ours is not None and not is_within(rest, (*rule.ours, *home))):
            bad.append(f"line {line}: {imported}")
    return bad


@pytest.mark.parametrize("path", package_files(), ids=module_name)
def test_imports_follow_the_rules(path: Path) -> None:
    assert violations(module_name(path), imports(path)) == []


@pytest.mark.parametrize(
    ("name", "source", "refused"),
    [
        ("scheduler", "import torch", True),
        ("scheduler", "import numpy as np", False),
        ("memory.block_manager", "import numpy as np", True),
        ("scheduler", "def late():\n    import torch.nn", True),
        ("scheduler", "from mini_infer.graphs.state import DecodeState", True),
        ("scheduler", "from mini_infer import kernels", True),
        ("scheduler", "from mini_infer.memory import BlockManager", False),
        ("rows", "from mini_infer.request import Request", False),
        ("step", "from mini_infer.scheduler import Scheduler", True),
        ("measuring", "from mini_infer.step import PrefillChunk", False),
        ("measuring", "from mini_infer.memory.block_manager import BlockManager", True),
        ("buckets", "from mini_infer.memory.plan import GIB", True),
        ("memory.plan", "import torch", True),
        ("memory.block_manager", "from mini_infer.memory.prefix_cache import ROOT", False),
        ("memory.block_manager", "from mini_infer.scheduler import Scheduler", True),
        ("typing", "from mini_infer.exceptions import BlockError", True),
        ("kernels.norm", "import torch, triton", False),
        ("kernels.norm", "from mini_infer.kernels.common import register_op", False),
        ("kernels.norm", "from mini_infer.step import StepKind", True),
        ("kernels.norm", "from mini_infer.graphs.spec import ModelSpec", True),
        ("kernels.norm", "import transformers", True),
        ("graphs.capture", "from mini_infer.step import StepKind", False),
        ("graphs.capture", "from mini_infer.scheduler import Scheduler", True),
        ("graphs.capture", "from mini_infer.memory.block_manager import BlockManager", True),
        ("graphs.capture", "from mini_infer.memory import BlockManager", True),
        ("graphs.capture", "from mini_infer.runner import ModelRunner", True),
        ("graphs.capture", "from mini_infer.request import Request", True),
        ("runner", "from mini_infer.graphs.steps import EagerSteps", False),
        ("runner", "from mini_infer.engine import LLMEngine", True),
        ("runner", "from mini_infer.scheduler import Scheduler", True),
        ("engine", "from mini_infer.server.app import app", True),
        ("engine", "from mini_infer.scheduler import Scheduler", False),
        ("some_new_module", "from mini_infer.engine import LLMEngine", True),
        ("some_new_module", "import torch", False),
    ],
)
def test_the_rules_bite(name: str, source: str, refused: bool) -> None:
    assert bool(violations(name, imports_of(source, name))) is refused


def test_the_rules_meet_the_files() -> None:
    """A renamed folder or module must not slip out of its rule."""
    names = {module_name(path) for path in package_files()}
    for expected in ("typing", "scheduler", "memory.block_manager", "kernels.norm", "graphs.decoder", "runner"):
        assert expected in names, f"{expected} is gone: bring the rules up to date"


def python_files() -> list[Path]:
    folders = ("mini_infer", "kernels", "graphs", "tests", "scripts", "examples")
    return sorted({path.resolve() for folder in folders for path in (ROOT / folder).rglob("*.py")})


def test_all_imports_are_absolute_and_by_our_name() -> None:
    """`import kernels` works from the repository's root and nowhere else, and makes a second copy of everything."""
    bad = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in python_files()
        for line, name in imports(path)
        if name.startswith(".") or name.split(".")[0] in ("kernels", "graphs")
    ]
    assert bad == []


def loaded_after(statement: str) -> set[str]:
    """Top-level packages in sys.modules of a fresh interpreter in the repository's root."""
    script = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(result.stdout.split())


HEAVY = {"torch", "triton", "transformers", "tokenizers", "safetensors"}


def test_the_host_side_runs_without_torch() -> None:
    names = [*BASE, *RECORDS, *STEPS, "memory", "memory.plan", *SCHEDULER]
    statement = "import mini_infer, " + ", ".join(f"mini_infer.{name}" for name in names)
    statement += "\nfrom mini_infer import EngineConfig, GenerateOutput, SamplingParams"
    statement += "\nmini_infer.scheduler.Scheduler(max_num_seqs=4, max_model_len=64, block_size=16).schedule()"
    assert not loaded_after(statement) & HEAVY
    assert "torch" in loaded_after("import torch"), "this test sees nothing"


@pytest.mark.parametrize("folder", ["kernels", "graphs"])
def test_the_linked_folders_are_harmless_under_their_bare_names(folder: str) -> None:
    """transformers imports a package called `kernels` if it finds one, and it finds ours from the repository's root."""
    loaded = loaded_after(f"import {folder}; assert not hasattr({folder}, '__version__')")
    assert not loaded & {*HEAVY, "numpy", "mini_infer"}
