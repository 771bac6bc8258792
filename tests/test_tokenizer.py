"""The tokenizer layer: loading, templates, and errors that say what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from mini_infer.exceptions import InvalidRequestError, ModelNotFoundError
from mini_infer.tokenizer import Tokenizer
from tests.tiny_tokenizers import VOCAB_SIZE, save_tiny_tokenizer, tiny_byte_level_tokenizer, tiny_metaspace_tokenizer


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


def test_special_tokens(tokenizer: Tokenizer) -> None:
    """Special tokens are left out of the text unless asked for."""
    token_ids = [0, *tokenizer.encode("hi"), 1]
    assert tokenizer.special_token_ids == {0, 1, 2}
    assert tokenizer.decode(token_ids) == "hi"
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == "<s>hi</s>"


def test_token_text(tokenizer: Tokenizer) -> None:
    """Every token of the vocabulary has a text."""
    assert tokenizer.token_text(1) == "</s>"
    assert tokenizer.token_text(tokenizer.encode("h")[0]) == "h"
    assert all(tokenizer.token_text(token_id) for token_id in range(VOCAB_SIZE))


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE])
def test_token_text_of_no_token(tokenizer: Tokenizer, token_id: int) -> None:
    """An id outside the vocabulary is refused with the bound."""
    with pytest.raises(InvalidRequestError, match="between 0 and 319"):
        tokenizer.token_text(token_id)


@pytest.mark.parametrize("backend", [tiny_byte_level_tokenizer, tiny_metaspace_tokenizer])
def test_equal_to_auto_tokenizer(tmp_path: Path, backend: Callable[[], Backend]) -> None:
    """The quick way of loading gives the ids and texts that the Transformers library's own way gives."""
    save_tiny_tokenizer(tmp_path, backend())
    ours, theirs = Tokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("hello there", "naïve café 東京 😀", " a  b\n", "<s>hi</s>", ""):
        token_ids = theirs.encode(text)
        assert ours.encode(text) == token_ids
        assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True)


def test_beginning_of_sequence(tmp_path: Path) -> None:
    """A text gets the token that the model wants before it; a conversation has it from the template, once."""
    backend = tiny_byte_level_tokenizer()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    save_tiny_tokenizer(tmp_path, backend)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("hi") == [0, *backend.encode("hi", add_special_tokens=False).ids]
    # The template writes one "<s>" before each turn: the user's and the answer's.
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]).count(0) == 2


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


@pytest.mark.parametrize("content", ["{", "[]", '{"version": "1.0"}', '{"added_tokens": [], "model": {"type": "BPE"}}'])
def test_broken(tmp_path: Path, content: str) -> None:
    """A file that is no tokenizer is an error of ours, not a traceback from a library."""
    save_tiny_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelNotFoundError, match="cannot be read"):
        Tokenizer.from_pretrained(tmp_path)


def test_broken_config(tmp_path: Path) -> None:
    """So is a broken tokenizer_config.json."""
    save_tiny_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelNotFoundError, match="cannot be read"):
        Tokenizer.from_pretrained(tmp_path)
