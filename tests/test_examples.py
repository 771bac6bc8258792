"""The examples run as a user runs them, and the snippets of the API reference do what they say.

Everything runs on a tiny random model, so the text means nothing; what is checked is that all of it is there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mini_infer import LLMEngine
from tests.tiny_models import make_tiny_model
from tests.tiny_tokenizers import save_tiny_tokenizer

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_tokenizer(folder)
    make_tiny_model("llama3-gqa", folder)
    return str(folder)


def run_example(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run an example from the repository root, on the CPU, one thread."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "MINI_INFER_HOME")}
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=ROOT,
        env={**inherited, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )


def output_of(name: str, model: str) -> str:
    result = run_example(name, model)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout


def test_every_example_is_tested() -> None:
    """No example without a test here."""
    names = {path.name for path in EXAMPLES.glob("*.py")} - {"example_model.py"}
    source = Path(__file__).read_text(encoding="utf-8")
    assert names == {name for name in names if f'output_of("{name}", model)' in source}


def test_basic(model: str) -> None:
    """A text is printed."""
    assert output_of("basic.py", model).strip()


def test_batch(model: str) -> None:
    """Three prompts, three texts in their order, in fewer decode steps than tokens."""
    output = output_of("batch.py", model)
    assert re.findall(r"^Prompt (\d): ", output, re.MULTILINE) == ["0", "1", "2"]
    counts = re.search(r"(\d+) tokens in (\d+) prefill and (\d+) decode steps\n$", output)
    assert counts is not None
    tokens, prefills, decodes = map(int, counts.groups())
    assert 3 <= tokens <= 300
    assert 1 <= prefills <= 3
    assert decodes <= 99


def test_polling(model: str) -> None:
    """Every request's output is printed once, under its own id."""
    output = output_of("polling.py", model)
    assert sorted(re.findall(r"^(request-\d+): ", output, re.MULTILINE)) == ["request-0", "request-1", "request-2"]


def test_streaming(model: str) -> None:
    """Text, then a last line with the figures of the whole output."""
    output = output_of("streaming.py", model)
    text, _, last = output.rstrip("\n").rpartition("\n")
    assert text.strip()
    figures = re.fullmatch(
        r"(\d+) tokens, ended by '(stop|length)', first token after (\d+) ms, all after (\d+) ms", last
    )
    assert figures is not None, last
    assert 1 <= int(figures[1]) <= 80
    assert figures[2] == "stop" or int(figures[1]) == 80
    assert int(figures[3]) <= int(figures[4])


def test_chat(model: str) -> None:
    """Two turns, the second one with a prompt that begins in the prefix cache."""
    output = output_of("chat.py", model)
    assert [line[:4] for line in output.splitlines() if line.startswith("user: ")] == ["user", "user"]
    assert len(re.findall(r"^assistant: ", output, re.MULTILINE)) == 2
    figures = re.search(r"(\d+) of the (\d+) prompt tokens of the second turn were not computed again\n$", output)
    assert figures is not None
    assert 0 < int(figures[1]) < int(figures[2])


def test_errors(model: str) -> None:
    """Every error is caught and says what to change."""
    output = output_of("errors.py", model)
    kinds = re.findall(r"^(Generated|Not enough memory|Invalid request|Model not found): ", output, re.MULTILINE)
    assert kinds == ["Generated", "Invalid request", "Not enough memory", "Model not found"]
    for advice in ("max_model_len=8 allows at most 7", "num_gpu_blocks=1000000000 does not fit", "no/such/model"):
        assert advice in output


def test_example_without_a_model(tmp_path: Path) -> None:
    """Without an argument and without the demo model, an example says what to do and ends."""
    result = run_example("basic.py", HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))
    assert result.returncode == 1
    assert "mini-infer download-demo" in result.stderr
    assert "Traceback" not in result.stderr


# The snippets of the API reference as they stand there, with the model's name in a variable.

BASIC_GENERATION = """
from mini_infer import LLMEngine
from mini_infer.config import EngineConfig

# Initialize
config = EngineConfig(model=MODEL)
engine = LLMEngine(config)

# Generate
outputs = engine.generate(
    prompts=["Explain quantum computing in simple terms."],
    max_tokens=200
)

print(outputs[0].text)
"""

BATCH_GENERATION = """
prompts = [
    "Write a haiku about programming",
    "Explain recursion",
    "What is machine learning?"
]

outputs = engine.generate(
    prompts=prompts,
    max_tokens=100,
    temperature=0.7
)

for i, output in enumerate(outputs):
    print(f"Prompt {i}: {output.text}\\n")
"""

ASYNC_REQUEST_HANDLING = """
# Add requests
req_ids = []
for prompt in prompts:
    req_id = engine.add_request(prompt, max_tokens=50)
    req_ids.append(req_id)

# Poll for results
while req_ids:
    for req_id in req_ids[:]:
        output = engine.get_output(req_id)
        if output:
            print(f"{req_id}: {output.text}")
            req_ids.remove(req_id)
"""

ERROR_HANDLING = """
from mini_infer.exceptions import (
    OutOfMemoryError,
    InvalidRequestError,
    ModelNotFoundError
)

try:
    engine = LLMEngine(config)
    outputs = engine.generate(prompts)
except OutOfMemoryError:
    print("Not enough GPU memory")
except InvalidRequestError as e:
    print(f"Invalid request: {e}")
except ModelNotFoundError:
    print("Model not found")
"""


def test_reference_snippets(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The reference's examples one after the other, as one program; the defaults of every option."""
    names: dict[str, object] = {"MODEL": model}

    exec(BASIC_GENERATION, names)
    engine, outputs = names["engine"], names["outputs"]
    assert isinstance(engine, LLMEngine)
    assert capsys.readouterr().out == f"{outputs[0].text}\n"  # type: ignore[index]
    assert 1 <= len(outputs[0].token_ids) <= 200  # type: ignore[index]

    exec(BATCH_GENERATION, names)
    assert re.findall(r"^Prompt (\d): ", capsys.readouterr().out, re.MULTILINE) == ["0", "1", "2"]

    exec(ASYNC_REQUEST_HANDLING, names)  # ends although nobody calls step
    assert len(re.findall(r"^request-\d+: ", capsys.readouterr().out, re.MULTILINE)) == 3
    assert not engine.has_unfinished_requests

    exec(ERROR_HANDLING, names)
    assert capsys.readouterr().out == ""
    assert len(names["outputs"]) == 3  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "printed"),
    [
        ("config = EngineConfig(model='./no/such/model')", "Model not found\n"),
        ("config = EngineConfig(model=MODEL, num_gpu_blocks=10**9)", "Not enough GPU memory\n"),
        (
            "config = EngineConfig(model=MODEL, measure_costs=False); prompts = ['Hello ' * 1000]",
            "Invalid request: the prompt has ",
        ),
    ],
)
def test_reference_error_handling(model: str, change: str, printed: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each branch of the reference's error handling is the one that is taken."""
    setup = "from mini_infer import EngineConfig, LLMEngine\nconfig = EngineConfig(model=MODEL)\nprompts = ['Hello']"
    exec(f"{setup}\n{change}\n{ERROR_HANDLING}", {"MODEL": model})
    assert capsys.readouterr().out.startswith(printed)
