"""Continuous batching: which requests the next step serves, in which bucket. No torch.

A step is one kind of work in one bucket: a prefill step computes chunks of prompts, packed up to a token bucket; a
decode step computes one token for every row. Steps may be scheduled before the tokens of earlier ones are known:
lengths and blocks move at `Scheduler.schedule`, token values arrive at `Scheduler.update`. A sequence that turns out
to have ended is dropped then, with whatever surplus is still in flight for it.

Order is first come, first served. When blocks run out, the latest arrival loses its place: its blocks move to CPU
memory (swap) or are dropped and computed again later (recompute). Whoever lost its place comes back before anybody
who arrived after it, so everybody finishes.

A decode step costs the host the same however many rows there are: what all rows share is kept in arrays (`RowTable`,
`OutputTable`), and only requests to which something happens are touched one by one.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from mini_infer.buckets import BucketTable, PaddingCounter, decode_bucket_sizes, prefill_bucket_sizes
from mini_infer.exceptions import ConfigError, InvalidRequestError, OutOfMemoryError
from mini_infer.memory.block_manager import BlockManager
from mini_infer.output_table import NO_SLOT, OutputTable
from mini_infer.places import Places
from mini_infer.preemption import Preemption
from mini_infer.prefill import PrefillShare, plan_chunks
from mini_infer.request import FinishReason, Request, RequestStatus, check_prompt_length
from mini_infer.step import Members, PrefillChunk, SampledTokens, SchedulerOutputs, StepKind
from mini_infer.typing import NO_ROW, SequenceMetadata

DEFAULT_PREFILL_TOKENS = 2048


class Scheduler:
    """Decides every step and owns every request's state.

    Args:
        max_num_seqs: Most sequences that hold device blocks and decode at once.
        max_model_len: Most tokens of one sequence.
        block_size: Tokens per KV cache block.
        num_gpu_blocks: Device blocks. Default: enough for ``max_num_seqs`` sequences of ``max_model_len``.
        num_cpu_blocks: Blocks in CPU memory for swapped sequences; 0 means that preemption recomputes.
        decode_buckets: Decode step sizes and costs; must reach ``max_num_seqs``. Default: a dense table.
        prefill_buckets: Prefill step sizes and costs; the largest is the most tokens of one step. Default: a dense
            table up to 2048.
        max_prefill_seqs: Most chunks of one prefill step.
        prefill_share: Share of the time that prefill may take while rows decode, in (0, 1]; below 1 there is a decode
            step after every prefill step all the same.
        preemption: "swap", "recompute", or "auto" for the cheaper one.
        swap_ms_per_block: Milliseconds to move one block one way; None takes swapping as the cheaper one.
        enable_prefix_caching: Share full blocks between prompts that begin alike.
        context_ms_per_token: Milliseconds that each token of the rows' contexts adds to a decode step.
        attention_window: The most tokens of a row that any layer attends to; 0 for all.

    Raises:
        ConfigError: a count, a share or a cost out of bounds, an unknown preemption mode, or buckets that do not cover
            ``max_num_seqs``.
        OutOfMemoryError: the blocks cannot hold one sequence of ``max_model_len``.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        *,
        num_gpu_blocks: int | None = None,
        num_cpu_blocks: int = 0,
        decode_buckets: BucketTable | None = None,
        prefill_buckets: BucketTable | None = None,
        max_prefill_seqs: int = 64,
        prefill_share: float = 0.97,
        preemption: str = "auto",
        swap_ms_per_block: float | None = None,
        enable_prefix_caching: bool = True,
        context_ms_per_token: float = 0.0,
        attention_window: int = 0,
    ) -> None:
        for name, value in (
            ("max_num_seqs", max_num_seqs),
            ("max_model_len", max_model_len),
            ("block_size", block_size),
            ("max_prefill_seqs", max_prefill_seqs),
        ):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if not 0 < prefill_share <= 1:
            raise ConfigError(f"prefill_share must be in (0, 1], got {prefill_share}")
        if not 0 <= context_ms_per_token < math.inf:
            raise ConfigError(f"context_ms_per_token must be finite and at least 0, got {context_ms_per_token}")
        if attention_window < 0:
            raise ConfigError(f"attention_window must be at least 0, got {attention_window}")
        blocks_per_seq = -(-max_model_len // block_size)
        if num_gpu_blocks is None:
            num_gpu_blocks = max_num_seqs * blocks_per_seq
        if num_gpu_blocks < blocks_per_seq:
            raise OutOfMemoryError(
                f"{num_gpu_blocks} KV cache blocks of {block_size} tokens cannot hold one sequence of max_model_len="
                f"{max_model_len}, which takes {blocks_per_seq}; lower max_model_len to at most "
                f"{num_gpu_blocks * block_size}, or raise gpu_memory_utilization or num_gpu_blocks"
            )
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.block_manager = BlockManager(
            block_size, num_gpu_blocks, num_cpu_blocks, enable_prefix_caching=enable_prefix_caching
        )
        self.decode_buckets = decode_buckets or BucketTable(decode_bucket_sizes(max_num_seqs), max_num_seqs)
        self.prefill_buckets = prefill_buckets or BucketTable(
            prefill_bucket_sizes(DEFAULT_PREFILL_TOKENS), DEFAULT_PREFILL_TOKENS
        )
        if self.decode_buckets.largest < max_num_seqs:
            raise ConfigError(
                f"decode buckets end at {self.decode_buckets.largest} but max_num_seqs is {max_num_seqs}: "
                "some batches would have no bucket"
            )
        self.decode_padding = PaddingCounter(self.decode_buckets)
        self.prefill_padding = PaddingCounter(self.prefill_buckets)
        self.context_ms_per_token = context_ms_per_token
        self._attention_window = attention_window
        self._max_prefill_seqs = max_prefill_seqs
        self._share = PrefillShare(prefill_share)
        self._requests: dict[str, Request] = {}  # every unfinished one
        self._num_added = 0
        self._outputs = OutputTable(max_num_seqs)
        self._preemption = Preemption(self.block_manager, self.prefill_buckets, preemption, swap_ms_per_block)
        self._places = Places(max_num_seqs, self.block_manager, self._outputs, self._preemption)
        self._num_steps = 0

    # Requests in and out

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InvalidRequestError: an empty prompt, one that leaves no room for a token, or an id that is in use.
        """
        if request.request_id in self._requests:
            raise InvalidRequestError(f"request id {request.request_id!r} is in use")
        check_prompt_length(request.num_prompt_tokens, self.max_model_len)
        request.max_output_tokens = min(request.sampling.max_tokens, self.max_model_len - request.num_prompt_tokens)
        request.arrival = self._num_added
        self._num_added += 1
        self._requests[request.request_id] = request
        self._places.queue.append(request)

    def finish(self, request_id: str, reason: FinishReason, error: str | None = None) -> Request | None:
        """End a request from outside: a stop string, an abort, an error. None if it is not there (any more)."""
        request = self._requests.get(request_id)
        if request is not None:
            self._end(request, reason, error)
        return request

    def fail(self, outputs: SchedulerOutputs, error: str) -> list[Request]:
        """End every request of a step that could not be run; the others go on. Returns those that ended."""
        alive = np.flatnonzero(self._outputs.alive(outputs.members)).tolist()
        failed = [self._requests[outputs.request_ids[index]] for index in alive]
        for request in failed:
            self._end(request, FinishReason.ERROR, error)
        return failed

    def fail_all(self, error: str, *, waiting_too: bool = False) -> list[Request]:
        """End every request that was admitted, since records, copies or row edits were lost; the others go on.

        Args:
            error: What they end with.
            waiting_too: End the others as well: no step can be run any more.

        An exception may have come in the middle of any change, so no record of who has what is believed: all are made
        anew, and the prefix cache is empty. All rows are cleared again, as a lost edit may have left one that decodes
        into blocks it has no more. Steps in flight may still be read back: nobody in them is alive.
        """
        waiting: dict[str, Request] = {}
        lost = []
        for request in self._requests.values():
            if request.status is RequestStatus.WAITING and request.slot == NO_SLOT and not waiting_too:
                waiting[request.request_id] = request
            elif not request.finished:
                lost.append(request)
        for request in lost:
            request.finish(FinishReason.ERROR, error)
            request.leave()
            request.row = NO_ROW
        manager = self.block_manager
        self.block_manager = BlockManager(
            manager.block_size,
            manager.num_gpu_blocks,
            manager.num_cpu_blocks,
            enable_prefix_caching=manager.enable_prefix_caching,
        )
        self._outputs = OutputTable(self._outputs.num_slots)  # as many: steps in flight name them
        self._preemption = self._preemption.anew(self.block_manager)
        self._places = Places(self.max_num_seqs, self.block_manager, self._outputs, self._preemption)
        self._places.rows.clear(self.max_num_seqs)
        self._places.queue.extend(waiting.values())
        self._requests = waiting
        return lost

    @property
    def num_preemptions(self) -> dict[str, int]:
        """How often requests lost their place, by "swap" and "recompute"."""
        return dict(self._preemption.counts)

    @property
    def num_unfinished(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    @property
    def num_running(self) -> int:
        """Rows that decode."""
        return len(self._places.rows)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue, swapped ones included."""
        return len(self._places.queue)

    @property
    def num_prefilling(self) -> int:
        """Requests that have blocks and an incomplete prompt."""
        return len(self._places.prefilling)

    def metadata(self, request_id: str) -> SequenceMetadata:
        """A snapshot of one unfinished request.

        Raises:
            InvalidRequestError: there is no unfinished request of this id.
        """
        request = self._requests.get(request_id)
        if request is None:
            raise InvalidRequestError(f"no unfinished request {request_id!r}")
        on_device = request.status not in (RequestStatus.WAITING, RequestStatus.SWAPPED)
        return SequenceMetadata(
            request_id=request_id,
            row=request.row,
            num_tokens=request.num_tokens,
            num_computed_tokens=request.num_computed_tokens,
            block_table=self.block_manager.table(request_id) if on_device else [],
        )

    # One step

    def schedule(self) -> SchedulerOutputs:
        """Decide the next step. Falsy (idle) when nothing can run before earlier steps are read back."""
        places = self._places
        if not places.rows:
            self._share.reset()
        places.resume_swapped()
        if self._share.is_ahead and self._share.is_decode_due(self._decode_ms()) and places.grow_rows():
            return self._decode_step()
        chunks = plan_chunks(
            places.admitted(), self.prefill_buckets, self.block_manager, max_chunks=self._max_prefill_seqs
        )
        if chunks:
            return self._prefill_step(chunks)
        if places.grow_rows():
            return self._decode_step()
        return SchedulerOutputs(self._num_steps, StepKind.IDLE, reason="nothing to run")

    def update(self, outputs: SchedulerOutputs, sampled: SampledTokens) -> list[Request]:
        """Take in the tokens of a step. Steps come back in the order in which they were scheduled.

        Returns:
            The requests that got their first token with it, and those that ended; the others just go on.

        Raises:
            ValueError: ``sampled`` does not have one entry for each of the step's requests.
        """
        if len(sampled.token_ids) != outputs.num_seqs or len(sampled.logprobs) != outputs.num_seqs:
            raise ValueError(
                f"step {outputs.step} has {outputs.num_seqs} requests, but {len(sampled.token_ids)} tokens"
            )
        if outputs.kind is StepKind.DECODE:
            return self._take_in(outputs.request_ids, outputs.members, sampled)
        self._take_in_chunks(outputs, sampled)
        final = np.flatnonzero([chunk.is_last for chunk in outputs.chunks])
        request_ids = tuple(outputs.request_ids[index] for index in final.tolist())
        return self._take_in(request_ids, outputs.members.select(final), sampled.select(final))

    # Decode

    def _decode_step(self) -> SchedulerOutputs:
        rows = self._places.rows
        request_ids, members = rows.batch
        num_seqs = len(request_ids)
        bucket = self.decode_buckets.bucket(num_seqs)
        outputs = self._step(
            StepKind.DECODE, bucket, request_ids, members, reason=f"{num_seqs} rows decode in bucket {bucket}"
        )
        predicted_ms = self._decode_ms()
        self.decode_padding.count(num_seqs, bucket, predicted_ms)
        self._share.decoded(predicted_ms)
        for request in rows.launch():
            self._places.drain(request)
        return outputs

    def _decode_ms(self) -> float:
        """What a decode step over the present rows is predicted to take. Padded rows have no context to read."""
        rows = self._places.rows
        context = rows.num_context_tokens(self._attention_window)
        return self.decode_buckets.cost(len(rows)) + self.context_ms_per_token * context

    # Prefill

    def _prefill_step(self, chunks: list[PrefillChunk]) -> SchedulerOutputs:
        num_tokens = sum(len(chunk.token_ids) for chunk in chunks)
        bucket = self.prefill_buckets.bucket(num_tokens)
        predicted_ms = self.prefill_buckets.costs[bucket]
        if self._places.rows:
            self._share.prefilled(predicted_ms)
        placed = []
        for chunk in chunks:
            request = self._requests[chunk.request_id]
            request.num_prefilled_tokens = chunk.stop
            request.num_chunks_in_flight += not chunk.is_last
            if chunk.is_last:
                self._places.end_prefill(request)
            placed.append(replace(chunk, row=request.row))
        self.prefill_padding.count(num_tokens, bucket, predicted_ms)
        requests = [self._requests[chunk.request_id] for chunk in placed]
        slots = np.array([request.slot for request in requests], dtype=np.int64)
        outputs = self._step(
            StepKind.PREFILL,
            bucket,
            tuple(chunk.request_id for chunk in placed),
            self._outputs.members(slots),
            chunks=tuple(placed),
            reason=f"{num_tokens} prompt tokens of {len(placed)} requests in bucket {bucket}",
        )
        for request in requests:
            if request.num_output_tokens >= request.max_output_tokens:
                self._places.drain(request)
        return outputs

    # Tokens that come back

    def _take_in(self, request_ids: tuple[str, ...], members: Members, sampled: SampledTokens) -> list[Request]:
        """One more token for each of ``members``; returns those that got their first one, or ended."""
        changed = []
        for index in self._outputs.take_in(members, sampled).tolist():
            request = self._requests[request_ids[index]]
            if np.isnan(sampled.logprobs[index]):
                self._end(request, FinishReason.ERROR, "the model's logits are not finite (NaN)")
            elif sampled.token_ids[index] in request.stop_token_ids:
                self._end(request, FinishReason.STOP)
            elif request.num_known_outputs >= request.max_output_tokens:
                self._end(request, FinishReason.LENGTH)
            elif request.num_known_outputs > 1:
                continue  # it was another request's stop token
            changed.append(request)
        return changed

    def _take_in_chunks(self, outputs: SchedulerOutputs, sampled: SampledTokens) -> None:
        """Chunks of prompts have come back: what they computed is offered to other prompts."""
        is_nan = np.isnan(sampled.logprobs)
        for index in np.flatnonzero(self._outputs.alive(outputs.members)).tolist():
            chunk = outputs.chunks[index]
            request = self._requests[chunk.request_id]
            request.num_chunks_in_flight -= not chunk.is_last
            # A request that lost its blocks while the chunk was in flight has nothing to record; and where there is
            # a NaN, nothing is worth it (each token of the chunk may have one, through 0 * NaN in the attention).
            if request.status not in (RequestStatus.WAITING, RequestStatus.SWAPPED) and not is_nan[index]:
                self.block_manager.cache_prefix(chunk.request_id, request.token_slice, chunk.stop)

    def _end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        # The K/V of one that failed may be NaN, or was never written.
        self._places.remove(request, cache=reason is not FinishReason.ERROR)
        request.finish(reason, error)
        del self._requests[request.request_id]  # last, so that an interrupt loses nobody

    def _step(
        self,
        kind: StepKind,
        bucket: int,
        request_ids: tuple[str, ...],
        members: Members,
        *,
        reason: str,
        chunks: tuple[PrefillChunk, ...] = (),
    ) -> SchedulerOutputs:
        """Number the step, and hand over what has piled up for the runner."""
        self._num_steps += 1
        edits = self._places.rows.take_edits()
        swap_out, swap_in = self._preemption.take_copies()
        return SchedulerOutputs(
            self._num_steps, kind, bucket, request_ids, chunks, edits, swap_out, swap_in, reason, members
        )
