"""Text to token ids and back: a thin layer over the model's own Hugging Face tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from mini_infer.exceptions import InvalidRequestError, ModelNotFoundError

PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes that take ``tokenizer.json`` as it is and add no rules of their own."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")
"""A folder with one of these has a tokenizer."""


class Tokenizer:
    """One model's tokenizer.

    Args:
        tokenizer: A Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # The library beneath gives the same text in a sixth of the time, and streaming decodes at every token.
        self._backend = getattr(tokenizer, "backend_tokenizer", None)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, trust_remote_code: bool = False) -> Tokenizer:
        """Load the tokenizer of a model's folder.

        Args:
            path: The folder with ``tokenizer.json`` or ``tokenizer.model``.
            trust_remote_code: Let the tokenizer run code that the folder brings.

        Raises:
            ModelNotFoundError: there is no tokenizer, or it cannot be read.
        """
        folder = Path(path)
        check_tokenizer(folder)
        try:
            if _is_plain(folder):
                from transformers import PreTrainedTokenizerFast

                return cls(PreTrainedTokenizerFast.from_pretrained(folder))
            from transformers import AutoTokenizer

            return cls(AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code))
        except Exception as error:  # the library's own reader raises bare ones
            raise ModelNotFoundError(f"the tokenizer in {folder} cannot be read: {error}") from error

    @property
    def vocab_size(self) -> int:
        """Token ids there are, added ones included."""
        return len(self._tokenizer)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The tokenizer's own end-of-sequence token, if it has one."""
        token_id = self._tokenizer.eos_token_id
        return frozenset() if token_id is None else frozenset((int(token_id),))

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """Tokens that `decode` leaves out of the text unless told otherwise."""
        if self._backend is None:
            return frozenset(self._tokenizer.all_special_ids)
        added = self._backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @property
    def has_chat_template(self) -> bool:
        """True if the model says how a conversation is laid out."""
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the model puts around one (such as BOS).

        Raises:
            InvalidRequestError: the text has half a surrogate pair, which is no character.
        """
        _check_text(text)
        token_ids: list[int] = self._tokenizer.encode(text)
        return token_ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids. Bytes that are no character come out as U+FFFD."""
        if self._backend is not None:
            text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        else:
            text = self._tokenizer.decode(
                list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        return text

    def token_text(self, token_id: int) -> str:
        """Text of one token, special ones too. Part of a character comes out as U+FFFD.

        Raises:
            InvalidRequestError: there is no such token.
        """
        if not 0 <= token_id < self.vocab_size:
            raise InvalidRequestError(f"token id must be between 0 and {self.vocab_size - 1}, got {token_id}")
        return self.decode([token_id], skip_special_tokens=False)

    def apply_chat_template(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, laid out as the model was trained, up to where its answer begins.

        Args:
            messages: ``{"role": ..., "content": ...}`` for each turn, oldest first.

        Raises:
            InvalidRequestError: the messages are malformed, the template refuses them, or there is no template.
        """
        if not self.has_chat_template:
            raise InvalidRequestError("this model has no chat template: use generate or stream with a plain prompt")
        _check_messages(messages)
        from jinja2 import TemplateError

        try:
            token_ids: list[int] = self._tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except (TemplateError, ValueError) as error:
            raise InvalidRequestError(f"the model's chat template refuses the messages: {error}") from error
        return token_ids


def check_tokenizer(folder: Path) -> None:
    """See that there is a tokenizer, without reading it.

    Raises:
        ModelNotFoundError: there is none.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelNotFoundError(
            f"{folder} has no tokenizer: looked for {', '.join(TOKENIZER_FILES)}. Add one, or name another in "
            "`tokenizer`"
        )


def _is_plain(folder: Path) -> bool:
    """True if the folder's ``tokenizer.json`` is the whole truth.

    It can then be read at once, in 0.3 s. `AutoTokenizer` ends up with the same, but reads the model's config first:
    another 1.1 s in a process that did not. Other classes change what the file says, so they are left to it.
    """
    config_file = folder / "tokenizer_config.json"
    if not (folder / "tokenizer.json").is_file() or not config_file.is_file() or (folder / "tekken.json").is_file():
        return False
    config = json.loads(config_file.read_text(encoding="utf-8"))
    return config.get("tokenizer_class") in PLAIN_CLASSES and "auto_map" not in config


def _check_messages(messages: object) -> None:
    if isinstance(messages, (str, dict)) or not isinstance(messages, Sequence) or not messages:
        raise InvalidRequestError(f"messages must be a non-empty list of turns, got {messages!r}")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InvalidRequestError(f"a message must be {{'role': text, 'content': text}}, got {message!r}")
        _check_text(message["role"])
        _check_text(message["content"])


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"the text cannot be encoded: {error}") from error
