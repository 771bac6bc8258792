"""mini_infer.typing: what users import for annotations, and the two constants that everybody relies on."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest

from mini_infer.typing import NO_ROW, NULL_BLOCK, BlockTable, SequenceMetadata, TokenIds


def test_the_users_imports() -> None:
    assert TokenIds == list[int] and BlockTable == list[int]
    assert [field.name for field in fields(SequenceMetadata)] == [
        "request_id",
        "row",
        "num_tokens",
        "num_computed_tokens",
        "block_table",
    ]


def test_constants() -> None:
    """Kernels and padded rows rely on block 0; -1 is a row for nobody, never a block or a slot."""
    assert NULL_BLOCK == 0 and NO_ROW == -1


def test_metadata_is_a_snapshot() -> None:
    metadata = SequenceMetadata("r", 0, 5, 4, [1, 2])
    with pytest.raises(FrozenInstanceError):
        metadata.row = 1  # type: ignore[misc]
