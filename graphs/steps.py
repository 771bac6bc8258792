"""The two kinds of step over static memory: read the inputs, run the model, advance the state, leave the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from mini_infer.graphs.decoder import decode_step, prefill_step
from mini_infer.graphs.kv_cache import KVCache
from mini_infer.graphs.params import Params
from mini_infer.graphs.prefill_inputs import PrefillBuffer, PrefillInputs
from mini_infer.graphs.spec import ModelSpec
from mini_infer.graphs.state import DecodeState
from mini_infer.kernels.common import ALIGNMENT
from mini_infer.step import PrefillChunk


class Steps(Protocol):
    """Runs steps by bucket. The result is [rows, 2] int32: token id, and the bits of its float32 log probability."""

    def decode(self, bucket: int) -> Tensor:
        """One token for rows 0 to ``bucket - 1``."""

    def prefill(self, chunks: Sequence[PrefillChunk], bucket: int) -> Tensor:
        """Compute chunks of prompts; a sampled token goes to its chunk's row."""


class Model:
    """A model with its memory on the device: weights, KV cache and decode state.

    Args:
        spec: The model's static facts.
        params: Its weights.
        kv: The paged KV cache.
        state: The rows that decode.
    """

    def __init__(self, spec: ModelSpec, params: Params, kv: KVCache, state: DecodeState) -> None:
        self.spec = spec
        self.params = params
        self.kv = kv
        self.state = state

    def few_layers(self) -> Model:
        """The model cut down to its last layer and the first of each kind.

        Its steps launch every kernel that the whole model's launch, in a fraction of the time: layers of a kind have
        the same shapes, the same window, and K/V memory of the same alignment.
        """
        kinds = [
            (window, *(cache.data_ptr() % ALIGNMENT for cache in caches))
            for window, caches in zip(self.spec.sliding_windows, self.kv.layers, strict=True)
        ]
        chosen = sorted({*(kinds.index(kind) for kind in kinds), len(kinds) - 1})
        windows = tuple(self.spec.sliding_windows[index] for index in chosen)
        spec = replace(self.spec, num_layers=len(chosen), sliding_windows=windows)
        params = replace(self.params, layers=tuple(self.params.layers[index] for index in chosen))
        return Model(spec, params, self.kv.select(chosen), self.state)

    def run_decode(self, bucket: int) -> Tensor:
        """A decode step on the device alone: nothing of it depends on the host."""
        rows = self.state.rows(bucket)
        return rows.advance(*decode_step(self.spec, self.params, self.kv, rows))

    def run_prefill(self, inputs: PrefillInputs) -> Tensor:
        """A prefill step on the device alone."""
        token_ids, logprobs = prefill_step(self.spec, self.params, self.kv, inputs)
        self.state.token_ids.index_copy_(0, inputs.rows.long(), token_ids)
        return torch.stack((token_ids.int(), logprobs.view(torch.int32)), dim=1)


class EagerSteps:
    """Runs every step op by op: on a CPU, where there is nothing to capture, and on a GPU for comparison.

    Args:
        model: The model and its memory.
        block_size: Tokens per KV cache block.
        max_blocks: Blocks of the longest sequence.
        device: Where to run.
    """

    def __init__(self, model: Model, *, block_size: int, max_blocks: int, device: torch.device) -> None:
        self._model = model
        self._block_size = block_size
        self._max_blocks = max_blocks
        self._device = device

    def decode(self, bucket: int) -> Tensor:
        """One token for rows 0 to ``bucket - 1``."""
        return self._model.run_decode(bucket)

    def prefill(self, chunks: Sequence[PrefillChunk], bucket: int) -> Tensor:
        """Compute chunks of prompts; a sampled token goes to its chunk's row."""
        buffer = PrefillBuffer(
            bucket,
            len(chunks),
            block_size=self._block_size,
            max_blocks=self._max_blocks,
            state=self._model.state,
            device=self._device,
        )
        buffer.fill(chunks)
        return self._model.run_prefill(buffer.inputs)
