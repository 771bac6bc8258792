"""How much memory a process on this machine can still have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def free_cpu_memory(root: Path = ROOT) -> int:
    """Bytes that a new allocation can have without swapping, within the limits of the container that this runs in.

    Args:
        root: Where the file system with /proc and /sys begins.
    """
    return min([_free_on_the_machine(root), *_free_in_groups(root)])


def _free_on_the_machine(root: Path) -> int:
    for name, size in _fields(root / "proc/meminfo"):
        if name == "MemAvailable:":
            return size * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _free_in_groups(root: Path) -> Iterator[int]:
    """What the limits of the process's control groups leave, and of the groups around them. Version 2, then 1."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, limit, usage, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif controllers == "memory":
            mount, limit, usage, cache = (
                root / "sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        group = mount / path.lstrip("/")  # in a container the path may be the host's: then its own group is the mount
        for folder in (group, *group.parents):
            if folder == mount.parent:
                break
            allowed, used = _text(folder / limit).strip(), _text(folder / usage).strip()
            if allowed.isdigit() and used.isdigit():
                given_back = dict(_fields(folder / "memory.stat")).get(cache, 0)  # files that can be read again
                yield max(0, int(allowed) - int(used) + given_back)


def _fields(path: Path) -> Iterator[tuple[str, int]]:
    """(name, number) of each line that begins so."""
    for line in _text(path).splitlines():
        words = line.split()
        if len(words) > 1 and words[1].isdigit():
            yield words[0], int(words[1])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""  # another system, or nothing that is told to this process
