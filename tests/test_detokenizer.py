"""Incremental text: increments join to the whole, no half characters, and stop strings are found wherever they fall."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mini_infer.detokenizer import MAX_UNFINISHED, MAX_WINDOW, REPLACEMENT, IncrementalDetokenizer
from mini_infer.tokenizer import Tokenizer
from tests.hypothesis_profiles import PROPERTY
from tests.tiny_tokenizers import tiny_byte_level_tokenizer, tiny_metaspace_tokenizer

TOKENIZERS = {
    name: Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>"))
    for name, backend in (("bytes", tiny_byte_level_tokenizer()), ("metaspace", tiny_metaspace_tokenizer()))
}
any_tokenizer = st.sampled_from(sorted(TOKENIZERS))
texts = st.text(st.sampled_from("helo wrd é€😀\n▁12"), max_size=24)


def pushed(detokenizer: IncrementalDetokenizer, token_ids: list[int], sizes: list[int]) -> list[str]:
    """Push token ids in groups of the given sizes, then finish; returns the increments."""
    pieces, begin = [], 0
    for size in [*sizes, len(token_ids)]:
        pieces.append(detokenizer.push(token_ids[begin : begin + size]))
        begin += size
    return [*pieces, detokenizer.finish()]


@PROPERTY
@given(any_tokenizer, texts, st.lists(st.integers(1, 4), max_size=8))
def test_text_arrives_whole(name: str, text: str, sizes: list[int]) -> None:
    """The increments of an encoded text join to what decoding everything gives, however the tokens are grouped."""
    tokenizer = TOKENIZERS[name]
    token_ids = tokenizer.encode(text)
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = pushed(detokenizer, token_ids, sizes)
    assert "".join(pieces) == tokenizer.decode(token_ids) == detokenizer.text


@PROPERTY
@given(st.lists(st.integers(0, 330), max_size=60), st.lists(st.integers(1, 4), max_size=8))
def test_any_tokens(token_ids: list[int], sizes: list[int]) -> None:
    """Tokens that make no text (special ones, ids past the vocabulary) or no character join to the whole, too."""
    tokenizer = TOKENIZERS["bytes"]
    assert "".join(pushed(IncrementalDetokenizer(tokenizer), token_ids, sizes)) == tokenizer.decode(token_ids)


@PROPERTY
@given(st.lists(st.tuples(texts, st.sampled_from([1, 2])), max_size=8), st.lists(st.integers(1, 4), max_size=8))
def test_special_tokens_between(parts: list[tuple[str, int]], sizes: list[int]) -> None:
    """Special tokens anywhere in a text with a meta space and bytes leave no trace."""
    tokenizer = TOKENIZERS["metaspace"]
    token_ids = [token_id for text, special in parts for token_id in (*tokenizer.encode(text), special)]
    assert "".join(pushed(IncrementalDetokenizer(tokenizer), token_ids, sizes)) == tokenizer.decode(token_ids)


@settings(PROPERTY, max_examples=max(500, PROPERTY.max_examples))
@given(
    any_tokenizer,
    texts,
    st.lists(st.text(st.sampled_from("helo é"), min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 4), max_size=8),
)
def test_stop_strings(name: str, text: str, stops: list[str], sizes: list[int]) -> None:
    """The text ends before the stop string that begins first, however the text is cut into tokens and groups."""
    tokenizer = TOKENIZERS[name]
    token_ids = tokenizer.encode(text)
    whole = tokenizer.decode(token_ids)
    first, stop = min(((whole.find(stop), stop) for stop in stops if stop in whole), default=(len(whole), None))
    detokenizer = IncrementalDetokenizer(tokenizer, stops)
    pieces = pushed(detokenizer, token_ids, sizes)
    assert "".join(pieces) == detokenizer.text == whole[:first]
    assert detokenizer.stopped == stop


@pytest.mark.parametrize(
    ("text", "kept", "stopped"),
    [("xabcd", "x", "abcd"), ("xabce", "xa", "b"), ("xab", "xa", "b"), ("xbab", "x", "b"), ("xaabcd", "xa", "abcd")],
)
def test_overlapping_stop_strings(text: str, kept: str, stopped: str) -> None:
    """A stop string inside a longer one waits until it is clear whether the longer one comes to its end."""
    tokenizer = TOKENIZERS["bytes"]
    detokenizer = IncrementalDetokenizer(tokenizer, ["b", "abcd"])
    assert "".join(pushed(detokenizer, tokenizer.encode(text), [1] * len(text))) == kept
    assert detokenizer.stopped == stopped


def test_no_half_character() -> None:
    """The bytes of a character give nothing until the last one is there."""
    tokenizer = TOKENIZERS["bytes"]
    token_ids = tokenizer.encode("😀!")
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = [detokenizer.push([token_id]) for token_id in token_ids]
    assert pieces == ["", "", "", "😀", "!"]


def test_unfinished_character_at_the_end() -> None:
    """What never became a character comes out as the decoder writes it, at the end."""
    tokenizer = TOKENIZERS["bytes"]
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push(tokenizer.encode("é")[:1]) == ""
    assert detokenizer.finish() == REPLACEMENT


def test_held_back_text() -> None:
    """Text that may become a stop string waits, and comes when it turned out not to."""
    tokenizer = TOKENIZERS["bytes"]
    detokenizer = IncrementalDetokenizer(tokenizer, ["wow"])
    assert detokenizer.push(tokenizer.encode("ow w")) == "ow "
    assert detokenizer.push(tokenizer.encode("o")) == ""
    assert detokenizer.push(tokenizer.encode("x")) == "wox"
    assert detokenizer.push(tokenizer.encode("wo")) == ""
    assert detokenizer.finish() == "wo"
    assert detokenizer.stopped is None


def test_nothing_after_a_stop() -> None:
    """Once a stop string came, further tokens change nothing."""
    tokenizer = TOKENIZERS["bytes"]
    detokenizer = IncrementalDetokenizer(tokenizer, ["."])
    assert detokenizer.push(tokenizer.encode("a.b")) == "a"
    assert detokenizer.stopped == "."
    assert detokenizer.push(tokenizer.encode("c")) == detokenizer.finish() == ""
    assert detokenizer.text == "a"


@pytest.mark.parametrize(
    "token_ids",
    [
        pytest.param(TOKENIZERS["bytes"].encode("hello world ") * 200, id="text"),
        pytest.param(TOKENIZERS["bytes"].encode("é")[1:] * 2000, id="no characters"),
        pytest.param(TOKENIZERS["bytes"].encode("\ufffd") * 700, id="the replacement character itself"),
        pytest.param([1] * 2000, id="special"),
        pytest.param([330] * 2000, id="no token"),
    ],
)
def test_cost_does_not_grow(token_ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A token is decoded within a short window, however long the text has become and whatever it is."""
    tokenizer = TOKENIZERS["bytes"]
    whole = tokenizer.decode(token_ids)
    decode, longest = tokenizer.decode, 0

    def counted(window: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(window))
        return decode(window)

    monkeypatch.setattr(tokenizer, "decode", counted)
    assert "".join(pushed(IncrementalDetokenizer(tokenizer), token_ids, [])) == whole
    assert longest <= MAX_WINDOW + MAX_UNFINISHED + 1


def test_bytes_that_fit_nowhere() -> None:
    """A tokenizer that falls back to bytes takes whole characters back; ours stay. Nothing breaks, and text goes on."""
    tokenizer = TOKENIZERS["metaspace"]
    token_ids = [*tokenizer.encode("é"), 3 + 0x80, *tokenizer.encode("hello")[1:]]
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert "".join(pushed(detokenizer, token_ids, [1] * len(token_ids))).endswith("ello")
