"""Every error that mini_infer raises on purpose.

MiniInferError
├── ConfigError (ValueError)              an option has a value that cannot work
├── ModelNotFoundError (FileNotFoundError) no model where the user said, or it cannot be fetched
├── UnsupportedModelError (ValueError)    an architecture or model option that the engine does not run
├── InvalidRequestError (ValueError)      a request that cannot be served as asked; nothing else is affected
├── OutOfMemoryError (MemoryError)        the memory that was asked for is not there; the message says what to change
├── BlockError (ValueError)               block ids that are not the caller's to free or use
├── EngineClosedError (RuntimeError)      the engine was shut down
├── EngineBusyError (RuntimeError)        another thread is using the engine at this moment
└── EngineDeadError (RuntimeError)        the GPU has failed: nothing runs on it in this process any more
"""

from __future__ import annotations


class MiniInferError(Exception):
    """Root of all errors that the engine raises on purpose."""


class ConfigError(MiniInferError, ValueError):
    """An option has a value that cannot work. The message names the option, the value and the bound."""


class ModelNotFoundError(MiniInferError, FileNotFoundError):
    """There is no model at the given path or name. The message lists what was tried."""


class UnsupportedModelError(MiniInferError, ValueError):
    """The model's architecture, or one of its options, is not supported. The message lists what is."""


class InvalidRequestError(MiniInferError, ValueError):
    """A request cannot be served as asked. Other requests are not affected."""


class OutOfMemoryError(MiniInferError, MemoryError):
    """Not enough memory for what was asked. The message names the options that change it."""


class BlockError(MiniInferError, ValueError):
    """Block ids that are out of range, not allocated, or given twice."""


class EngineClosedError(MiniInferError, RuntimeError):
    """The engine was shut down and takes no more calls."""


class EngineBusyError(MiniInferError, RuntimeError):
    """Another thread is using the engine. Nothing has changed: the same call works once that thread is done."""


class EngineDeadError(MiniInferError, RuntimeError):
    """The GPU has failed for good, as far as this process goes. The message has the first cause."""


def describe(error: BaseException) -> str:
    """An error of any kind in one line, as outputs carry it."""
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
