"""The command line, in the process where that is possible: what it prints, and how it fails."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mini_infer
from mini_infer import EngineConfig, LLMEngine, SamplingParams
from mini_infer.cli import main
from mini_infer.engine import LLMEngine as Engine
from tests.tiny_models import make_tiny_model
from tests.tiny_tokenizers import save_tiny_tokenizer

ROOT = Path(__file__).parents[1]
FIGURES = re.compile(
    r"^\[(\d+) prompt tokens \((\d+) cached\), (\d+) output tokens \((\w+)\), TTFT \d+ ms, [\d.]+ tok/s, "
    r"padding: prefill \d+%, decode \d+%\]$"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tiny_tokenizer(path)
    make_tiny_model("llama3-gqa", path, num_hidden_layers=1)
    return path


@pytest.fixture
def options(folder: Path) -> list[str]:
    return ["--model", str(folder), "--device", "cpu", "--dtype", "float32", "--max-model-len", "128"]


def engine_output(folder: Path, prompt: Any, max_tokens: int = 9) -> Any:
    """What the Python API gives, greedily."""
    with LLMEngine(EngineConfig(model=str(folder), device="cpu", dtype="float32", max_model_len=128)) as engine:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        if isinstance(prompt, list):
            return engine.chat(prompt, sampling_params=params)
        return engine.generate(prompt, sampling_params=params)[0]


def split(out: str) -> tuple[str, re.Match[str]]:
    """The text before the last line, and the figures in it."""
    text, _, figures = out.rstrip("\n").rpartition("\n")
    match = FIGURES.match(figures)
    assert match is not None, out
    return text, match


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["--version"])
    assert raised.value.code == 0
    assert capsys.readouterr().out == f"mini-infer {mini_infer.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["generate"], ["generate", "x", "--device", "tpu"]])
def test_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong usage: status 2 and the usage, before anything is loaded."""
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert "usage: mini-infer" in capsys.readouterr().err


