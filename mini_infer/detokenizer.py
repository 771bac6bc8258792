"""Token ids to text as they come: whole characters only, and nothing that may still become a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from mini_infer.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are no character (yet)."""


class IncrementalDetokenizer:
    """The text of one growing sequence.

    What a token adds is the difference between decoding a short window of tokens with it and without it: a decoder may
    treat the first token of a sequence differently (a leading space), and one character may take several tokens.

    Args:
        tokenizer: The model's tokenizer.
        stop: Strings that end the text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._token_ids: list[int] = []
        self._window = 0  # decoding starts here
        self._read = 0  # tokens before this are in _decoded
        self._decoded = 0  # characters that the tokens read so far came to
        self._held = ""  # decoded, but may be the beginning of a stop string
        self._emitted: list[str] = []
        self.stopped: str | None = None

    @property
    def text(self) -> str:
        """Everything emitted so far."""
        return "".join(self._emitted)

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens; returns the text that is certain now. Nothing more comes after a stop string."""
        if self.stopped is not None:
            return ""
        pieces = []
        for token_id in token_ids:
            self._token_ids.append(token_id)
            pieces.append(self._emit(self._decode_new()))
            if self.stopped is not None:
                break
        return "".join(pieces)

    def finish(self) -> str:
        """No more tokens come: returns what was held back."""
        if self.stopped is not None:
            return ""
        # The window's text may differ from the whole's at the very end (bytes that never became a character).
        piece = self._emit(self._tokenizer.decode(self._token_ids)[self._decoded :])
        self._decoded += len(piece)
        if self.stopped is None:
            self._emitted.append(self._held)
            piece, self._held = piece + self._held, ""
        return piece

    def _decode_new(self) -> str:
        """Text of the tokens that were not read yet; empty while it ends within a character."""
        before = self._tokenizer.decode(self._token_ids[self._window : self._read])
        after = self._tokenizer.decode(self._token_ids[self._window :])
        if len(after) <= len(before) or after.endswith(REPLACEMENT):
            return ""
        self._window, self._read = self._read, len(self._token_ids)
        self._decoded += len(after) - len(before)
        return after[len(before) :]

    def _emit(self, piece: str) -> str:
        """Cut at the earliest stop string; else hold back what may become one."""
        text = self._held + piece
        found = min(((text.find(stop), stop) for stop in self._stop if stop in text), default=None)
        if found is not None:
            end, self.stopped = found
            self._held = ""
        else:
            end = len(text) - self._longest_stop_prefix(text)
            self._held = text[end:]
        self._emitted.append(text[:end])
        return text[:end]

    def _longest_stop_prefix(self, text: str) -> int:
        """Length of the longest end of ``text`` that a stop string begins with."""
        longest = max((len(stop) for stop in self._stop), default=0) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
