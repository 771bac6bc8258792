"""The tokenizer layer: loading, templates, and errors that say what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from mini_infer.exceptions import InvalidRequestError, ModelNotFoundError
from mini_infer.tokenizer import Tokenizer
from tests.tiny_tokenizers import VOCAB_SIZE, save_tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tiny_tokenizer(folder)
    return Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "hello there", "naïve café 東京 😀", "a\n\n\tb  c", "<s>not special twice</s>"])
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    """Decoding what was encoded gives the text back, special tokens shown."""
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_facts(tokenizer: Tokenizer) -> None:
    """Vocabulary size and end-of-sequence token are the tokenizer's own."""
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert tokenizer.eos_token_ids == {1}
    assert tokenizer.has_chat_template


def test_chat_template(tokenizer: Tokenizer) -> None:
    """The conversation is laid out by the template, up to where the answer begins."""
    token_ids = tokenizer.apply_chat_template(
        [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    )
    text = tokenizer.decode(token_ids, skip_special_tokens=False)
    assert text == "<s>system: be kind</s><s>user: hi</s><s>assistant: "


@pytest.mark.parametrize(
    "messages", [[], "hi", {"role": "user", "content": "hi"}, ["hi"], [{"role": "user"}], [{"role": 1, "content": "x"}]]
)
def test_malformed_messages(tokenizer: Tokenizer, messages: object) -> None:
    """Messages of the wrong shape are refused with the value."""
    with pytest.raises(InvalidRequestError, match="message"):
        tokenizer.apply_chat_template(messages)  # type: ignore[arg-type]


def test_template_that_refuses(tmp_path: Path) -> None:
    """A template's own complaint reaches the user as an error about the request."""
    save_tiny_tokenizer(tmp_path, chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        Tokenizer.from_pretrained(tmp_path).apply_chat_template([{"role": "user", "content": "hi"}])


def test_no_template(tmp_path: Path) -> None:
    """A model without a template says what to use in its place."""
    save_tiny_tokenizer(tmp_path, chat_template=None)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequestError, match="generate"):
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])


def test_missing(tmp_path: Path) -> None:
    """No tokenizer files: the error names what was looked for."""
    with pytest.raises(ModelNotFoundError, match=r"tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)


def test_broken(tmp_path: Path) -> None:
    """A file that is no tokenizer is an error of ours, not a traceback from a library."""
    save_tiny_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelNotFoundError, match="cannot be read"):
        Tokenizer.from_pretrained(tmp_path)
