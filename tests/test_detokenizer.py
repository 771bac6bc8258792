"""Incremental text: increments join to the whole, no half characters, and stop strings are found wherever they fall."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mini_infer.detokenizer import REPLACEMENT, IncrementalDetokenizer
from mini_infer.tokenizer import Tokenizer
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


@settings(deadline=None, max_examples=300)
@given(any_tokenizer, texts, st.lists(st.integers(1, 4), max_size=8))
def test_text_arrives_whole(name: str, text: str, sizes: list[int]) -> None:
    """The increments of an encoded text join to what decoding everything gives, however the tokens are grouped."""
    tokenizer = TOKENIZERS[name]
    token_ids = tokenizer.encode(text)
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = pushed(detokenizer, token_ids, sizes)
    assert "".join(pieces) == tokenizer.decode(token_ids) == detokenizer.text


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, 319), max_size=20), st.lists(st.integers(1, 4), max_size=8))
def test_any_tokens(token_ids: list[int], sizes: list[int]) -> None:
    """Even tokens that make no text (special ones, lone bytes) join to what decoding everything gives."""
    tokenizer = TOKENIZERS["bytes"]
    assert "".join(pushed(IncrementalDetokenizer(tokenizer), token_ids, sizes)) == tokenizer.decode(token_ids)


@settings(deadline=None, max_examples=500)
@given(any_tokenizer, texts, st.lists(st.text(st.sampled_from("helo é"), min_size=1, max_size=4), max_size=3))
def test_stop_strings(name: str, text: str, stops: list[str]) -> None:
    """The text ends before the earliest stop string that it contains, and nothing past that was ever emitted."""
    tokenizer = TOKENIZERS[name]
    token_ids = tokenizer.encode(text)
    whole = tokenizer.decode(token_ids)
    ends = [whole.find(stop) for stop in stops if stop in whole]
    detokenizer = IncrementalDetokenizer(tokenizer, stops)
    joined = "".join(pushed(detokenizer, token_ids, [1] * len(token_ids)))
    # A stop string ends the text as soon as it is complete; one that begins earlier but ends later comes too late.
    completed = (
        min((whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole) if ends else None
    )
    assert (detokenizer.stopped is not None) == bool(ends)
    if completed is None:
        assert joined == whole
    else:
        assert whole.startswith(joined)
        assert not any(stop in joined for stop in stops)
        assert joined + (detokenizer.stopped or "") == whole[: len(joined) + len(detokenizer.stopped or "")]


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


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_cost_does_not_grow(name: str) -> None:
    """A token is decoded within a short window, however long the text has become."""
    tokenizer = TOKENIZERS[name]
    longest = 0

    class Counting(Tokenizer):
        def decode(self, token_ids, *, skip_special_tokens=True):  # type: ignore[no-untyped-def]
            nonlocal longest
            longest = max(longest, len(token_ids))
            return tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    detokenizer = IncrementalDetokenizer(Counting(None))
    detokenizer.push(tokenizer.encode("hello world ") * 200)
    assert longest <= 8
