"""Compiles kernels many at a time, before they are needed.

Triton compiles a kernel, and what launches it, at its first launch, on one core, while the launch waits. Within
`compile_ahead` launches only ask for the compilation, which goes on in other threads: most of it releases Python's
global lock. A launch that follows finds its kernel in memory.
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from triton import AsyncCompileMode
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from mini_infer.kernels.common import INTERPRET

_MOST_THREADS = 16
"""Building the IR takes an eighth of the time and holds the lock: more threads would wait for one another."""

_compiles_only: ContextVar[bool] = ContextVar("compiles_only", default=False)
_one_at_a_time = threading.Lock()


def compiles_only() -> bool:
    """Whether launches by this thread only compile."""
    return _compiles_only.get()


@contextmanager
def compile_ahead(progress: Callable[[int, int], object] = lambda done, total: None) -> Iterator[None]:
    """Launches of Triton kernels by this thread compile, and launch nothing; at the end all kernels are compiled.

    Whatever else this thread does is done, so that what the kernels would have written has no meaning: it must not be
    used as an index or a length. Other threads launch as ever, and their next `compile_ahead` waits for this one. A
    kernel that does not compile is left out: its next launch compiles it again, and raises the error. If the body
    raises, what is not begun is not compiled.

    Args:
        progress: Called with the numbers of kernels that are done and of all, whenever one is done, once the body is
            through.
    """
    assert not INTERPRET, "the interpreter compiles nothing: it would run the kernels"
    threads = min(len(os.sched_getaffinity(0)), _MOST_THREADS)
    with _one_at_a_time, ThreadPoolExecutor(threads, thread_name_prefix="compile") as pool:
        try:
            with _Compilations(pool) as compilations:
                with _no_launches():
                    yield
                compilations.finish(progress)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Compilations(AsyncCompileMode):  # type: ignore[misc]
    """Triton's mode, but a launch gets nothing in place of the kernel that is being compiled.

    Triton's own gives promises of kernels, which depending on its version stay in its cache when the kernel is there,
    or never will be, and end the mode at the first one that fails.
    """

    def __init__(self, executor: Executor) -> None:
        super().__init__(executor)
        self._kernels: dict[str, tuple[Future[Any], Callable[[Any], None]]] = {}

    def submit(self, key: str, compile_fn: Callable[[], Any], finalize_fn: Callable[[Any], None]) -> None:
        """Begin to compile a kernel, unless that is begun already. ``finalize_fn`` puts it where launches find it."""
        if key not in self._kernels:
            self._kernels[key] = self.executor.submit(_compile_with_launcher, compile_fn), finalize_fn

    def finish(self, progress: Callable[[int, int], object]) -> None:
        """Wait for the kernels."""
        finalizers = dict(self._kernels.values())
        for done, future in enumerate(as_completed(finalizers), 1):
            if future.exception() is None:
                finalizers[future](future.result())
            progress(done, len(finalizers))


def _compile_with_launcher(compile_fn: Callable[[], Any]) -> Any:
    """The kernel, and in Triton's cache what launches it: a C function, which Triton up to 3.6 compiles as well."""
    kernel = compile_fn()
    driver.active.launcher_cls(kernel.src, kernel.metadata)
    return kernel


@contextmanager
def _no_launches() -> Iterator[None]:
    run = JITFunction.run

    def run_or_compile(self: JITFunction[Any], *args: object, warmup: bool, **kwargs: object) -> object:
        return run(self, *args, warmup=warmup or _compiles_only.get(), **kwargs)

    token = _compiles_only.set(True)
    JITFunction.run = run_or_compile
    try:
        yield
    finally:
        JITFunction.run = run
        _compiles_only.reset(token)
