"""Text to token ids and back: a thin layer over the model's own Hugging Face tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mini_infer.exceptions import InvalidRequestError, ModelNotFoundError


class Tokenizer:
    """One model's tokenizer.

    Args:
        tokenizer: A Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, trust_remote_code: bool = False) -> Tokenizer:
        """Load the tokenizer of a model's folder.

        Args:
            folder: Where ``tokenizer.json`` or ``tokenizer.model`` is.
            trust_remote_code: Let the tokenizer run code that the folder brings.

        Raises:
            ModelNotFoundError: there is no tokenizer, or it cannot be read.
        """
        folder = Path(folder)
        names = ("tokenizer.json", "tokenizer.model", "vocab.json")
        if not any((folder / name).is_file() for name in names):
            raise ModelNotFoundError(
                f"{folder} has no tokenizer: looked for {', '.join(names)}. Add one, or name another in `tokenizer`"
            )
        from transformers import AutoTokenizer

        try:
            return cls(AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code))
        except (OSError, ValueError, KeyError, ImportError, json.JSONDecodeError) as error:
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

    @property
    def has_chat_template(self) -> bool:
        """True if the model says how a conversation is laid out."""
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the model puts around one (such as BOS)."""
        token_ids: list[int] = self._tokenizer.encode(text)
        return token_ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

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
        except TemplateError as error:
            raise InvalidRequestError(f"the model's chat template refuses the messages: {error}") from error
        return token_ids


def _check_messages(messages: object) -> None:
    if isinstance(messages, (str, dict)) or not isinstance(messages, Sequence) or not messages:
        raise InvalidRequestError(f"messages must be a non-empty list of turns, got {messages!r}")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InvalidRequestError(f"a message must be {{'role': text, 'content': text}}, got {message!r}")
