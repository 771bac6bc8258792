"""The engine: requests in, text out. One thread drives it, by calling its methods."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeAlias

from tqdm import tqdm

from mini_infer.config import EngineConfig
from mini_infer.exceptions import EngineClosedError, InvalidRequestError
from mini_infer.intake import Prompt, RequestIntake, as_batch, require_tokenizer
from mini_infer.metrics import EngineStats
from mini_infer.output_processor import OutputProcessor
from mini_infer.outputs import GenerateOutput, StreamIncrement
from mini_infer.request import FinishReason, Request
from mini_infer.runner import StepHandle
from mini_infer.sampling import SamplingParams
from mini_infer.startup import EngineParts, assemble
from mini_infer.step import SchedulerOutputs, StepKind
from mini_infer.step_timer import StepLog
from mini_infer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

GENERATE_MAX_TOKENS = 100

Messages: TypeAlias = Sequence[dict[str, str]]
"""A conversation: {"role": ..., "content": ...} for each turn."""


class LLMEngine:
    """An LLM on one device.

    Nothing runs in the background: `generate` and `stream` run steps until they are done, `get_output` and `step`
    run one. Whoever runs steps moves every request along, not just their own. Not safe to call from several threads.

    Args:
        config: The engine's options.

    Raises:
        ModelNotFoundError, UnsupportedModelError: there is no such model, or it cannot be run.
        ConfigError: options that do not fit the model or the machine.
        OutOfMemoryError: the memory does not hold the weights and one sequence of ``max_model_len``.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        parts = assemble(config)
        self._parts: EngineParts | None = parts
        eos_token_ids = parts.files.eos_token_ids
        if not eos_token_ids and parts.tokenizer is not None:
            eos_token_ids = parts.tokenizer.eos_token_ids
        self._intake = RequestIntake(
            parts.tokenizer,
            vocab_size=parts.files.spec.vocab_size,
            eos_token_ids=eos_token_ids,
            max_model_len=parts.shape.max_model_len,
            seed=config.seed,
        )
        self._processor = OutputProcessor(parts.tokenizer)
        self._outputs: dict[str, GenerateOutput] = {}  # finished, not fetched
        self._steps_in_flight = config.steps_in_flight or (2 if parts.runner.device.type == "cuda" else 1)
        self._in_flight: deque[tuple[SchedulerOutputs, StepHandle]] = deque()
        self._step_log = StepLog()
        self._num_finished = 0
        self._tokens = {"prompt": 0, "cached": 0, "output": 0}
        self._steps = {StepKind.PREFILL: 0, StepKind.DECODE: 0}

    # Whole generations

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        *,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[GenerateOutput]:
        """Generate for one prompt or many, and wait until all are done.

        Args:
            prompts: A text, a list of token ids, or a list of either.
            max_tokens: Most tokens to generate for each. Default: 100.
            temperature: 0 is greedy. Default: 1.0.
            top_p: Nucleus sampling threshold. Default: 1.0.
            top_k: Keep the most likely tokens only; -1 keeps all. Default: -1.
            sampling_params: Everything that can be set, for all prompts or one for each. Arguments given beside it
                win over its fields.

        Returns:
            One output for each prompt, in their order. A request that failed inside the engine has the finish reason
            "error".

        Raises:
            InvalidRequestError: a prompt or a parameter is not valid; then nothing was queued.
        """
        parts = self._open()
        batch = as_batch(prompts)
        overrides = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        default = SamplingParams(max_tokens=GENERATE_MAX_TOKENS)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params or default] * len(batch)
        if not isinstance(sampling_params, Sequence):
            raise InvalidRequestError(f"sampling_params must be a SamplingParams or a list, got {sampling_params!r}")
        if len(sampling_params) != len(batch):
            raise InvalidRequestError(f"{len(batch)} prompts, but {len(sampling_params)} sampling_params")
        requests = [
            self._intake.make(prompt, _override(params, overrides))
            for prompt, params in zip(batch, sampling_params, strict=True)
        ]
        wanted = {request.request_id for request in requests}
        outputs: dict[str, GenerateOutput] = {}
        try:
            for request in requests:
                self._queue(request)
            with tqdm(
                total=len(requests),
                desc="requests",
                unit="req",
                disable=None if self.config.progress and len(requests) > 1 else True,
            ) as bar:
                while len(outputs) < len(requests):
                    for output in self.step():
                        if output.request_id in wanted:
                            outputs[output.request_id] = self._outputs.pop(output.request_id)
                            bar.update()
                    bar.set_postfix_str(f"{parts.scheduler.num_running} running", refresh=False)
        finally:  # an interrupt must not leave requests behind that nobody waits for
            for request in requests:
                if request.request_id not in outputs:
                    self._forget(request.request_id)
        return [outputs[request.request_id] for request in requests]

    def chat(
        self,
        messages: Messages,
        max_tokens: int | None = None,
        sampling_params: SamplingParams | None = None,
    ) -> GenerateOutput:
        """Answer a conversation, laid out by the model's own chat template.

        Args:
            messages: ``{"role": ..., "content": ...}`` for each turn.
            max_tokens: Most tokens of the answer; wins over ``sampling_params``. Default: 100.
            sampling_params: How to sample.

        Raises:
            InvalidRequestError: the messages are malformed, or the model has no chat template.
        """
        prompt = require_tokenizer(self.tokenizer).apply_chat_template(messages)
        return self.generate([prompt], max_tokens, sampling_params=sampling_params)[0]

    def stream(
        self,
        prompt: Prompt,
        max_tokens: int | None = None,
        sampling_params: SamplingParams | None = None,
    ) -> Iterator[StreamIncrement]:
        """Generate for one prompt, increment by increment. Leaving the loop early aborts the request.

        Args:
            prompt: A text, or a list of token ids.
            max_tokens: Most tokens to generate; wins over ``sampling_params``. Default: 100.
            sampling_params: How to sample.

        Yields:
            An increment for every step that added text or tokens; the last one carries the whole output. The
            increments' texts joined are the output's text.

        Raises:
            InvalidRequestError: at the call, if the prompt or a parameter is not valid.
        """
        self._open()
        params = SamplingParams(max_tokens=GENERATE_MAX_TOKENS) if sampling_params is None else sampling_params
        request = self._intake.make(prompt, _override(params, {"max_tokens": max_tokens}))
        return self._stream(request)

    def stream_chat(
        self,
        messages: Messages,
        max_tokens: int | None = None,
        sampling_params: SamplingParams | None = None,
    ) -> Iterator[StreamIncrement]:
        """`chat`, increment by increment, as `stream` does it."""
        prompt = require_tokenizer(self.tokenizer).apply_chat_template(messages)
        return self.stream(prompt, max_tokens, sampling_params)

    # Single requests

    def add_request(
        self,
        prompt: Prompt,
        max_tokens: int | None = None,
        sampling_params: SamplingParams | None = None,
    ) -> str:
        """Queue one request; `get_output` fetches its result.

        Args:
            prompt: A text, or a list of token ids.
            max_tokens: Most tokens to generate; wins over ``sampling_params.max_tokens``.
            sampling_params: How to sample. Default: ``SamplingParams()``.

        Returns:
            The request's id.

        Raises:
            InvalidRequestError: the prompt or a parameter is not valid.
        """
        self._open()
        params = SamplingParams() if sampling_params is None else sampling_params
        request = self._intake.make(prompt, _override(params, {"max_tokens": max_tokens}))
        self._queue(request)
        return request.request_id

    def get_output(self, request_id: str) -> GenerateOutput | None:
        """Fetch a finished request's output, once. If it is not finished, run one step and look again.

        Raises:
            InvalidRequestError: there is no such request, or its output was fetched already.
        """
        self._open()
        if request_id not in self._outputs:
            if request_id not in self._processor:
                raise InvalidRequestError(f"no request {request_id!r}, or its output was fetched already")
            self.step()
        return self._outputs.pop(request_id, None)

    def abort(self, request_id: str) -> GenerateOutput:
        """Take a request back, whatever its state, and forget it.

        Returns:
            What it had generated, with the finish reason "abort"; a request that was finished already keeps its own.

        Raises:
            InvalidRequestError: there is no such request.
        """
        scheduler = self._open().scheduler
        request = scheduler.finish(request_id, FinishReason.ABORT)
        if request is not None:
            self._end(request)
        if request_id not in self._outputs:
            raise InvalidRequestError(f"no request {request_id!r}, or its output was fetched already")
        return self._outputs.pop(request_id)

    def step(self) -> list[GenerateOutput]:
        """Run one step: launch the next one and read back the oldest, if enough are in flight.

        Returns:
            The outputs of requests that ended; `get_output` gives them as well.
        """
        parts = self._open()
        outputs = parts.scheduler.schedule()
        ended: list[Request] = []
        if outputs:
            ended += self._launch(parts, outputs)
        if self._in_flight and (not outputs or len(self._in_flight) >= self._steps_in_flight):
            ended += self._read_back(parts)
        return [self._end(request) for request in ended]

    @property
    def has_unfinished_requests(self) -> bool:
        """True while steps have something to do."""
        return self._open().scheduler.num_unfinished > 0

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None for dummy weights of a bare shape."""
        return self._open().tokenizer

    @property
    def has_chat_template(self) -> bool:
        """True if `chat` works with this model."""
        tokenizer = self.tokenizer
        return tokenizer is not None and tokenizer.has_chat_template

    @property
    def max_model_len(self) -> int:
        """Most tokens of one sequence, prompt and output together."""
        return self._open().shape.max_model_len

    def stats(self) -> EngineStats:
        """A snapshot of counts, padding, memory and start-up."""
        parts = self._open()
        scheduler, manager = parts.scheduler, parts.scheduler.block_manager
        return EngineStats(
            num_running=scheduler.num_running,
            num_prefilling=scheduler.num_prefilling,
            num_waiting=scheduler.num_waiting,
            num_finished=self._num_finished,
            prompt_tokens=self._tokens["prompt"],
            cached_prompt_tokens=self._tokens["cached"],
            output_tokens=self._tokens["output"],
            prefill_steps=self._steps[StepKind.PREFILL],
            decode_steps=self._steps[StepKind.DECODE],
            off_graph_steps=parts.runner.off_graph_steps,
            preemptions=dict(scheduler.num_preemptions),
            kv_blocks_used=manager.num_used_blocks,
            kv_blocks_total=manager.num_gpu_blocks,
            kv_blocks_cached=manager.num_cached_blocks,
            decode_buckets=scheduler.decode_padding.by_bucket,
            prefill_buckets=scheduler.prefill_padding.by_bucket,
            decode_padding=scheduler.decode_padding.waste,
            prefill_padding=scheduler.prefill_padding.waste,
            decode_costs=dict(scheduler.decode_buckets.costs),
            prefill_costs=dict(scheduler.prefill_buckets.costs),
            context_ms_per_token=scheduler.context_ms_per_token,
            costs_measured=scheduler.decode_buckets.measured,
            memory=parts.plan,
            graphs=parts.graphs,
            plan_loaded=parts.plan_loaded,
            startup=parts.report,
            step_times=self._step_log.times,
        )

    def shutdown(self) -> None:
        """Drop every request and free the device's memory. Further calls raise EngineClosedError."""
        if self._parts is not None:
            self._parts.runner.synchronize()
        self._parts = None
        self._outputs.clear()
        self._in_flight.clear()

    def __enter__(self) -> LLMEngine:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    # One step

    def _queue(self, request: Request, *, streaming: bool = False) -> None:
        self._open().scheduler.add(request)
        self._processor.track(request, streaming=streaming)

    def _launch(self, parts: EngineParts, outputs: SchedulerOutputs) -> list[Request]:
        """Launch a step. Returns the requests that ended, which are those of a step that failed."""
        self._steps[outputs.kind] += 1
        if outputs.kind is StepKind.PREFILL:
            self._tokens["prompt"] += outputs.num_tokens
        try:
            parts.runner.prepare(outputs)
        except BaseException as error:
            logger.error("step %d could not be prepared (%s)", outputs.step, outputs.reason, exc_info=error)
            return self._failed(parts.scheduler.fail_all(_describe(error)), error)
        try:
            handle = parts.runner.execute(outputs)
        except BaseException as error:
            return self._failed(self._fail(parts, outputs, error), error)
        self._in_flight.append((outputs, handle))
        return []

    def _read_back(self, parts: EngineParts) -> list[Request]:
        """Wait for the oldest step's tokens. Returns the requests that ended with them."""
        outputs, handle = self._in_flight.popleft()
        try:
            sampled = handle.result()
        except Exception as error:
            return self._fail(parts, outputs, error)
        except BaseException:  # an interrupt: the tokens are still there to be read
            self._in_flight.appendleft((outputs, handle))
            raise
        if handle.span is not None:
            self._step_log.record(outputs, handle.span)
        changed = parts.scheduler.update(outputs, sampled)
        for request in changed:
            self._processor.begin(request)
        ended = [request for request in changed if request.finished]
        for request in self._processor.advance():
            if not request.finished:
                parts.scheduler.finish(request.request_id, FinishReason.STOP)
                ended.append(request)
        return ended

    def _fail(self, parts: EngineParts, outputs: SchedulerOutputs, error: BaseException) -> list[Request]:
        """A step could not be run: its requests end with an error, the others go on."""
        logger.error("step %d failed (%s)", outputs.step, outputs.reason, exc_info=error)
        return parts.scheduler.fail(outputs, _describe(error))

    def _failed(self, ended: list[Request], error: BaseException) -> list[Request]:
        """Requests that ended with a step that failed. An interrupt is the caller's: it goes on to them from here."""
        if isinstance(error, Exception):
            return ended
        for request in ended:
            self._end(request)
        raise error

    def _end(self, request: Request) -> GenerateOutput:
        output = self._processor.end(request)
        self._num_finished += 1
        self._tokens["output"] += len(output.token_ids)
        self._tokens["cached"] += output.num_cached_tokens
        self._outputs[output.request_id] = output
        return output

    def _stream(self, request: Request) -> Iterator[StreamIncrement]:
        self._queue(request, streaming=True)
        request_id = request.request_id
        text, num_tokens = "", 0  # streamed so far
        try:
            while request_id in self._processor:
                self.step()
                if request_id in self._processor:
                    increment = self._processor.increment(request_id)
                    text, num_tokens = text + increment.text, num_tokens + len(increment.token_ids)
                    if increment.token_ids:
                        yield increment
            self._open()
            output = self._outputs.pop(request_id, None)
            if output is None:
                return  # aborted, or fetched by its id: whoever did that has it
            yield StreamIncrement(request_id, output.text[len(text) :], output.token_ids[num_tokens:], output)
        finally:
            self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        """Abort a request if it still runs, and drop its output."""
        if self._parts is not None and (request_id in self._processor or request_id in self._outputs):
            self.abort(request_id)

    def _open(self) -> EngineParts:
        if self._parts is None:
            raise EngineClosedError("the engine was shut down; make a new LLMEngine")
        return self._parts


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _override(params: SamplingParams, arguments: dict[str, Any]) -> SamplingParams:
    """``params`` with the arguments that were given in place of its own."""
    if not isinstance(params, SamplingParams):
        raise InvalidRequestError(f"sampling_params must be a SamplingParams, got {params!r}")
    return replace(params, **{name: value for name, value in arguments.items() if value is not None})
