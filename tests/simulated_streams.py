"""Two streams of a GPU, on a CPU: what is launched waits in queues, and a test picks an order that the events allow."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mini_infer.kernels.block_copy  # noqa: F401 - registers its ops


class SimulatedStream:
    """A queue of what was launched: functions, events to set and events to wait for.

    Args:
        interrupt: Called before every launch; may raise.
    """

    def __init__(self, interrupt: Callable[[], None]) -> None:
        self.queue: deque[Callable[[], object] | tuple[str, object]] = deque()
        self._interrupt = interrupt

    def launch(self, item: Callable[[], object] | tuple[str, object]) -> None:
        self._interrupt()
        self.queue.append(item)

    def wait_event(self, event: SimulatedEvent) -> None:
        if event.last is not None:
            self.launch(("wait", event.last))

    def wait_stream(self, other: SimulatedStream) -> None:
        event = SimulatedEvent()
        event.record(other)
        self.wait_event(event)


class SimulatedEvent:
    """As CUDA has them: it may be recorded again, and whoever waits waits for the last record before."""

    def __init__(self) -> None:
        self.last: object | None = None

    def record(self, stream: SimulatedStream) -> None:
        event = object()
        stream.launch(("record", event))
        self.last = event


class SimulatedStreams(TorchDispatchMode):
    """Stands in for a GPU: copies wait in the queue of the current stream until `run` picks one order of them all.

    Attributes:
        launches_left: Launches before an interrupt; None for no interrupt.
    """

    LAUNCHED = (
        torch.ops.aten.copy_.default,
        torch.ops.mini_infer.gather_blocks.default,
        torch.ops.mini_infer.scatter_blocks.default,
    )

    def __init__(self) -> None:
        super().__init__()
        self.main = self.current = SimulatedStream(self._interrupt)
        self.copies = SimulatedStream(self._interrupt)
        self.launches_left: int | None = None

    def _interrupt(self) -> None:
        if self.launches_left == 0:
            self.launches_left = None
            raise KeyboardInterrupt
        if self.launches_left is not None:
            self.launches_left -= 1

    @contextmanager
    def stream(self, stream: SimulatedStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self.LAUNCHED:
            return func(*args, **(kwargs or {}))
        self.current.launch(lambda: func(*args, **(kwargs or {})))
        return args[0] if func is torch.ops.aten.copy_.default else None

    def run(self, prefer: Callable[[], SimulatedStream]) -> None:
        """Run everything, at each point of the preferred stream if it need not wait."""
        done: set[object] = set()
        while self.main.queue or self.copies.queue:
            stream = prefer()
            if not self._step(stream, done):
                assert self._step(self.copies if stream is self.main else self.main, done), "the streams are stuck"

    @staticmethod
    def _step(stream: SimulatedStream, done: set[object]) -> bool:
        if not stream.queue:
            return False
        head = stream.queue[0]
        if isinstance(head, tuple):
            kind, event = head
            if kind == "wait" and event not in done:
                return False
            done.add(event)
        else:
            head()
        stream.queue.popleft()
        return True