def test_generate_raw(folder: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The prompt as it is: the API's greedy text, and the figures of the run. Nothing on stderr: no bar, no log."""
    assert main(["generate", "the cat", "--raw", "--max-tokens", "9", *options]) == 0
    captured = capsys.readouterr()
    expected = engine_output(folder, "the cat")
    text, figures = split(captured.out)
    assert text == expected.text
    assert figures.groups() == (str(len(expected.prompt_token_ids)), "0", "9", expected.finish_reason)
    assert captured.err == ""


@pytest.mark.parametrize("system", [None, "be brief"])
def test_generate_with_the_template(
    folder: Path, options: list[str], system: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --raw the prompt is a user's turn, after the system message if there is one."""
    extra = ["--system", system] if system else []
    assert main(["generate", "hello", "--max-tokens", "9", *extra, *options]) == 0
    messages = [{"role": "user", "content": "hello"}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    expected = engine_output(folder, messages)
    text, figures = split(capsys.readouterr().out)
    assert text == expected.text
    assert figures[1] == str(len(expected.prompt_token_ids))


def test_generate_without_a_template(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A base model continues the prompt."""
    make_tiny_model("llama3-gqa", tmp_path, num_hidden_layers=1)
    save_tiny_tokenizer(tmp_path, chat_template=None)
    arguments = ["--model", str(tmp_path), "--device", "cpu", "--dtype", "float32", "--max-tokens", "9"]
    assert main(["generate", "hello", *arguments]) == 0
    text, _ = split(capsys.readouterr().out)
    assert text == engine_output(folder, "hello").text


def test_sampling_options_arrive(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one of them, with the value that was given."""
    seen: list[SamplingParams] = []
    stream = Engine.stream

    def spy(self: Engine, prompt: Any, max_tokens: Any = None, sampling_params: Any = None) -> Any:
        seen.append(sampling_params)
        return stream(self, prompt, max_tokens, sampling_params)

    monkeypatch.setattr(Engine, "stream", spy)
    arguments = "--temperature 0.7 --top-p 0.9 --top-k 12 --min-p 0.1 --seed 3 --max-tokens 4 --stop x --stop yy"
    arguments += " --repetition-penalty 1.1 --presence-penalty -0.5 --frequency-penalty 0.2"
    assert main(["generate", "hello", "--raw", *arguments.split(), *options]) == 0
    assert seen == [
        SamplingParams(
            temperature=0.7,
            top_p=0.9,
            top_k=12,
            min_p=0.1,
            repetition_penalty=1.1,
            presence_penalty=-0.5,
            frequency_penalty=0.2,
            seed=3,
            max_tokens=4,
            stop=("x", "yy"),
        )
    ]


def test_engine_options_arrive(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one of them reaches the configuration; those not given keep the configuration's default."""
    seen: list[EngineConfig] = []

    class Stop(Exception):
        pass

    def spy(self: Engine, config: EngineConfig) -> None:
        seen.append(config)
        raise Stop

    monkeypatch.setattr(Engine, "__init__", spy)
    given = (
        "--tokenizer t --device cpu --dtype bfloat16 --max-num-seqs 3 --max-model-len 50 --block-size 32 "
        "--gpu-memory-utilization 0.5 --num-gpu-blocks 77 --max-prefill-tokens 64 --preemption swap "
        "--load-format dummy"
    )
    for arguments in (given.split(), []):
        with pytest.raises(Stop):
            main(["generate", "x", "--model", "m", *arguments])
    assert seen[0] == EngineConfig(
        model="m", tokenizer="t", device="cpu", dtype="bfloat16", max_num_seqs=3, max_model_len=50, block_size=32,
        gpu_memory_utilization=0.5, num_gpu_blocks=77, max_prefill_tokens=64, preemption="swap", load_format="dummy",
    )  # fmt: skip
    assert seen[1] == EngineConfig(model="m", max_num_seqs=16)


def test_chat(
    folder: Path, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Turns from standard input: each answer is one to the whole conversation; an empty line ends it."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nand then?\n\nnot read\n"))
    assert main(["chat", "--system", "be brief", "--max-tokens", "9", *options]) == 0
    out = capsys.readouterr().out
    messages = [{"role": "system", "content": "be brief"}]
    figures = [match for line in out.splitlines() if (match := FIGURES.match(line))]
    assert len(figures) == 2
    for match, text in zip(figures, ("hello", "and then?"), strict=True):
        messages.append({"role": "user", "content": text})
        expected = engine_output(folder, messages)
        assert expected.text in out
        assert match[1] == str(len(expected.prompt_token_ids))
        messages.append({"role": "assistant", "content": expected.text})
    assert int(figures[1][2]) > 0  # the first turn's blocks are found in the prefix cache
    assert "not read" not in out


def test_chat_ends_with_the_input(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-D at once."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["chat", *options]) == 0
    assert FIGURES.search(capsys.readouterr().out) is None


def test_chat_goes_on_after_a_bad_message(
    folder: Path, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that is too long, or no text, is left out of the conversation, and so is one whose answer is interrupted."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"hello\n{'word ' * 200}\n\udcff\nnever mind\nand then?\n"))
    step, calls = Engine.step, []

    def interrupted_once(self: Engine) -> Any:
        calls.append(self.stats().num_finished)
        if calls[-1] == 1 and calls.count(1) == 2:  # the second answer has begun
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Engine, "step", interrupted_once)
    assert main(["chat", "--max-tokens", "9", *options]) == 0
    captured = capsys.readouterr()
    errors = captured.err.splitlines()
    assert len(errors) == 2 and all(line.endswith("(this message is left out)") for line in errors)
    assert "[interrupted: this message is left out]" in captured.out
    monkeypatch.setattr(Engine, "step", step)
    messages: list[dict[str, str]] = []
    for text in ("hello", "and then?"):
        messages.append({"role": "user", "content": text})
        expected = engine_output(folder, messages)
        assert expected.text in captured.out
        messages.append({"role": "assistant", "content": expected.text})


def test_help_shows_defaults_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """0 is a default like any other."""
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "0 takes the most likely token (default: 0.0)" in out
    assert "log the start and the memory plan" in out and "memory plan (default" not in out


def test_info(folder: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Versions, device, the model's facts and its memory plan; nothing is loaded."""
    assert main(["info", *options, "--num-gpu-blocks", "40"]) == 0
    out = capsys.readouterr().out
    for part in (mini_infer.__version__, "torch", "triton", "transformers", "device", "LlamaForCausalLM", str(folder)):
        assert part in out
    assert "1 layers, 8/2 heads of 8, vocabulary 320, at most 512 tokens" in out
    assert "40 blocks of 16 tokens = 640 tokens" in out


def test_info_without_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Says how to get one, and fetches nothing."""
    monkeypatch.setenv("MINI_INFER_HOME", str(tmp_path))
    assert main(["info"]) == 0
    assert "mini-infer download-demo" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


# Errors


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["generate", "x", "--model", "/no/such/folder"], ["ModelNotFoundError", "no model folder at /no/such/folder"]),
        (["info", "--model", "./nothing"], ["ModelNotFoundError", "no model folder at nothing"]),
        (["generate", "x", "--max-model-len", "9999"], ["ConfigError", "max_model_len", "512", "9999"]),
        (["generate", "x", "--max-num-seqs", "0"], ["ConfigError", "max_num_seqs", "at least 1"]),
        (["generate", "x", "--block-size", "12"], ["ConfigError", "block_size", "power of two"]),
        (["generate", "x", "--num-gpu-blocks", "1"], ["OutOfMemoryError", "max_model_len", "num_gpu_blocks"]),
        (["generate", "x", "--temperature", "-1"], ["InvalidRequestError", "temperature"]),
        (["generate", "x", "--max-tokens", "0"], ["InvalidRequestError", "max_tokens"]),
        (["generate", "", "--raw"], ["InvalidRequestError", "empty"]),
        (["generate", "x " * 600, "--raw"], ["InvalidRequestError", "max_model_len=512 allows at most 511"]),
        (["generate", "x", "--raw", "--system", "y"], ["ConfigError", "--raw leaves out"]),
    ],
    ids=lambda value: " ".join(value)[:40] if value[0] in ("generate", "info") else "",
)
def test_errors(folder: Path, arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Status 1, one line on stderr with the kind and the reason, no traceback; no text was generated."""
    if "--model" not in arguments:
        arguments = [*arguments, "--model", str(folder)]
    assert main([*arguments, "--device", "cpu", "--dtype", "float32"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" or arguments[0] == "info"  # which tells of the machine first
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("mini-infer: ")
    for word in words:
        assert word in captured.err


def test_broken_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The library's many lines about a config become one."""
    config = '{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": "many"}'
    (tmp_path / "config.json").write_text(config)
    assert main(["info", "--model", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_failing_request(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error inside the engine is an error of the command too."""

    def fail(*args: object) -> None:
        raise RuntimeError("the device is on fire")

    monkeypatch.setattr("mini_infer.runner.ModelRunner.execute", fail)
    assert main(["generate", "x", "--raw", *options]) == 1
    assert "the device is on fire" in capsys.readouterr().err.splitlines()[-1]


def test_interrupt(options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C: status 130, as a shell expects, and no traceback."""

    def interrupt(self: Engine) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "step", interrupt)
    assert main(["generate", "x", "--raw", *options]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_as_a_command(options: list[str]) -> None:
    """`python -m mini_infer` in a process of its own, into a pipe: the text streams out, no bar or escape code is in
    it; unknown names offline fail quickly on one line."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mini_infer", *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120
        )

    done = run("generate", "the cat", "--raw", "--max-tokens", "5", *options)
    assert done.returncode == 0
    split(done.stdout)
    assert "\r" not in done.stdout + done.stderr
    assert "%|" not in done.stderr
    environment["PYTHONIOENCODING"] = "ascii"  # the text has other characters: they are replaced
    done = run("generate", "the cat \u00e9", "--raw", "--max-tokens", "30", *options)
    assert (done.returncode, done.stderr) == (0, "")
    command = f"{sys.executable} -m mini_infer generate hello --raw --max-tokens 60 {' '.join(options)} | head -c 1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr == ""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "mini_infer", "generate", "hello", "--raw", *options]
    closed = subprocess.run(
        command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, timeout=120
    )
    os.close(writer)
    assert (closed.returncode, closed.stderr) == (141, "")
    done = run("generate", "x", "--model", "nobody/no-such-model", "--device", "cpu")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "ModelNotFoundError: no model 'nobody/no-such-model'" in line
