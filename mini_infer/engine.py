"""The engine: requests in, text out. One thread drives it, by calling its methods."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeAlias, TypeVar

from tqdm import tqdm

from mini_infer.config import EngineConfig
from mini_infer.exceptions import ConfigError, EngineBusyError, EngineClosedError, InvalidRequestError, describe
from mini_infer.intake import Prompt, RequestIntake, as_batch, require_tokenizer
from mini_infer.metrics import EngineStats
from mini_infer.output_processor import OutputProcessor
from mini_infer.outputs import GenerateOutput, StreamIncrement
from mini_infer.request import Request
from mini_infer.runner import give_back_memory
from mini_infer.sampling import SamplingParams
from mini_infer.startup import EngineParts, assemble
from mini_infer.stats import snapshot
from mini_infer.step_loop import StepLoop
from mini_infer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

GENERATE_MAX_TOKENS = 100

Messages: TypeAlias = Sequence[dict[str, str]]
"""A conversation: {"role": ..., "content": ...} for each turn."""


def _by_one_thread(method: Callable[Concatenate[LLMEngine, P], T]) -> Callable[Concatenate[LLMEngine, P], T]:
    """A method that raises EngineBusyError while another thread is in one."""

    @wraps(method)
    def guarded(self: LLMEngine, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._driving():
            return method(self, *args, **kwargs)

    return guarded


class LLMEngine:
    """An LLM on one device.

    Nothing runs in the background: `generate` and `stream` run steps until they are done, `get_output` and `step`
    run one. Whoever runs steps moves every request along, not just their own. For one thread at a time: a call while
    another thread is in one raises EngineBusyError, and changes nothing.

    Args:
        config: The engine's options.

    Raises:
        ModelNotFoundError, UnsupportedModelError: there is no such model, or it cannot be run.
        ConfigError: options that do not fit the model or the machine.
        OutOfMemoryError: the memory does not hold the weights and one sequence of ``max_model_len``.
    """

    def __init__(self, config: EngineConfig) -> None:
        if not isinstance(config, EngineConfig):
            raise ConfigError(f"LLMEngine takes an EngineConfig(model=...), got {config!r}")
        self.config = config
        self._in_use = threading.RLock()
        parts = assemble(config)
        self._parts: EngineParts | None = parts
        eos_token_ids = parts.files.eos_token_ids
        if parts.tokenizer is not None:  # a model tuned for chat may end its turns with a token that its config lacks
            eos_token_ids |= parts.tokenizer.eos_token_ids
        self._intake = RequestIntake(
            parts.tokenizer,
            vocab_size=parts.files.spec.vocab_size,
            eos_token_ids=eos_token_ids,
            max_model_len=parts.shape.max_model_len,
            seed=config.seed,
        )
        self._processor = OutputProcessor(parts.tokenizer)
        steps_in_flight = config.steps_in_flight or (2 if parts.runner.device.type == "cuda" else 1)
        self._loop: StepLoop | None = StepLoop(parts.scheduler, parts.runner, self._processor, steps_in_flight)

    # Whole generations

    @_by_one_thread
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
            EngineDeadError: the GPU has failed before. If it fails now, the outputs say so.
        """
        scheduler, loop = self._open().scheduler, _opened(self._loop)
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
                loop.add(request)
            with tqdm(
                total=len(requests),
                desc="requests",
                unit="req",
                disable=None if self.config.progress and len(requests) > 1 else True,
            ) as bar:
                while len(outputs) < len(requests):
                    for output in self.step():
                        if output.request_id in wanted:
                            self._processor.take(output.request_id)
                            outputs[output.request_id] = output
                            bar.update()
                    bar.set_postfix_str(f"{scheduler.num_running} running", refresh=False)
        finally:  # an interrupt must not leave requests behind that nobody waits for
            for request in requests:
                if request.request_id not in outputs:
                    loop.forget(request.request_id)
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
        _opened(self._loop)
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

    @_by_one_thread
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
            EngineDeadError: the GPU has failed.
        """
        loop = _opened(self._loop)
        params = SamplingParams() if sampling_params is None else sampling_params
        request = self._intake.make(prompt, _override(params, {"max_tokens": max_tokens}))
        loop.add(request)
        return request.request_id

    @_by_one_thread
    def get_output(self, request_id: str) -> GenerateOutput | None:
        """Fetch a finished request's output, once. If it is not finished, run one step and look again.

        Raises:
            InvalidRequestError: there is no such request, or its output was fetched already.
        """
        _opened(self._loop)
        _check_id(request_id)
        if self._processor.output(request_id) is None:
            if request_id not in self._processor:
                raise _no_request(request_id)
            self.step()
        return self._processor.take(request_id)

    @_by_one_thread
    def abort(self, request_id: str) -> GenerateOutput:
        """Take a request back, whatever its state, and forget it.

        Returns:
            What it had generated, with the finish reason "abort"; a request that was finished already keeps its own.

        Raises:
            InvalidRequestError: there is no such request.
        """
        loop = _opened(self._loop)
        _check_id(request_id)
        loop.abort(request_id)
        output = self._processor.take(request_id)
        if output is None:
            raise _no_request(request_id)
        return output

    @_by_one_thread
    def step(self) -> list[GenerateOutput]:
        """Run one step: launch the next one and read back the oldest, if enough are in flight.

        Returns:
            The outputs of requests that ended. Each is kept until `get_output` or `abort` fetches it.
        """
        return _opened(self._loop).step()

    @property
    def has_unfinished_requests(self) -> bool:
        """True while steps have something to do."""
        return _opened(self._loop).has_work

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
        return snapshot(self._open(), _opened(self._loop))

    @_by_one_thread
    def shutdown(self) -> None:
        """Drop every request and free the device's memory. Further calls raise EngineClosedError."""
        try:
            if self._parts is not None:
                self._parts.runner.synchronize()
            self._drop()
            give_back_memory()
        except RuntimeError as error:  # the GPU has failed: what it has cannot be given back before the process ends
            logger.warning("the engine shuts down on a GPU that has failed (%s)", describe(error))
            self._drop()

    def _drop(self) -> None:
        self._parts = self._loop = None
        self._processor.clear()

    def __enter__(self) -> LLMEngine:
        self._open()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    def _stream(self, request: Request) -> Iterator[StreamIncrement]:
        request_id = request.request_id
        num_characters = num_tokens = 0  # streamed so far
        try:
            with self._driving():
                _opened(self._loop).add(request, streaming=True)
            while request_id in self._processor:
                self.step()
                if request_id in self._processor:
                    increment = self._processor.increment(request_id)
                    num_characters += len(increment.text)
                    num_tokens += len(increment.token_ids)
                    if increment.token_ids:
                        yield increment
            _opened(self._loop)
            output = self._processor.take(request_id)
            if output is None:
                return  # aborted, or fetched by its id: whoever did that has it
            yield StreamIncrement(request_id, output.text[num_characters:], output.token_ids[num_tokens:], output)
        finally:
            self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        """Let nothing be left of a request. The garbage collector may ask for it, in any thread."""
        loop = self._loop
        if loop is None:
            return
        if self._in_use.acquire(blocking=False):
            try:
                loop.forget(request_id)
            finally:
                self._in_use.release()
        else:
            loop.forget_later(request_id)

    @contextmanager
    def _driving(self) -> Iterator[None]:
        """This thread's turn with the engine, which may lie within another one."""
        if not self._in_use.acquire(blocking=False):
            raise EngineBusyError(
                "another thread is using this engine at this moment; call it from one thread, or share a lock around "
                "the calls"
            )
        try:
            yield
        finally:
            self._in_use.release()

    def _open(self) -> EngineParts:
        return _opened(self._parts)


def _opened(part: T | None) -> T:
    if part is None:
        raise EngineClosedError("the engine was shut down; make a new LLMEngine")
    return part


def _check_id(request_id: object) -> None:
    if not isinstance(request_id, str):
        raise InvalidRequestError(f"a request's id is a string, got {request_id!r}")


def _no_request(request_id: str) -> InvalidRequestError:
    return InvalidRequestError(f"no request {request_id!r}, or its output was fetched already")


def _override(params: SamplingParams, arguments: dict[str, Any]) -> SamplingParams:
    """``params`` with the arguments that were given in place of its own."""
    if any(isinstance(value, SamplingParams) for value in arguments.values()):
        raise InvalidRequestError("SamplingParams are not the second argument: pass sampling_params=...")
    if not isinstance(params, SamplingParams):
        raise InvalidRequestError(f"sampling_params must be a SamplingParams, got {params!r}")
    return replace(params, **{name: value for name, value in arguments.items() if value is not None})
