"""The step loop around a simulated device: nothing is lost wherever a step breaks off."""

from __future__ import annotations

import gc
import linecache
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import mini_infer
from mini_infer.buckets import BucketTable
from mini_infer.exceptions import EngineDeadError, InvalidRequestError
from mini_infer.output_processor import OutputProcessor
from mini_infer.output_table import NO_SLOT
from mini_infer.outputs import GenerateOutput
from mini_infer.request import FinishReason, Request
from mini_infer.sampling import SamplingParams
from mini_infer.scheduler import Scheduler
from mini_infer.step import SampledTokens, SchedulerOutputs, StepKind
from mini_infer.step_loop import StepLoop
from tests.simulated_device import Expected, Reference, SimulatedDevice

PACKAGE = str(Path(mini_infer.__file__).parent)
NUM_STEPS = 40  # more than a case takes
INTERRUPTED = ("KeyboardInterrupt", "an earlier step was interrupted")
OPTIONS: dict[str, Any] = {"max_num_seqs": 4, "block_size": 2, "num_gpu_blocks": 12, "num_cpu_blocks": 6}


class Letters:
    """A tokenizer with a letter for each token."""

    special_token_ids: frozenset[int] = frozenset()

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join("abcdefg"[token_id] for token_id in token_ids)


class Handle:
    span = None

    def __init__(self, sampled: SampledTokens) -> None:
        self.sampled = sampled

    def result(self) -> SampledTokens:
        return self.sampled


class Runner:
    """A simulated device in place of a model."""

    def __init__(self, expected: dict[str, Expected]) -> None:
        self.device = SimulatedDevice(expected, **OPTIONS)
        self.prepare = self.device.prepare
        self.died_of: str | None = None

    def fault(self) -> str | None:
        return self.died_of

    def execute(self, outputs: SchedulerOutputs) -> Handle:
        run = self.device._prefill if outputs.kind is StepKind.PREFILL else self.device._decode
        return Handle(run(outputs))


class Case:
    """A loop, and what its requests must come to."""

    def __init__(self, steps_in_flight: int = 2, preemption: str = "swap") -> None:
        self.expected: dict[str, Expected] = {}
        self.scheduler = Scheduler(
            max_model_len=24,
            decode_buckets=BucketTable([2, 4], 4),
            prefill_buckets=BucketTable([4, 8], 8),
            preemption=preemption,
            prefill_share=1.0,  # all are begun before any is far, so that blocks run out
            **OPTIONS,
        )
        self.processor = OutputProcessor(Letters())  # type: ignore[arg-type]
        self.runner = Runner(self.expected)
        self.loop = StepLoop(self.scheduler, self.runner, self.processor, steps_in_flight)  # type: ignore[arg-type]
        self.texts: dict[str, tuple[str, str]] = {}  # text and finish reason
        self.broke_at = ""  # the line at which it was interrupted
        self.returned: list[str] = []  # whose outputs `step` has returned

    def step(self) -> list[GenerateOutput]:
        outputs = self.loop.step()
        self.returned += [output.request_id for output in outputs]
        return outputs

    def add(
        self, name: str, prompt: Sequence[int], max_tokens: int, *, stop_at: int = 0, streaming: bool = False
    ) -> None:
        """``stop_at``: the text of this token and the next is a stop string."""
        reference = Reference(prompt, max_tokens)
        text = Letters().decode(reference.tokens[len(prompt) :])
        stop = text[stop_at : stop_at + 2] if stop_at else ""
        sampling = SamplingParams(max_tokens=max_tokens, stop=(stop,) if stop else ())
        self.expected[name] = Expected(reference, sampling, seed=len(self.expected))
        self.texts[name] = (text.partition(stop)[0], "stop") if stop else (text, "length")
        request = Request(name, tuple(prompt), sampling, self.expected[name].seed)
        self.loop.add(request, streaming=streaming)

    def add_all(self) -> None:
        """Short and long, sharing prefixes, streamed, with stop strings; more than fit."""
        self.add("one", [1], 1)
        self.add("stopped", [1, 2, 3, 4, 5], 16, stop_at=9)
        self.add("streamed", [1, 2, 3, 4, 6], 14, streaming=True)
        self.add("long", [5, 4, 3, 2, 1, 0, 5, 4, 3, 2, 1, 0], 10)
        self.add("late", [1, 2, 3, 4, 5], 3, streaming=True)
        self.add("last", [2, 2], 5)

    def drive(self) -> Iterator[GenerateOutput]:
        for _ in range(300):
            if not self.loop.has_work:
                return
            yield from self.step()
        raise AssertionError("the loop comes to no end")

    def check(self, output: GenerateOutput, *errors: str) -> None:
        """It is right, or a right beginning that ended with one of ``errors``."""
        reference = self.expected[output.request_id].reference
        generated = reference.tokens[reference.num_prompt_tokens :]
        text, reason = self.texts[output.request_id]
        assert output.token_ids == generated[: len(output.token_ids)]
        if output.finish_reason == "error":
            assert output.error in errors
            assert text.startswith(output.text) or output.text.startswith(text)
        else:
            assert (output.text, output.finish_reason, output.error) == (text, reason, None)

    def check_nothing_is_left(self) -> None:
        while self.loop._in_flight:
            self.step()
        assert not self.loop.has_work
        manager = self.scheduler.block_manager
        manager.check_integrity()
        assert manager.num_used_blocks == 0 and manager.num_free_cpu_blocks == manager.num_cpu_blocks
        for container in (
            self.scheduler._requests,
            self.scheduler._places.queue,
            self.scheduler._places.prefilling,
            self.scheduler._places.rows,
            self.processor._tracked,
            self.processor._watched,
            self.processor._outputs,
            self.loop._left,
        ):
            assert not container
        assert not (self.scheduler._outputs.owners >= 0).any() and not self.scheduler._outputs._stop_tokens

    def check_it_works_on(self) -> None:
        """Two more requests, in blocks that others had."""
        for name in ("after", "after that"):
            self.add(name, [3, 1, 4, 1, 5, 2], 8, streaming=name == "after")
        outputs = list(self.drive())
        assert sorted(output.request_id for output in outputs) == ["after", "after that"]
        for output in outputs:
            self.check(output)
            assert self.processor.take(output.request_id) is output
        self.check_nothing_is_left()


