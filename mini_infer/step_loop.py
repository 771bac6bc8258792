"""Runs steps, and sees every request through to its output, whatever breaks a step off."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from enum import Enum

from mini_infer.exceptions import EngineDeadError, describe
from mini_infer.metrics import StepTime
from mini_infer.output_processor import OutputProcessor
from mini_infer.outputs import GenerateOutput
from mini_infer.request import FinishReason, Request
from mini_infer.runner import ModelRunner, StepHandle
from mini_infer.scheduler import Scheduler
from mini_infer.step import SchedulerOutputs, StepKind
from mini_infer.step_timer import StepLog

logger = logging.getLogger(__name__)


class _Stake(Enum):
    """What has to be put in order if it goes no further from here."""

    ENDS = "ends"
    """Requests that ended may be without their outputs."""
    RECORDS = "records"
    """The scheduler's records, or what the device was told of them, may be half changed."""


class StepLoop:
    """Launches steps ahead, reads them back in order, and has outputs made for the requests that end with them.

    Ctrl-C may come between any two lines, and an error out of any call. So what is at stake is noted before it is
    touched, and put in order before the exception goes on to the caller; by the next call if that is interrupted too.
    Requests whose step is lost end with the error, those that had ended get their outputs, and the others go on.

    Args:
        scheduler: Decides the steps.
        runner: Runs them.
        processor: Makes outputs of requests, and keeps them until they are fetched.
        steps_in_flight: Steps launched before the first one is read back.

    Attributes:
        num_finished: Requests that ended.
        prompt_tokens: Prompt tokens computed.
        cached_prompt_tokens: Prompt tokens of requests that ended which the prefix cache had.
        output_tokens: Tokens of requests that ended.
        num_steps: Steps by kind.
    """

    def __init__(
        self, scheduler: Scheduler, runner: ModelRunner, processor: OutputProcessor, steps_in_flight: int
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._processor = processor
        self._steps_in_flight = steps_in_flight
        self._in_flight: deque[tuple[SchedulerOutputs, StepHandle]] = deque()
        self._at_stake: _Stake | SchedulerOutputs | None = None  # outputs: that step may not have been launched
        self._ended: dict[str, None] = {}  # whose outputs `step` returns next, unless they are fetched first
        self._left: deque[str] = deque()  # requests to forget
        self._fault: str | None = None  # what the device died of
        self._log = StepLog()
        self.num_finished = 0
        self.prompt_tokens = 0
        self.cached_prompt_tokens = 0
        self.output_tokens = 0
        self.num_steps = {StepKind.PREFILL: 0, StepKind.DECODE: 0}

    @property
    def has_work(self) -> bool:
        """True while `step` has something to do or to return."""
        return self._scheduler.num_unfinished > 0 or self._at_stake is not None or bool(self._unfetched())

    @property
    def step_times(self) -> tuple[StepTime, ...]:
        """Every step that was read back, oldest first, if the runner measures them."""
        return self._log.times

    def add(self, request: Request, *, streaming: bool = False) -> None:
        """Queue a request. If that does not succeed, nothing is left of it.

        Args:
            request: Its id is nobody else's.
            streaming: Its text is needed as it comes.

        Raises:
            InvalidRequestError: the scheduler does not take it.
            EngineDeadError: the device has failed.
        """
        if self._fault is not None:
            raise EngineDeadError(self._fault)
        try:
            self._processor.track(request, streaming=streaming)
            self._scheduler.add(request)
        except BaseException:
            self.forget(request.request_id)
            raise

    def step(self) -> list[GenerateOutput]:
        """Launch the next step, and read back the oldest if enough are in flight.

        An error ends the requests of its step, or all that were begun if the records may be half changed.

        Returns:
            The outputs of requests that ended, now or in a step that was interrupted; but those fetched since.

        Raises:
            BaseException: an interrupt, or an error that belongs to no request.
        """
        if self._at_stake is not None:
            self._settle()
        try:
            self._at_stake = _Stake.RECORDS
            launched = self._launch()
            self._at_stake = _Stake.ENDS
            if self._in_flight and (not launched or len(self._in_flight) >= self._steps_in_flight):
                self._read_back()
            self._forget_those_left()
            self._at_stake = None
        except BaseException as error:
            if not self._settle(error) or not isinstance(error, Exception):
                raise
        outputs = self._unfetched()
        self._ended = {}
        return outputs

    def abort(self, request_id: str) -> None:
        """End a request if it is unfinished, with what it has. The output is there to be fetched."""
        if self._at_stake is not None:
            self._settle()
        request = self._finish(request_id, FinishReason.ABORT)
        if request is not None:
            self._end(request)
        self._at_stake = None

    def forget(self, request_id: str) -> None:
        """Let nothing be left of a request, whatever its state: nobody waits for it any more.

        A stream may be dropped by the garbage collector, in the middle of a step: then this waits for the step's end.
        """
        self.forget_later(request_id)
        if self._at_stake is None:
            self._forget_those_left()
            self._at_stake = None

    def forget_later(self, request_id: str) -> None:
        """As `forget`, at the end of the next step. Any thread may ask for it."""
        self._left.append(request_id)

    # One step

    def _launch(self) -> bool:
        """Launch a step if there is one."""
        outputs = self._scheduler.schedule()
        if not outputs:
            return False
        self.num_steps[outputs.kind] += 1
        if outputs.kind is StepKind.PREFILL:
            self.prompt_tokens += outputs.num_tokens
        self._runner.prepare(outputs)
        self._at_stake = outputs
        self._in_flight.append((outputs, self._runner.execute(outputs)))
        return True

    def _read_back(self) -> None:
        """Wait for the oldest step's tokens, and take them in. Until they are there it stays in flight."""
        outputs, handle = self._in_flight[0]
        try:
            sampled = handle.result()
        except Exception:
            self._at_stake = outputs
            self._in_flight.popleft()
            raise
        self._at_stake = _Stake.RECORDS
        self._in_flight.popleft()
        if handle.span is not None:
            self._log.record(outputs, handle.span)
        changed = self._scheduler.update(outputs, sampled)
        self._at_stake = _Stake.ENDS
        self._hand_over(changed)

    def _hand_over(self, changed: Iterable[Request]) -> None:
        """What became of ``changed``, and of the texts that somebody waits for: those that end get their outputs."""
        ended = []
        for request in changed:
            self._processor.begin(request)
            if request.finished:
                ended.append(request)
        for request in self._processor.advance():
            if not request.finished:
                self._finish(request.request_id, FinishReason.STOP)
                ended.append(request)
        for request in ended:
            self._ended[request.request_id] = None
            self._end(request)

    def _finish(self, request_id: str, reason: FinishReason) -> Request | None:
        self._at_stake = _Stake.RECORDS
        request = self._scheduler.finish(request_id, reason)
        self._at_stake = _Stake.ENDS
        return request

    def _end(self, request: Request) -> None:
        self._processor.end(request)
        self._count(request)

    def _count(self, request: Request) -> None:
        self.num_finished += 1
        self.output_tokens += request.num_known_outputs
        self.cached_prompt_tokens += request.num_cached_tokens

    def _forget_those_left(self) -> None:
        while self._left:
            request = self._finish(self._left[0], FinishReason.ABORT)
            if request is not None:
                self._count(request)
            self._processor.drop(self._left[0])
            self._left.popleft()

    def _unfetched(self) -> list[GenerateOutput]:
        outputs = [self._processor.output(request_id) for request_id in self._ended]
        return [output for output in outputs if output is not None]

    # A step that broke off

    def _settle(self, error: BaseException | None = None) -> bool:
        """Put in order what is at stake. True if the error is told: requests have ended with it.

        Args:
            error: What broke the step off; None: that was an earlier one, which could not be put in order then.
        """
        message = "an earlier step was interrupted" if error is None else describe(error)
        failure = error if isinstance(error, Exception) else None  # an interrupt is the caller's own
        level = logging.INFO if failure is None else logging.ERROR
        if failure is not None and self._fault is None:
            self._fault = self._cause_of_death()
        told = False
        if self._fault is not None:
            self._at_stake = _Stake.RECORDS
            failed = self._scheduler.fail_all(message, waiting_too=True)
            self._in_flight.clear()
            logger.log(level, "%s: %d requests end with it", self._fault, len(failed), exc_info=failure)
            told = bool(failed)
        elif isinstance(self._at_stake, SchedulerOutputs):
            outputs, self._at_stake = self._at_stake, _Stake.RECORDS
            logger.log(level, "step %d failed (%s)", outputs.step, outputs.reason, exc_info=failure)
            self._scheduler.fail(outputs, message)
            told = True
        elif self._at_stake is _Stake.RECORDS:
            failed = self._scheduler.fail_all(message)
            logger.log(level, "a step broke off: %d requests end with it", len(failed), exc_info=failure)
            told = bool(failed)
        self._at_stake = _Stake.ENDS
        self._forget_those_left()
        self._hand_over(self._processor.requests())  # the step's own list of them is lost
        self._at_stake = None
        return told

    def _cause_of_death(self) -> str | None:
        fault = self._runner.fault()
        if fault is None:
            return None
        return f"the GPU has failed, and nothing runs on it in this process any more ({fault}); start a new process"
