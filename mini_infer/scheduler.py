"""Continuous batching: which requests the next step serves, in which bucket. Pure Python, no torch.

A step is one kind of work in one bucket: a prefill step computes chunks of prompts, packed up to a token bucket; a
decode step computes one token for every row. Steps may be scheduled before the tokens of earlier ones are known:
lengths and blocks move at `Scheduler.schedule`, token values arrive at `Scheduler.update`. A sequence that turns out
to have ended is dropped then, with whatever surplus is still in flight for it.

Order is first come, first served. When blocks run out, the latest arrival loses its place: its blocks move to CPU
memory (swap) or are dropped and computed again later (recompute). Whoever lost its place comes back before anybody
who arrived after it, so everybody finishes.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterator
from dataclasses import replace

from mini_infer.buckets import BucketTable, PaddingCounter, decode_bucket_sizes, prefill_bucket_sizes
from mini_infer.config import PREEMPTION_MODES
from mini_infer.exceptions import ConfigError, InvalidRequestError, OutOfMemoryError
from mini_infer.memory.block_manager import BlockManager
from mini_infer.request import FinishReason, Request, RequestStatus
from mini_infer.rows import RowTable
from mini_infer.step import PrefillChunk, SampledTokens, SchedulerOutputs, StepKind
from mini_infer.typing import SequenceMetadata

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
        prefill_share: Share of the time that prefill may take while rows decode, in (0, 1].
        preemption: "swap", "recompute", or "auto" for the cheaper one.
        swap_ms_per_block: Milliseconds to move one block one way; None takes swapping as the cheaper one.
        enable_prefix_caching: Share full blocks between prompts that begin alike.

    Raises:
        ConfigError: a count or a share out of bounds, an unknown preemption mode, or buckets that do not cover
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
        prefill_share: float = 0.9,
        preemption: str = "auto",
        swap_ms_per_block: float | None = None,
        enable_prefix_caching: bool = True,
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
        if preemption not in PREEMPTION_MODES:
            raise ConfigError(f"preemption must be one of {', '.join(PREEMPTION_MODES)}, got {preemption!r}")
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
        self.num_preemptions = {"swap": 0, "recompute": 0}
        self._max_prefill_seqs = max_prefill_seqs
        self._prefill_share = prefill_share
        self._preemption = preemption
        self._swap_ms_per_block = swap_ms_per_block
        self._requests: dict[str, Request] = {}  # every unfinished one
        self._num_added = 0
        self._queue: list[Request] = []  # WAITING and SWAPPED, by arrival
        self._prefilling: list[Request] = []  # by arrival
        self._rows = RowTable()
        self._swap_out: list[tuple[int, int]] = []
        self._swap_in: list[tuple[int, int]] = []
        self._num_steps = 0
        self._prefill_lead_ms = 0.0  # how far prefill is ahead of its share of the time

    # Requests in and out

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InvalidRequestError: an empty prompt, one that leaves no room for a token, or an id that is in use.
        """
        if request.request_id in self._requests:
            raise InvalidRequestError(f"request id {request.request_id!r} is in use")
        if request.num_prompt_tokens < 1:
            raise InvalidRequestError("the prompt is empty: at least 1 token is needed")
        room = self.max_model_len - request.num_prompt_tokens
        if room < 1:
            raise InvalidRequestError(
                f"the prompt has {request.num_prompt_tokens} tokens, but max_model_len={self.max_model_len} allows at "
                f"most {self.max_model_len - 1}, so that one can be generated; shorten it or raise max_model_len"
            )
        request.max_output_tokens = min(request.sampling.max_tokens, room)
        request.arrival = self._num_added
        self._num_added += 1
        self._requests[request.request_id] = request
        self._queue.append(request)

    def finish(self, request_id: str, reason: FinishReason, error: str | None = None) -> Request | None:
        """End a request from outside: a stop string, an abort, an error. None if it is not there (any more)."""
        request = self._requests.get(request_id)
        if request is not None:
            self._finish(request, reason, error)
        return request

    def fail(self, outputs: SchedulerOutputs, error: str) -> list[Request]:
        """End every request of a step that could not be run; the others go on. Returns those that ended."""
        failed = [self.finish(request_id, FinishReason.ERROR, error) for request_id in outputs.request_ids]
        return [request for request in failed if request is not None]

    def fail_all(self, error: str) -> list[Request]:
        """End every request that has blocks, since copies or row edits were lost; those without go on.

        Swapped ones are among them: the copy that was lost may have been theirs. All rows are cleared again, as a
        lost edit may have left one that decodes into blocks it has no more.
        """
        lost = [r for r in self._requests.values() if r.status is not RequestStatus.WAITING]
        for request in lost:
            self._finish(request, FinishReason.ERROR, error)
        self._rows.clear(self.max_num_seqs)
        return lost

    @property
    def num_unfinished(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    @property
    def num_running(self) -> int:
        """Rows that decode."""
        return len(self._rows)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue, swapped ones included."""
        return len(self._queue)

    @property
    def num_prefilling(self) -> int:
        """Requests that have blocks and an incomplete prompt."""
        return len(self._prefilling)

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
        self._resume_swapped()
        if self._prefill_lead_ms > 0 and self._grow_rows():
            return self._decode_step()
        chunks = self._plan_prefill()
        if chunks:
            return self._prefill_step(chunks)
        if self._grow_rows():
            return self._decode_step()
        return SchedulerOutputs(self._num_steps, StepKind.IDLE, reason="nothing to run")

    def update(self, outputs: SchedulerOutputs, sampled: SampledTokens) -> list[Request]:
        """Take in the tokens of a step. Steps come back in the order in which they were scheduled.

        Returns:
            The requests that got a token; those that ended with it are finished.
        """
        if outputs.kind is StepKind.PREFILL:
            return self._update_prefill(outputs, sampled)
        advanced = []
        for request_id, token_id, logprob in zip(outputs.request_ids, sampled.token_ids, sampled.logprobs, strict=True):
            request = self._requests.get(request_id)
            if request is not None:  # else it ended while this step was in flight
                self._append_token(request, token_id, logprob)
                advanced.append(request)
        return advanced

    def _update_prefill(self, outputs: SchedulerOutputs, sampled: SampledTokens) -> list[Request]:
        advanced = []
        for chunk, token_id, logprob in zip(outputs.chunks, sampled.token_ids, sampled.logprobs, strict=True):
            request = self._requests.get(chunk.request_id)
            if request is None:
                continue
            request.num_chunks_in_flight -= not chunk.is_last
            # A request that lost its blocks while the chunk was in flight has nothing to record; and where there is
            # a NaN, nothing is worth it (each token of the chunk may have one, through 0 * NaN in the attention).
            lost = request.status in (RequestStatus.WAITING, RequestStatus.SWAPPED)
            if not lost and not math.isnan(logprob):
                self.block_manager.cache_prefix(chunk.request_id, request.token_slice, chunk.stop)
            if chunk.is_last:
                self._append_token(request, token_id, logprob)
                advanced.append(request)
        return advanced

    # Decode

    def _decode_step(self) -> SchedulerOutputs:
        num_seqs = len(self._rows)
        bucket = self.decode_buckets.bucket(num_seqs)
        outputs = self._outputs(
            StepKind.DECODE, bucket, self._rows.request_ids, reason=f"{num_seqs} rows decode in bucket {bucket}"
        )
        self.decode_padding.count(num_seqs, bucket)
        spent = self.decode_buckets.costs[bucket]
        self._prefill_lead_ms = max(0.0, self._prefill_lead_ms - spent * self._prefill_share)
        for request in self._rows:
            request.num_computed_tokens = request.num_tokens
            request.num_in_flight += 1
        for request in [r for r in self._rows if r.num_output_tokens >= r.max_output_tokens]:
            self._rows.leave(request)
            request.status = RequestStatus.DRAINING
        return outputs

    def _grow_rows(self) -> bool:
        """Give every row a block for its next token, preempting the latest arrivals if there are too few.

        Returns:
            True if there are rows to decode.
        """
        manager = self.block_manager
        short = [r for r in self._rows if r.num_tokens > manager.capacity(r.request_id)]
        for request in sorted(short, key=lambda r: r.arrival):
            while request.status is RequestStatus.RUNNING:
                added = manager.grow(request.request_id, request.num_tokens)
                if added is None:
                    self._preempt(max([*self._rows, *self._prefilling], key=lambda r: r.arrival))
                    continue
                start = len(manager.table(request.request_id)) - len(added)
                self._rows.extend(request, start, added)
                break
        return bool(self._rows)

    # Prefill

    def _prefill_step(self, chunks: list[PrefillChunk]) -> SchedulerOutputs:
        num_tokens = sum(len(chunk.token_ids) for chunk in chunks)
        bucket = self.prefill_buckets.bucket(num_tokens)
        if self._rows:
            self._prefill_lead_ms += self.prefill_buckets.costs[bucket] * (1 - self._prefill_share)
        placed = []
        for chunk in chunks:
            request = self._requests[chunk.request_id]
            request.num_computed_tokens = chunk.stop
            request.num_chunks_in_flight += not chunk.is_last
            placed.append(self._end_prefill(request, chunk) if chunk.is_last else chunk)
        self.prefill_padding.count(num_tokens, bucket)
        return self._outputs(
            StepKind.PREFILL,
            bucket,
            tuple(chunk.request_id for chunk in placed),
            chunks=tuple(placed),
            reason=f"{num_tokens} prompt tokens of {len(placed)} requests in bucket {bucket}",
        )

    def _end_prefill(self, request: Request, chunk: PrefillChunk) -> PrefillChunk:
        """The prompt is complete with ``chunk``: one token is sampled, and decoding begins if that is not all."""
        self._prefilling.remove(request)
        request.num_in_flight += 1
        if request.num_output_tokens >= request.max_output_tokens:
            request.status = RequestStatus.DRAINING
            return chunk
        self._enter_row(request, token_id=None)
        return replace(chunk, row=request.row)

    def _plan_prefill(self) -> list[PrefillChunk]:
        """Chunks for the next prefill step, oldest first, as many tokens as fill a bucket best."""
        candidates: list[Request] = []
        available = 0
        for request in self._prefill_candidates():
            candidates.append(request)
            available += request.prefill_target - request.num_computed_tokens
            if available >= self.prefill_buckets.largest or len(candidates) == self._max_prefill_seqs:
                break
        if not available:
            return []
        budget = self.prefill_buckets.fill(available)
        chunks = []
        for request in candidates:
            start = request.num_computed_tokens
            stop = min(request.prefill_target, start + budget)
            chunks.append(
                PrefillChunk(
                    request.request_id,
                    start,
                    request.token_slice(start, stop),
                    tuple(self.block_manager.table(request.request_id)),
                    request.sampling,
                    request.seed,
                    is_last=stop == request.prefill_target,
                )
            )
            budget -= stop - start
            if not budget:
                break
        return chunks

    def _prefill_candidates(self) -> Iterator[Request]:
        """Requests with prompt tokens to compute: those begun, then newly admitted ones."""
        yield from list(self._prefilling)
        while self._queue and self._queue[0].status is RequestStatus.WAITING and self._admit(self._queue[0]):
            yield self._queue.pop(0)

    def _admit(self, request: Request) -> bool:
        """Give a waiting request its blocks, if there is room for it now."""
        if request.num_in_flight or request.num_chunks_in_flight or not self._has_seat():
            return False  # steps of its former life must be read back before it begins another
        token_ids = request.known_token_ids()
        cached = self.block_manager.allocate_sequence(request.request_id, token_ids, reserve=len(self._rows))
        if cached is None:
            return False
        if request.num_preemptions == 0:
            request.num_cached_tokens = cached
        request.num_computed_tokens = cached
        request.prefill_target = len(token_ids)
        request.status = RequestStatus.PREFILLING
        self._prefilling.append(request)
        return True

    def _has_seat(self) -> bool:
        return len(self._rows) + len(self._prefilling) < self.max_num_seqs

    # Preemption

    def _preempt(self, request: Request) -> None:
        """Take a request's blocks and its row; it goes back to the queue, in order of arrival."""
        if request.status is RequestStatus.RUNNING:
            self._rows.leave(request)
        else:
            self._prefilling.remove(request)
        request.num_preemptions += 1
        pairs = None
        if self._prefers_swap(request):
            pairs = self.block_manager.swap_out(request.request_id, request.num_computed_tokens)
        if pairs is not None:
            self._swap_out.extend(pairs)
            request.status = RequestStatus.SWAPPED
            self.num_preemptions["swap"] += 1
        else:
            self.block_manager.release(request.request_id)
            request.num_computed_tokens = 0
            request.status = RequestStatus.WAITING
            self.num_preemptions["recompute"] += 1
        insort(self._queue, request, key=lambda r: r.arrival)

    def _prefers_swap(self, request: Request) -> bool:
        if request.status is not RequestStatus.RUNNING or self._preemption == "recompute":
            return False  # a half-computed prompt is begun again: its chunks are cheap next to two copies
        if self._preemption == "swap" or self._swap_ms_per_block is None:
            return True
        swap_ms = 2 * self.block_manager.blocks_for(request.num_computed_tokens) * self._swap_ms_per_block
        return swap_ms < self._prefill_ms(request.num_tokens)

    def _prefill_ms(self, num_tokens: int) -> float:
        """Cost of computing ``num_tokens`` again."""
        full, rest = divmod(num_tokens, self.prefill_buckets.largest)
        cost = full * self.prefill_buckets.costs[self.prefill_buckets.largest]
        return cost + (self.prefill_buckets.cost(rest) if rest else 0.0)

    def _resume_swapped(self) -> None:
        """Bring swapped requests back while they are first in the queue and there is room.

        One block per row stays free, so that nothing is swapped out in the step that swaps in: the copies out run
        first, and could overwrite CPU blocks that are still to be read.
        """
        while self._queue and self._queue[0].status is RequestStatus.SWAPPED and self._has_seat():
            request = self._queue[0]
            if request.num_in_flight:
                return
            pairs = self.block_manager.swap_in(request.request_id, request.num_tokens, reserve=len(self._rows))
            if pairs is None:
                return
            self._queue.pop(0)
            self._swap_in.extend(pairs)
            self._enter_row(request, token_id=request.token_slice(request.num_tokens - 1, request.num_tokens)[0])

    def _enter_row(self, request: Request, token_id: int | None) -> None:
        request.status = RequestStatus.RUNNING
        self._rows.enter(request, self.block_manager.table(request.request_id), token_id)

    # Ends

    def _append_token(self, request: Request, token_id: int, logprob: float) -> None:
        request.num_in_flight -= 1
        if math.isnan(logprob):
            self._finish(request, FinishReason.ERROR, "the model's logits are not finite (NaN)")
            return
        request.output_token_ids.append(token_id)
        request.cumulative_logprob += logprob
        if request.status in (RequestStatus.RUNNING, RequestStatus.DRAINING):
            num_final = request.num_prompt_tokens + len(request.output_token_ids) - 1  # the new token has no K/V yet
            self.block_manager.cache_prefix(request.request_id, request.token_slice, num_final)
        if token_id in request.stop_token_ids:
            self._finish(request, FinishReason.STOP)
        elif len(request.output_token_ids) >= request.max_output_tokens:
            self._finish(request, FinishReason.LENGTH)

    def _finish(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        if request.status is RequestStatus.RUNNING:
            self._rows.leave(request)
        elif request.status is RequestStatus.PREFILLING:
            self._prefilling.remove(request)
        elif request.status in (RequestStatus.WAITING, RequestStatus.SWAPPED):
            self._queue.remove(request)
        if self.block_manager.has(request.request_id):
            self.block_manager.release(request.request_id)
        del self._requests[request.request_id]
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.error = error

    def _outputs(
        self,
        kind: StepKind,
        bucket: int,
        request_ids: tuple[str, ...],
        *,
        reason: str,
        chunks: tuple[PrefillChunk, ...] = (),
    ) -> SchedulerOutputs:
        """Number the step, and hand over what has piled up for the runner."""
        self._num_steps += 1
        outputs = SchedulerOutputs(
            self._num_steps,
            kind,
            bucket,
            request_ids,
            chunks,
            self._rows.take_edits(),
            tuple(self._swap_out),
            tuple(self._swap_in),
            reason,
        )
        self._swap_out, self._swap_in = [], []
        return outputs