class Lines:
    """Counts the lines of mini_infer that run, and raises an interrupt before one of them."""

    def __init__(self, interrupted: int | None = None) -> None:
        self.interrupted = interrupted
        self.seen: list[tuple[str, int]] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """The collector waits: what it runs of ours, for streams that others have dropped, is no line of the call."""
        gc.disable()
        sys.settrace(self._trace)
        try:
            yield
        finally:
            sys.settrace(None)
            gc.enable()

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.seen.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.seen) - 1 == self.interrupted:
                raise KeyboardInterrupt
        return self._trace


Act = Callable[[Case], object]
"""What is interrupted, of a case under way."""


def run(act: Act, num_steps: int, lines: Lines, **options: Any) -> Case:
    """A case of which ``act`` is watched after so many steps."""
    case = Case(**options)
    case.add_all()
    for _ in range(num_steps):
        case.step()
    with lines.watched():
        act(case)
    return case


def places_to_interrupt(act: Act, steps: Sequence[int], **options: Any) -> list[tuple[int, int]]:
    """(steps before, line's number within ``act``) of the first and the last time that each line runs."""
    found: dict[tuple[str, int], tuple[int, int]] = {}
    last: dict[tuple[str, int], tuple[int, int]] = {}
    for num_steps in steps:
        lines = Lines()
        run(act, num_steps, lines, **options)
        for index, line in enumerate(lines.seen):
            found.setdefault(line, (num_steps, index))
            last[line] = (num_steps, index)
    return sorted({*found.values(), *last.values()})


def interrupt_everywhere(act: Act, steps: Sequence[int], check: Callable[[Case], None], **options: Any) -> int:
    places = places_to_interrupt(act, steps, **options)
    for num_steps, index in places:
        case = Case(**options)
        case.add_all()
        for _ in range(num_steps):
            case.step()
        lines = Lines(index)
        with lines.watched(), pytest.raises(KeyboardInterrupt):
            act(case)
        where = lines.seen[-1]
        case.broke_at = linecache.getline(*where).strip()
        try:
            check(case)
        except BaseException as error:
            raise AssertionError(f"after an interrupt at {where[0]}:{where[1]}, step {num_steps}") from error
    return len(places)


