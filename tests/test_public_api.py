"""The names, signatures and defaults that users rely on, and that the documents say the same as the code."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import inspect
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mini_infer
import mini_infer.exceptions
import mini_infer.kernels
import mini_infer.memory
import mini_infer.typing
from mini_infer.buckets import BucketUse
from mini_infer.cli import _parser
from mini_infer.config import EngineConfig
from mini_infer.engine import LLMEngine
from mini_infer.exceptions import MiniInferError
from mini_infer.graphs.spec import SUPPORTED_ARCHITECTURES
from mini_infer.intake import RequestIntake
from mini_infer.memory import BlockManager
from mini_infer.memory.plan import MemoryPlan
from mini_infer.metrics import EngineStats, StartupReport, StepTime
from mini_infer.outputs import GenerateOutput, RequestTimings, StreamIncrement
from mini_infer.request import Request
from mini_infer.sampling import SamplingParams
from mini_infer.scheduler import Scheduler
from mini_infer.step import CaptureRecord, PrefillChunk, SampledTokens, SchedulerOutputs
from mini_infer.typing import SequenceMetadata
from tests.tiny_models import make_tiny_model
from tests.tiny_tokenizers import save_tiny_tokenizer

ROOT = Path(__file__).parents[1]
API = ROOT / "docs" / "api.md"
READMES = (ROOT / "README.md", ROOT / "README.zh-CN.md")

PUBLIC_CLASSES: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        LLMEngine,
        EngineConfig,
        SamplingParams,
        GenerateOutput,
        RequestTimings,
        StreamIncrement,
        EngineStats,
        BucketUse,
        CaptureRecord,
        StepTime,
        StartupReport,
        MemoryPlan,
        Scheduler,
        SchedulerOutputs,
        PrefillChunk,
        SampledTokens,
        BlockManager,
        SequenceMetadata,
    )
}
ERRORS = [
    value
    for value in vars(mini_infer.exceptions).values()
    if isinstance(value, type) and issubclass(value, MiniInferError)
]


# The contract: import paths, parameters and defaults of the API reference

REFERENCE_IMPORTS = {
    "mini_infer": ["LLMEngine"],
    "mini_infer.config": ["EngineConfig"],
    "mini_infer.scheduler": ["Scheduler"],
    "mini_infer.memory": ["BlockManager"],
    "mini_infer.kernels": ["rmsnorm", "apply_rotary_emb", "paged_attention"],
    "mini_infer.sampling": ["SamplingParams"],
    "mini_infer.exceptions": ["OutOfMemoryError", "InvalidRequestError", "ModelNotFoundError"],
    "mini_infer.typing": ["TokenIds", "BlockTable", "SequenceMetadata"],
}


@pytest.mark.parametrize("module", REFERENCE_IMPORTS)
def test_import_paths(module: str) -> None:
    """Every import of the reference works in a fresh interpreter, from another folder, as its first import."""
    names = ", ".join(REFERENCE_IMPORTS[module])
    subprocess.run([sys.executable, "-c", f"from {module} import {names}"], check=True, timeout=120)


def parameters(function: Any) -> list[str]:
    """Names of the parameters that can be given by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = inspect.signature(function).parameters.values()
    return [p.name for p in found if p.kind in kinds and p.name != "self"]


def test_signatures() -> None:
    """Parameters by the reference's names, in its order; what we added comes after or by keyword only."""
    assert parameters(LLMEngine) == ["config"]
    assert parameters(LLMEngine.generate) == ["prompts", "max_tokens", "temperature", "top_p", "top_k"]
    assert parameters(LLMEngine.add_request) == ["prompt", "max_tokens", "sampling_params"]
    assert parameters(LLMEngine.get_output) == ["request_id"]
    assert parameters(Scheduler) == ["max_num_seqs", "max_model_len", "block_size"]
    assert parameters(Scheduler.schedule) == []
    assert parameters(BlockManager) == ["block_size", "num_gpu_blocks", "num_cpu_blocks"]
    assert parameters(BlockManager.allocate) == ["num_blocks"]
    assert parameters(BlockManager.free) == ["blocks"]
    assert parameters(BlockManager.can_allocate) == ["num_blocks"]
    assert parameters(mini_infer.kernels.rmsnorm) == ["x", "weight", "eps"]
    assert parameters(mini_infer.kernels.apply_rotary_emb) == ["q", "k", "cos", "sin", "position_ids"]
    attention = ["query", "key_cache", "value_cache", "block_tables", "context_lens"]
    assert parameters(mini_infer.kernels.paged_attention) == attention


