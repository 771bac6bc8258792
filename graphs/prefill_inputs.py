"""The inputs of a prefill step: chunks of prompts packed end to end, padded to a token bucket, in one flat buffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mini_infer.graphs.state import DecodeState, SamplingRows, to_device
from mini_infer.kernels.common import ALIGNMENT
from mini_infer.kernels.penalties import NO_COUNTS, Penalties
from mini_infer.kernels.row_edit import SAMPLING_FLOATS
from mini_infer.step import PrefillChunk
from mini_infer.typing import NO_ROW


@dataclass(frozen=True, slots=True)
class PrefillInputs:
    """Packed chunks of prompts.

    The padding tokens are sequences too, token 0 at positions 0, 1, ..., whose tables are all null block: ordinary
    tokens to every kernel. Sequences that are not used have no tokens, and come last.

    Attributes:
        token_ids: [num_tokens] int32.
        positions: [num_tokens] int32.
        slot_mapping: [num_tokens] int32, where each token's K/V goes.
        block_tables: [num_seqs, max_blocks] int32.
        context_lens: [num_seqs] int32, tokens including this chunk's; 0 of a sequence that is not used.
        query_start_loc: [num_seqs + 1] int32, where each chunk begins; the last entry is num_tokens.
        last_tokens: [num_seqs] int32, index of each chunk's last token.
        rows: [num_seqs] int32, the decode row that takes the sampled token.
        sampling: How each sequence draws.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    context_lens: Tensor
    query_start_loc: Tensor
    last_tokens: Tensor
    rows: Tensor
    sampling: SamplingRows


class PrefillBuffer:
    """A flat buffer for one token bucket, on the device, and the views of it that a prefill step reads.

    Args:
        num_tokens: The token bucket.
        max_chunks: Most chunks in a step.
        block_size: Tokens per KV cache block.
        max_blocks: Blocks of the longest sequence.
        state: The decode rows that take the sampled tokens; its spare one takes those that no sequence wants.
        device: Where it lives.
        storage: Memory of a larger buffer to live in, where no two are in use at a time. Default: its own.

    Attributes:
        inputs: What the step reads. The views keep their addresses.
        storage: The memory, flat int32.
    """

    def __init__(
        self,
        num_tokens: int,
        max_chunks: int,
        *,
        block_size: int,
        max_blocks: int,
        state: DecodeState,
        device: torch.device,
        storage: Tensor | None = None,
    ) -> None:
        self._num_tokens = num_tokens
        self._block_size = block_size
        self._longest = max_blocks * block_size  # a padding sequence obeys the same limit as any other
        self._spare_row = state.num_rows
        num_seqs = max_chunks + -(-num_tokens // self._longest)
        self._shapes: dict[str, tuple[int, ...]] = {
            "seeds": (num_seqs, 2),
            "token_ids": (num_tokens,),
            "positions": (num_tokens,),
            "slot_mapping": (num_tokens,),
            "block_tables": (num_seqs, max_blocks),
            "context_lens": (num_seqs,),
            "query_start_loc": (num_seqs + 1,),
            "last_tokens": (num_seqs,),
            "rows": (num_seqs,),
            "top_k": (num_seqs,),
            "count_rows": (num_seqs,),
            **dict.fromkeys(SAMPLING_FLOATS, (num_seqs,)),
        }
        _, _, self._size, _ = self._sections()[-1]
        if storage is None:
            storage = torch.zeros(self._size, dtype=torch.int32, device=device)
        self.storage = storage[: self._size]
        views = {name: self.storage[begin:end].view(shape) for name, begin, end, shape in self._sections()}
        self.inputs = PrefillInputs(
            token_ids=views["token_ids"],
            positions=views["positions"],
            slot_mapping=views["slot_mapping"],
            block_tables=views["block_tables"],
            context_lens=views["context_lens"],
            query_start_loc=views["query_start_loc"],
            last_tokens=views["last_tokens"],
            rows=views["rows"],
            sampling=SamplingRows(
                temperature=views["temperature"].view(torch.float32),
                top_k=views["top_k"],
                top_p=views["top_p"].view(torch.float32),
                min_p=views["min_p"].view(torch.float32),
                seeds=views["seeds"].view(torch.int64)[:, 0],
                penalties=Penalties(
                    views["repetition_penalty"].view(torch.float32),
                    views["presence_penalty"].view(torch.float32),
                    views["frequency_penalty"].view(torch.float32),
                    views["count_rows"],
                    state.token_counts,
                ),
            ),
        )

    def fill(self, chunks: Sequence[PrefillChunk]) -> None:
        """Lay the chunks end to end, padding after them, and send everything in one copy."""
        flat = np.zeros(self._size, dtype=np.int32)
        host = {name: flat[begin:end].reshape(shape) for name, begin, end, shape in self._sections()}
        host["rows"][:] = self._spare_row
        host["top_k"][:] = -1
        for name in ("top_p", "repetition_penalty"):
            host[name].view(np.float32)[:] = 1.0
        host["count_rows"][:] = NO_COUNTS
        begin = 0
        for index, chunk in enumerate(chunks):
            end = begin + len(chunk.token_ids)
            host["token_ids"][begin:end] = chunk.token_ids
            host["block_tables"][index, : len(chunk.block_table)] = chunk.block_table
            host["rows"][index] = self._spare_row if chunk.row == NO_ROW else chunk.row
            host["top_k"][index] = chunk.sampling.top_k
            for name in SAMPLING_FLOATS:
                host[name].view(np.float32)[index] = getattr(chunk.sampling, name)
            if chunk.row != NO_ROW and chunk.sampling.has_penalties:
                host["count_rows"][index] = chunk.row
            host["seeds"].view(np.int64)[index] = chunk.seed
            self._lay_out(host, index, begin, end, chunk.start)
            begin = end
        index = len(chunks)
        while begin < self._num_tokens:
            end = min(begin + self._longest, self._num_tokens)
            self._lay_out(host, index, begin, end, 0)
            index, begin = index + 1, end
        host["query_start_loc"][index:] = self._num_tokens
        host["last_tokens"][index:] = self._num_tokens - 1
        self.storage.copy_(to_device(flat, self.storage.device))

    def _lay_out(self, host: dict[str, np.ndarray], index: int, begin: int, end: int, start: int) -> None:
        """Sequence ``index`` has tokens ``begin`` to ``end``, the first of them at position ``start``."""
        positions = np.arange(start, start + end - begin, dtype=np.int32)
        blocks = host["block_tables"][index][positions // self._block_size]
        host["positions"][begin:end] = positions
        host["slot_mapping"][begin:end] = blocks * self._block_size + positions % self._block_size
        host["context_lens"][index] = start + end - begin
        host["query_start_loc"][index] = begin
        host["last_tokens"][index] = end - 1

    def _sections(self) -> list[tuple[str, int, int, tuple[int, ...]]]:
        """(name, begin, end, shape) of each part of the flat buffer. They are aligned, so that the kernels that were
        compiled for one bucket do for all."""
        sections, end, aligned = [], 0, ALIGNMENT // np.dtype(np.int32).itemsize
        for name, shape in self._shapes.items():
            begin = -(-end // aligned) * aligned
            end = begin + int(np.prod(shape))
            sections.append((name, begin, end, shape))
        return sections