def everybody_gets_an_output(case: Case) -> None:
    list(case.drive())
    assert len(set(case.returned)) == len(case.returned)
    if case.broke_at != "return outputs":  # else they never got to the caller, who can still fetch them
        assert set(case.returned) == set(case.expected)
    for name in case.expected:
        output = case.processor.take(name)
        assert output is not None, f"{name} has no output"
        case.check(output, *INTERRUPTED)
    case.check_nothing_is_left()
    case.check_it_works_on()


def everybody_is_forgotten(case: Case) -> None:
    for name in case.expected:
        case.loop.forget(name)
    case.check_nothing_is_left()
    case.check_it_works_on()


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_the_case_is_a_hard_one(steps_in_flight: int, preemption: str) -> None:
    """Uninterrupted, everything that can happen to a request happens, and all are right."""
    case = Case(steps_in_flight, preemption)
    case.add_all()
    steps = []
    while case.loop.has_work:
        steps.append(case.step())
    assert case.scheduler.num_preemptions[preemption] > 0
    assert len(steps) < NUM_STEPS
    outputs = [output for step in steps for output in step]
    assert sorted(output.request_id for output in outputs) == sorted(case.expected)
    for output in outputs:
        case.check(output)
        case.processor.take(output.request_id)
    assert {output.finish_reason for output in outputs} == {"length", "stop"}
    assert preemption == "swap" or any(output.num_cached_tokens for output in outputs)
    assert (case.loop.num_finished, case.loop.output_tokens) == (6, sum(len(o.token_ids) for o in outputs))
    case.check_nothing_is_left()


@pytest.mark.parametrize("check", [everybody_gets_an_output, everybody_is_forgotten])
@pytest.mark.parametrize(
    "options", [{"preemption": "swap"}, {"preemption": "recompute", "steps_in_flight": 1}], ids=str
)
def test_an_interrupt_at_any_line_of_a_step(options: dict[str, Any], check: Callable[[Case], None]) -> None:
    count = interrupt_everywhere(lambda case: case.step(), range(NUM_STEPS), check, **options)
    assert count > 300


def test_an_interrupt_at_any_line_of_an_abort() -> None:
    """The request goes on if it had not come to that yet; else its output is there to be fetched."""

    def check(case: Case) -> None:
        list(case.drive())
        output = case.processor.take("streamed")
        assert output is not None
        if output.finish_reason != "abort":
            case.check(output, *INTERRUPTED)
        others = [case.processor.take(name) for name in case.expected if name != "streamed"]
        for other in others:
            assert other is not None
            case.check(other, *INTERRUPTED)
        case.check_nothing_is_left()
        case.check_it_works_on()

    assert interrupt_everywhere(lambda case: case.loop.abort("streamed"), range(0, 20, 3), check) > 50


def test_an_interrupt_at_any_line_of_forgetting() -> None:
    """Nothing is left of it after the next step, or it was not forgotten yet."""

    def check(case: Case) -> None:
        list(case.drive())
        case.processor.take("streamed")
        for name in case.expected:
            if name != "streamed":
                output = case.processor.take(name)
                assert output is not None
                case.check(output, *INTERRUPTED)
        case.check_nothing_is_left()
        case.check_it_works_on()

    assert interrupt_everywhere(lambda case: case.loop.forget("streamed"), range(0, 20, 3), check) > 50


def test_an_interrupt_at_any_line_of_adding() -> None:
    """Nothing is left of that one, or all of it is queued; the others do not notice."""

    def check(case: Case) -> None:
        assert {output.request_id for output in case.drive()} <= set(case.expected)
        for name in case.expected:
            output = case.processor.take(name)
            if name == "new":
                assert output is None, "a request that nobody knows of was left behind"
            else:
                assert output is not None
                case.check(output)
        case.check_nothing_is_left()
        case.check_it_works_on()

    act: Act = lambda case: case.add("new", [3, 3, 3], 4, stop_at=1, streaming=True)  # noqa: E731
    assert interrupt_everywhere(act, range(0, 20, 5), check) > 15


# Errors


def fail_once(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, error: BaseException) -> list[Any]:
    """The next call of a method raises in place of running. Returns the list that its arguments will be in."""
    method = getattr(owner, name)
    called_with: list[Any] = []

    def failing(*arguments: Any) -> Any:
        called_with.extend(arguments)
        monkeypatch.setattr(owner, name, method)
        raise error

    monkeypatch.setattr(owner, name, failing)
    return called_with


