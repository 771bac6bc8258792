"""Engines that start on one GPU take turns."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from mini_infer.cache import cache_folder
from mini_infer.exceptions import ConfigError

logger = logging.getLogger(__name__)


@contextmanager
def one_start_at_a_time(device: torch.device) -> Iterator[None]:
    """Waits until no other engine is starting on this GPU, and keeps others waiting meanwhile.

    An engine sees how much memory is free, takes what its steps leave of it, and times them: another that does so at
    the same moment would take its memory for its own, or both would take the same. A process that ends, however it
    does, keeps nobody waiting. Where there is no folder to agree in, nobody waits, which is logged.
    """
    with ExitStack() as stack:
        if device.type == "cuda":
            try:
                gpu = str(torch.cuda.get_device_properties(device).uuid)
                stack.enter_context(_lock(cache_folder() / "starts", gpu))
            except (ConfigError, OSError) as error:
                logger.warning("engines that start on this GPU at the same time may get in each other's way: %s", error)
        yield


@contextmanager
def _lock(folder: Path, name: str) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{name}.lock", mode=0o666)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("waiting for another engine that is starting on this GPU")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
