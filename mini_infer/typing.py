"""Names shared by every part of the engine. Imports the standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

TokenIds: TypeAlias = list[int]
"""Token ids of one sequence, in order."""

BlockTable: TypeAlias = list[int]
"""KV cache block ids of one sequence: token ``i`` lives in ``table[i // block_size]`` at offset ``i % block_size``."""

NULL_BLOCK = 0
"""The block that padded rows read and write. It is never handed out, never hashed, never freed."""

NO_ROW = -1
"""The row of a sequence that is not decoding."""


@dataclass(frozen=True, slots=True)
class SequenceMetadata:
    """A snapshot of one sequence as the scheduler sees it.

    Attributes:
        request_id: The request that the sequence belongs to.
        row: Its row in the decode batch, or ``NO_ROW`` while it is not decoding.
        num_tokens: Prompt and generated tokens, those still being computed included.
        num_computed_tokens: Tokens whose K/V is written once every launched step has run.
        block_table: Ids of the KV cache blocks that hold it, in token order.
    """

    request_id: str
    row: int
    num_tokens: int
    num_computed_tokens: int
    block_table: BlockTable