@pytest.mark.parametrize("num_steps", [1, 4, 9, 14])
@pytest.mark.parametrize("place", ["schedule", "update", "prepare", "execute"])
def test_an_error_ends_those_it_concerns(monkeypatch: pytest.MonkeyPatch, place: str, num_steps: int) -> None:
    """`step` returns them, and raises nothing."""
    case = Case()
    case.add_all()
    outputs = [output for _ in range(num_steps) for output in case.step()]
    owner = case.runner if place in ("prepare", "execute") else case.scheduler
    called_with = fail_once(monkeypatch, owner, place, RuntimeError("fire"))
    begun = {request.request_id for request in case.processor.requests() if request.slot != NO_SLOT}
    failed = case.step()
    assert failed and {output.error for output in failed} == {"RuntimeError: fire"}
    if place == "execute":  # nothing but the step is lost
        assert {output.request_id for output in failed} == set(called_with[0].request_ids)
    else:
        assert {output.request_id for output in failed} >= begun
    outputs += [*failed, *case.drive()]
    assert sorted(output.request_id for output in outputs) == sorted(case.expected)
    for output in outputs:
        case.check(output, "RuntimeError: fire")
        case.processor.take(output.request_id)
    case.check_nothing_is_left()
    case.check_it_works_on()


def test_tokens_that_never_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not asked for again."""
    case = Case()
    case.add_all()
    execute = case.runner.execute

    def failing(outputs: SchedulerOutputs) -> Handle:
        handle = execute(outputs)
        if outputs.step == 7:
            del handle.sampled
        return handle

    monkeypatch.setattr(case.runner, "execute", failing)
    outputs = list(case.drive())
    assert sorted(output.request_id for output in outputs) == sorted(case.expected)
    message = "AttributeError: 'Handle' object has no attribute 'sampled'"
    for output in outputs:
        case.check(output, message)
        case.processor.take(output.request_id)
    assert message in [output.error for output in outputs]
    case.check_nothing_is_left()
    case.check_it_works_on()


def test_an_error_that_ends_nobody_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a step that always fails would be tried for ever."""
    case = Case()
    case.add_all()
    for _ in range(2):
        fail_once(monkeypatch, case.scheduler, "schedule", RuntimeError("fire"))
        with pytest.raises(RuntimeError, match="fire"):
            case.step()
    for output in case.drive():
        case.check(output)
        assert case.processor.take(output.request_id) is output
    case.check_nothing_is_left()