def test_config_defaults() -> None:
    """The defaults that the reference gives."""
    config = EngineConfig(model="name")
    assert (config.tokenizer, config.max_num_seqs, config.max_model_len, config.block_size) == (None, 256, None, 16)
    assert (config.gpu_memory_utilization, config.dtype, config.trust_remote_code) == (0.9, "float16", False)


def test_sampling_defaults() -> None:
    """The defaults that the reference gives, on their own and in `generate` and `add_request`."""
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (1.0, 1.0, -1, 16)


def test_output_fields(engine: LLMEngine) -> None:
    """The attributes that the reference gives, with their types."""
    output = engine.generate(prompts=["Hello"], max_tokens=4, temperature=0.8, top_p=0.95, top_k=50)[0]
    assert isinstance(output.text, str)
    assert all(isinstance(token_id, int) for token_id in output.token_ids)
    assert output.finish_reason in ("stop", "length")
    assert isinstance(output.cumulative_logprob, float)
    assert output.cumulative_logprob < 0


def test_effective_sampling(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `generate` and `add_request` sample with when nothing, something or everything is given."""
    seen: list[SamplingParams] = []
    make = RequestIntake.make

    def spy(self: RequestIntake, prompt: Any, params: SamplingParams) -> Request:
        seen.append(params)
        return make(self, prompt, params)

    monkeypatch.setattr(RequestIntake, "make", spy)
    engine.generate(["Hello"])
    engine.generate(["Hello"], 3, 0.5, 0.9, 7)
    engine.generate(["Hello"], max_tokens=2, sampling_params=SamplingParams(temperature=0.3, max_tokens=9))
    for request_id in (
        engine.add_request("Hello"),
        engine.add_request("Hello", 4),
        engine.add_request(prompt="Hello", max_tokens=50, sampling_params=SamplingParams(temperature=0.9)),
    ):
        engine.abort(request_id)
    assert seen == [
        SamplingParams(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=100),
        SamplingParams(temperature=0.5, top_p=0.9, top_k=7, max_tokens=3),
        SamplingParams(temperature=0.3, max_tokens=2),
        SamplingParams(max_tokens=16),
        SamplingParams(max_tokens=4),
        SamplingParams(temperature=0.9, max_tokens=50),
    ]


def test_block_manager_snippets() -> None:
    """The reference's calls, with keywords as it writes them."""
    block_manager = BlockManager(block_size=16, num_gpu_blocks=1024, num_cpu_blocks=256)
    blocks = block_manager.allocate(num_blocks=4)
    assert len(set(blocks)) == 4
    assert block_manager.can_allocate(num_blocks=1020)
    assert not block_manager.can_allocate(num_blocks=1021)
    block_manager.free(blocks)
    assert block_manager.can_allocate(num_blocks=1024)


def test_scheduler_snippet() -> None:
    """The reference's calls, and a request through the scheduler alone."""
    scheduler = Scheduler(max_num_seqs=64, max_model_len=2048, block_size=16)
    scheduled_seqs = scheduler.schedule()
    assert isinstance(scheduled_seqs, SchedulerOutputs)
    assert not scheduled_seqs
    scheduler.add(Request("a", (5, 6, 7), SamplingParams(max_tokens=2)))
    outputs = scheduler.schedule()
    assert outputs
    assert outputs.request_ids == ("a",)
    metadata = scheduler.metadata("a")
    assert isinstance(metadata, SequenceMetadata)
    assert metadata.num_computed_tokens == 3


def test_kernel_snippets() -> None:
    """The reference's calls, with keywords as it writes them."""
    torch.manual_seed(0)
    hidden, heads, head_dim, rows, block_size = 32, 4, 16, 3, 16
    x = torch.randn(2, rows, hidden)
    weight = torch.randn(hidden)
    output = mini_infer.kernels.rmsnorm(x=x, weight=weight, eps=1e-6)
    torch.testing.assert_close(output, x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight)

    q, k = torch.randn(rows, heads, head_dim), torch.randn(rows, 2, head_dim)
    angles = torch.outer(torch.arange(10.0), 0.5 ** torch.arange(head_dim // 2))
    turned = mini_infer.kernels.apply_rotary_emb(
        q=q, k=k, cos=angles.cos(), sin=angles.sin(), position_ids=torch.tensor([0, 1, 9])
    )
    assert [t.shape for t in turned] == [q.shape, k.shape]
    torch.testing.assert_close(turned[0][0], q[0])  # position 0 is not turned
    torch.testing.assert_close(turned[0].norm(dim=-1), q.norm(dim=-1))

    cache = torch.randn(2, 5, 2, block_size, head_dim)
    block_tables = torch.tensor([[1, 0], [2, 3], [4, 0]], dtype=torch.int32)
    attended = mini_infer.kernels.paged_attention(
        query=q,
        key_cache=cache[0],
        value_cache=cache[1],
        block_tables=block_tables,
        context_lens=torch.tensor([1, 20, 16], dtype=torch.int32),
    )
    assert attended.shape == q.shape
    torch.testing.assert_close(attended[0], cache[1, 1, :, 0].repeat_interleave(2, 0))  # one token: its value


# __all__ and what there is


@pytest.mark.parametrize("module", [mini_infer, mini_infer.kernels, mini_infer.memory])
def test_all_is_true(module: Any) -> None:
    """Every name in __all__ is there, sorted, once; a lazy name is listed by dir()."""
    assert module.__all__ == sorted(set(module.__all__))
    for name in module.__all__:
        assert getattr(module, name) is not None
    assert set(module.__all__) <= set(dir(module))


def test_all_is_complete() -> None:
    """What the type checker sees (the TYPE_CHECKING imports) is what __all__ says."""
    for module in (mini_infer, mini_infer.kernels):
        imported = {
            alias.name
            for node in ast.walk(ast.parse(inspect.getsource(module)))
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for statement in node.body
            if isinstance(statement, ast.ImportFrom)
            for alias in statement.names
        }
        assert imported == set(module.__all__) - {"__version__"}


def test_unknown_names() -> None:
    """A name that is not there is an AttributeError, not a wrong module; an unknown option is a TypeError."""
    for module in (mini_infer, mini_infer.kernels):
        with pytest.raises(AttributeError, match="no_such_name"):
            _ = module.no_such_name
    with pytest.raises(TypeError, match="max_num_seq"):
        EngineConfig(model="name", max_num_seq=4)  # type: ignore[call-arg]


def test_import_is_light() -> None:
    """`import mini_infer` and the scheduler import neither torch nor transformers."""
    code = (
        "import sys, mini_infer, mini_infer.scheduler, mini_infer.memory, mini_infer.kernels, mini_infer.config\n"
        "sys.exit(', '.join(sorted({'torch', 'triton', 'transformers'} & set(sys.modules))) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


# docs/api.md


@dataclasses.dataclass(frozen=True)
class Section:
    """One ``### `` heading of the reference: its text, and the text of each ``##### `` heading below it."""

    text: str
    parts: dict[str, str]


def api_sections() -> dict[str, Section]:
    sections = {}
    for chunk in re.split(r"^### ", API.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        title, _, body = chunk.partition("\n")
        body = re.split(r"^## ", body, flags=re.MULTILINE)[0]
        parts = {}
        for part in re.split(r"^##### ", body, flags=re.MULTILINE)[1:]:
            name, _, text = part.partition("\n")
            parts[re.sub(r"[`()]", "", name)] = text
        sections[title.strip("` ")] = Section(body, parts)
    return sections


def code_blocks(text: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def documented_items(text: str) -> dict[str, str]:
    """``- `name` (type): text`` items by name."""
    return dict(re.findall(r"^- `(\w+)`(.*)$", text, re.MULTILINE))


def test_api_names_everything_public() -> None:
    """Every public name has a section, or an item of its own."""
    sections = api_sections()
    items = set(documented_items(API.read_text(encoding="utf-8")))
    wanted = {
        *mini_infer.__all__,
        *mini_infer.kernels.__all__,
        *mini_infer.memory.__all__,
        *PUBLIC_CLASSES,
        *(error.__name__ for error in ERRORS),
        *("TokenIds", "BlockTable", "SequenceMetadata", "NULL_BLOCK", "NO_ROW"),
    }
    assert wanted - set(sections) - items == set()


def public_methods(cls: type) -> Iterator[tuple[str, Any]]:
    for name, member in vars(cls).items():
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
            yield name, member


@pytest.mark.parametrize("name", ["LLMEngine", "Scheduler", "BlockManager"])
def test_api_names_every_method(name: str) -> None:
    """Every public method has a heading, every property an item; and none is left over."""
    section = api_sections()[name]
    methods = {n for n, member in public_methods(PUBLIC_CLASSES[name]) if inspect.isfunction(member)}
    properties = {n for n, member in public_methods(PUBLIC_CLASSES[name]) if isinstance(member, property)}
    assert set(section.parts) == methods
    assert properties - set(documented_items(section.text)) == set()


def documented_signatures() -> list[tuple[str, Any]]:
    """Every ``def`` in a code block of docs/api.md, with the function that it is about."""
    found: list[tuple[str, Any]] = []
    for title, section in api_sections().items():
        for block in code_blocks(section.text):
            match = re.match(r"def (\w+)\(", block)
            if match is None:
                continue
            owner = PUBLIC_CLASSES.get(title)
            found.append((block, getattr(owner, match[1]) if owner else getattr(mini_infer.kernels, match[1])))
    return found


def outline(source: str) -> str:
    """A function's name, parameters and result as one line."""
    node = ast.parse(textwrap.dedent(source)).body[0]
    assert isinstance(node, ast.FunctionDef)
    result = "" if node.returns is None else f" -> {ast.unparse(node.returns)}"
    return f"{node.name}({ast.unparse(node.args)}){result}"


def test_api_signatures() -> None:
    """Signatures are those of the code, types and defaults included."""
    signatures = documented_signatures()
    assert len(signatures) >= 30
    for block, function in signatures:
        assert outline(block) == outline(inspect.getsource(function))


def test_api_methods_and_kernels_have_signatures() -> None:
    """Every method and every kernel shows its signature."""
    documented = {function for _, function in documented_signatures()}
    for name in ("LLMEngine", "Scheduler", "BlockManager"):
        for method, member in public_methods(PUBLIC_CLASSES[name]):
            assert isinstance(member, property) or member in documented, f"{name}.{method}"
        assert PUBLIC_CLASSES[name].__init__ in documented, name  # type: ignore[misc]
    for name in mini_infer.kernels.__all__:
        assert isinstance(getattr(mini_infer.kernels, name), type) or getattr(mini_infer.kernels, name) in documented


@pytest.mark.parametrize("name", [n for n, cls in PUBLIC_CLASSES.items() if dataclasses.is_dataclass(cls)])
def test_api_fields(name: str) -> None:
    """Every field of a public dataclass has an item, in both languages, with its true default; none is left over."""
    items = documented_items(api_sections()[name].text)
    fields = {field.name: field for field in dataclasses.fields(PUBLIC_CLASSES[name])}  # type: ignore[arg-type]
    properties = {n for n, member in public_methods(PUBLIC_CLASSES[name]) if isinstance(member, property)}
    assert set(fields) <= set(items)
    assert set(items) <= set(fields) | properties
    for field in fields.values():
        assert " | " in items[field.name], f"{name}.{field.name} is in one language only"
        default = re.search(r"Default: `([^`]*)`", items[field.name])
        if field.default is dataclasses.MISSING:
            assert default is None, f"{name}.{field.name} has no default"
        else:
            assert default is not None, f"{name}.{field.name} has a default"
            assert ast.literal_eval(default[1]) == field.default, f"{name}.{field.name}"


def test_api_parameters() -> None:
    """Every parameter of every documented signature has an item, and it gives the default that the code has."""
    for title, section in api_sections().items():
        owner = PUBLIC_CLASSES.get(title)
        for part, text in {"": re.split(r"^##### ", section.text, flags=re.MULTILINE)[0], **section.parts}.items():
            for block in code_blocks(text):
                if not block.startswith("def "):
                    continue
                function = re.match(r"def (\w+)", block)[1]  # type: ignore[index]
                items = documented_items(text)
                signature = inspect.signature(getattr(owner or mini_infer.kernels, function))
                for parameter in signature.parameters.values():
                    if parameter.name == "self":
                        continue
                    assert parameter.name in items, f"{title} {part}: {parameter.name} is not explained"
                    default = re.search(r"Default: `([^`]*)`", items[parameter.name])
                    if parameter.default is inspect.Parameter.empty:
                        assert default is None, f"{title} {part}: {parameter.name} has no default"
                    else:
                        assert default is not None, f"{title} {part}: the default of {parameter.name} is missing"
                        assert ast.literal_eval(default[1]) == parameter.default, f"{title} {part}: {parameter.name}"


def test_api_imports() -> None:
    """Every import in the reference's code blocks works."""
    for block in code_blocks(API.read_text(encoding="utf-8")):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                assert node.module is not None
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


def test_api_errors() -> None:
    """Every error is listed with the built-in error that it also is."""
    items = documented_items(API.read_text(encoding="utf-8"))
    for error in ERRORS:
        if error is not MiniInferError:
            builtin = next(base for base in error.__mro__ if base.__module__ == "builtins")
            assert f"`{builtin.__name__}`" in items[error.__name__]


def test_api_options() -> None:
    """Every command and option of the command line is named, and no other."""
    text = API.read_text(encoding="utf-8").partition("## Command Line")[2]
    commands = next(a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    actual = {option for command in commands.values() for option in command._option_string_actions} | {"--version"}
    assert set(re.findall(r"`.*?(--[\w-]+)", text)) == {option for option in actual if option.startswith("--")}
    assert all(f"`{command}" in text for command in commands)


def test_anchors() -> None:
    """Links within a document, and to files of the repository, lead somewhere."""
    for path in (API, *READMES, ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.md"):
        text = path.read_text(encoding="utf-8")
        prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        headings = {
            re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
        }
        for target in re.findall(r"\]\(([^)\s]+)\)", prose):
            if target.startswith("#"):
                assert target[1:] in headings, f"{path.name}: {target}"
            elif not re.match(r"https?://", target):
                assert (path.parent / target.split("#")[0]).exists(), f"{path.name}: {target}"


# READMEs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_tokenizer(folder)
    make_tiny_model("llama3-gqa", folder)
    return str(folder)


@pytest.fixture(scope="module")
def engine(model: str) -> Iterator[LLMEngine]:
    config = EngineConfig(model=model, max_num_seqs=4, measure_costs=False, progress=False)
    with LLMEngine(config) as engine:
        yield engine


def test_readme_snippets(model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The READMEs' Python runs (on a tiny model in place of the demo model), and is the same in both."""
    snippets = [code_blocks(path.read_text(encoding="utf-8")) for path in READMES]
    assert snippets[0] == snippets[1]
    assert snippets[0]
    monkeypatch.setattr("mini_infer.demo_model.demo_model_path", lambda: Path(model))
    for snippet in snippets[0]:
        exec(snippet, {})
        assert capsys.readouterr().out.strip()


def test_readme_commands() -> None:
    """Every `mini-infer` command of the READMEs parses, options and all; every `make` target is there."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for path in READMES:
        blocks = "\n".join(code_blocks(path.read_text(encoding="utf-8"), "bash"))
        commands = re.findall(r"^mini-infer (.*?)(?:  +#.*)?$", blocks, re.MULTILINE)
        assert {command.split()[0] for command in commands} == {"generate", "chat", "info", "bench", "download-demo"}
        for command in commands:
            _parser().parse_args(shlex.split(command))
        made = re.findall(r"^make ([\w-]+)", blocks, re.MULTILINE)
        assert {"demo", "test"} <= set(made) <= targets


def test_readme_lists_supported_models() -> None:
    """The table of supported models is the code's."""
    for path in READMES:
        table = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", path.read_text(encoding="utf-8"), re.MULTILINE))
        assert table == dict(SUPPORTED_ARCHITECTURES)


def test_versions_agree() -> None:
    """The version and the dependencies' ranges are written the same everywhere."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{mini_infer.__version__}"' in project
    for path in READMES:
        text = path.read_text(encoding="utf-8")
        assert f"v{mini_infer.__version__}" in text
        for name in ("torch", "triton", "transformers"):
            wanted = re.search(rf'"{name}([<>=.,\d]+)', project)
            assert wanted is not None
            assert f"`{name}{wanted[1]}`" in text, f"{path.name}: {name}{wanted[1]}"
