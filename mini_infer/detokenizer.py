"""Token ids to text as they come: whole characters only, and nothing that may still become a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from mini_infer.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are no character (yet)."""

MAX_WINDOW = 16
"""Tokens that are decoded again with the next one, before older ones are dropped."""

MAX_UNFINISHED = 8
"""Tokens that may wait for a character to be complete. One takes at most 4, so more are no character."""


class _TextWindow:
    """Decodes a growing sequence; a token costs the decoding of one short window, however long the text is.

    What a token adds is what decoding the last few tokens gives beyond the text that they gave before it: a decoder
    may treat the first token of a sequence differently (a leading space), and one character may take several tokens.

    The library's own ``DecodeStream`` does the same, but raises an error on bytes that are no character, which any
    model may generate.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids
        self._token_ids: list[int] = []
        self._shown = 0  # characters of the window's text that were returned
        self._whole = 0  # tokens of the window that end with a whole character
        self._before = 0  # the same, one advance earlier

    def add(self, token_id: int) -> str:
        """Take in a token; returns the characters that are now complete."""
        if token_id in self._skipped:
            return ""  # no text; left out, so that many of them cost nothing either
        self._token_ids.append(token_id)
        text = self._tokenizer.decode(self._token_ids)
        if text.endswith(REPLACEMENT):
            if len(self._token_ids) - self._whole <= MAX_UNFINISHED:
                return ""
            return self._give_up(text)
        if len(text) <= self._shown:
            if len(self._token_ids) - self._whole > MAX_UNFINISHED:  # ids without a text, of a padded vocabulary
                del self._token_ids[self._whole :]
            return ""
        piece, self._shown = text[self._shown :], len(text)
        self._before, self._whole = self._whole, len(self._token_ids)
        if len(self._token_ids) > MAX_WINDOW:
            self._shrink()
        return piece

    def flush(self) -> str:
        """No more tokens come: returns what never became a character, as the decoder writes it."""
        text = self._tokenizer.decode(self._token_ids)
        piece, self._shown = text[self._shown :], len(text)
        return piece

    def _shrink(self) -> None:
        """Keep the tokens of the last advance: they end with a whole character, and begin with one."""
        self._token_ids = self._token_ids[self._before :]
        self._shown = len(self._tokenizer.decode(self._token_ids))
        self._before, self._whole = 0, len(self._token_ids)

    def _give_up(self, text: str) -> str:
        """Return bytes that are no character. Only the last one's may still become one, and only with 3 others."""
        end = len(text) - 1
        piece = text[self._shown : end]
        kept = 4
        while not (tail := self._tokenizer.decode(self._token_ids[-kept:])).endswith(REPLACEMENT):
            kept += 1  # ends at the latest with all of them
        self._token_ids = self._token_ids[-kept:]
        self._shown = len(tail) - 1
        self._before, self._whole = 0, 0
        return piece


class IncrementalDetokenizer:
    """The text of one growing sequence, special tokens left out.

    The increments join to what decoding the whole sequence gives, cut before the stop string that begins first,
    however the tokens are grouped. One exception: a tokenizer that falls back to bytes (Llama 2, Mistral) takes back
    the characters before a byte that fits nowhere; what was returned stays.

    Args:
        tokenizer: The model's tokenizer.
        stop: Strings that end the text; none is empty.

    Attributes:
        stopped: The stop string that ended the text, or None. Of two that begin at the same place, the shorter one.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._window = _TextWindow(tokenizer)
        self._stop = tuple(stop)
        self._held = ""  # decoded, but may be the beginning of a stop string
        self._emitted: list[str] = []
        self.stopped: str | None = None

    @property
    def text(self) -> str:
        """Everything emitted so far."""
        return "".join(self._emitted)

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens; returns the text that is certain now. Nothing more comes after a stop string."""
        pieces = []
        for token_id in token_ids:
            if self.stopped is not None:
                break
            pieces.append(self._emit(self._window.add(token_id)))
        return "".join(pieces)

    def finish(self) -> str:
        """No more tokens come: returns what was held back."""
        if self.stopped is not None:
            return ""
        return self._emit(self._window.flush(), last=True)

    def _emit(self, piece: str, *, last: bool = False) -> str:
        """Cut at the first stop string; else hold back what may become one, unless nothing more comes."""
        if not piece and not last:
            return ""
        text = self._held + piece
        end = len(text) if last else len(text) - self._longest_stop_prefix(text)
        found = min(((text.find(stop), stop) for stop in self._stop if stop in text), default=None)
        # A stop string that began before the one found, and is not complete yet, goes first if it comes to its end.
        if found is not None and found[0] <= end:
            end, self.stopped = found
        self._held = "" if self.stopped is not None else text[end:]
        self._emitted.append(text[:end])
        return text[:end]

    def _longest_stop_prefix(self, text: str) -> int:
        """Length of the longest end of ``text`` that a stop string begins with, and goes on after."""
        longest = max((len(stop) for stop in self._stop), default=0) - 1
        for length in range(min(longest, len(text)), 0, -1):
            end = text[-length:]
            if any(len(stop) > length and stop.startswith(end) for stop in self._stop):
                return length
        return 0