@pytest.mark.parametrize("place", ["advance", "end", "begin"])
def test_an_error_while_outputs_are_made_is_the_callers(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """It belongs to no request, so all of them are right in the end."""
    case = Case()
    case.add_all()
    fail_once(monkeypatch, case.processor, place, RuntimeError("fire"))
    with pytest.raises(RuntimeError, match="fire"):
        list(case.drive())
    list(case.drive())
    for name in case.expected:
        output = case.processor.take(name)
        assert output is not None
        case.check(output)
    case.check_nothing_is_left()


def test_outputs_of_a_step_that_was_interrupted_come_with_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, and not those that were fetched in between."""
    for fetched in (False, True):
        case = Case(steps_in_flight=1)
        case.add("a", [1], 1)
        case.add("b", [2], 1)
        fail_once(monkeypatch, case.processor, "advance", KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            case.step()
        assert case.scheduler.num_unfinished == 0 and case.loop.has_work
        if fetched:
            assert case.processor.take("a") is not None
        assert [output.request_id for output in case.step()] == (["b"] if fetched else ["a", "b"])
        assert not case.loop.has_work and case.step() == []


def test_two_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one while the first one's step is put in order: the next call does it."""
    for second in ("fail_all", "advance"):
        case = Case()
        case.add_all()
        for _ in range(8):
            case.step()
        fail_once(monkeypatch, case.runner, "prepare", KeyboardInterrupt("first"))
        fail_once(monkeypatch, case.scheduler if second == "fail_all" else case.processor, second, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            case.step()
        assert case.loop.has_work
        list(case.drive())
        for name in case.expected:
            output = case.processor.take(name)
            assert output is not None
            case.check(output, *INTERRUPTED, "KeyboardInterrupt: first")
        case.check_nothing_is_left()
        case.check_it_works_on()


def test_a_stream_that_is_dropped_in_the_middle_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector may do that: the step's own records are not touched until it is over."""
    for place in ("schedule", "update", "finish"):
        case = Case()
        case.add_all()
        method = getattr(case.scheduler, place)

        def dropping(*arguments: Any, case: Case = case, method: Any = method) -> Any:
            if "streamed" in case.processor and case.loop.num_steps[StepKind.DECODE] > 3:
                case.loop.forget("streamed")
            return method(*arguments)

        monkeypatch.setattr(case.scheduler, place, dropping)
        outputs = list(case.drive())
        assert sorted(output.request_id for output in outputs) == sorted({*case.expected} - {"streamed"})
        for output in outputs:
            case.check(output)
            assert case.processor.take(output.request_id) is output
        case.check_nothing_is_left()


def test_a_request_that_is_refused_leaves_nothing() -> None:
    case = Case()
    for prompt in ([], [1] * 24):
        with pytest.raises(InvalidRequestError):
            case.loop.add(Request("bad", tuple(prompt), SamplingParams()))
    case.check_nothing_is_left()
    assert case.loop.num_finished == 0


def test_aborting_and_forgetting() -> None:
    """An abort leaves an output, forgetting does not; both count, and both do nothing to an unknown request."""
    case = Case()
    case.add_all()
    for _ in range(6):
        case.step()
    before = case.loop.num_finished
    case.loop.abort("streamed")
    case.loop.forget("stopped")
    for unknown in ("unknown", "streamed", "stopped"):
        case.loop.abort(unknown)
    case.loop.forget("unknown")
    assert case.loop.num_finished == before + 2
    output = case.processor.take("streamed")
    assert output is not None and output.finish_reason == FinishReason.ABORT.value
    assert case.processor.take("stopped") is None
    assert {"streamed", "stopped"}.isdisjoint(output.request_id for output in case.drive())
    for name in case.expected:
        case.processor.take(name)
    case.check_nothing_is_left()


# A device that dies


@pytest.mark.parametrize("steps_in_flight", [1, 2])
@pytest.mark.parametrize("place", ["execute", "prepare", "result"])
def test_a_device_that_dies(place: str, steps_in_flight: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request ends at once with the cause, those that wait too; what had ended stays; new ones are refused."""
    case = Case(steps_in_flight)
    case.add_all()
    while not case.processor.output("one"):
        case.step()
    case.add("waiting", [6, 6, 6, 6], 4)

    def die(*args: object) -> None:
        case.runner.died_of = "AcceleratorError: an illegal memory access was encountered"
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Handle if place == "result" else case.runner, place, die)
    list(case.drive())
    for name in case.expected:
        output = case.processor.take(name)
        assert output is not None
        case.check(output, "RuntimeError: CUDA error: an illegal memory access was encountered")
        assert (output.finish_reason == "error") == (name != "one")
    case.check_nothing_is_left()
    with pytest.raises(EngineDeadError, match=r"any more \(AcceleratorError: .*start a new process"):
        case.add("new", [1, 2], 3)
    case.check_nothing_is_left()
    assert case.step() == []


def test_an_error_that_the_device_survives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The requests of its step end with it, and the loop goes on."""
    case = Case()
    case.add("first", [1, 2, 3], 5)
    with monkeypatch.context() as patch:
        patch.setattr(case.runner, "execute", lambda outputs: 1 / 0)
        assert [output.error for output in case.step()] == ["ZeroDivisionError: division by zero"]
    case.processor.take("first")
    case.check_it_works_on()


def test_interrupts_are_not_logged_as_errors(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever pressed Ctrl-C has the exception; a traceback beside it says nothing more."""
    case = Case()
    case.add_all()
    case.step()

    def interrupt(outputs: SchedulerOutputs) -> Handle:
        raise KeyboardInterrupt

    monkeypatch.setattr(case.runner, "execute", interrupt)
    with caplog.at_level(logging.INFO), pytest.raises(KeyboardInterrupt):
        case.step()
    assert caplog.records and all(record.levelno == logging.INFO and not record.exc_info for record in caplog.records)
