"""What memory there is for a process: of the machine, and within its container's limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from mini_infer.memory.cpu import free_cpu_memory

GIB = 1 << 30


def write(root: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """One with 64 GiB, of which 48 are free."""
    write(tmp_path, {"proc/meminfo": f"MemTotal: {64 << 20} kB\nMemAvailable: {48 << 20} kB\nSwapFree: 7 kB"})
    return tmp_path


def test_it_is_plausible_here() -> None:
    """Bytes, not kilobytes or pages."""
    assert 2**27 < free_cpu_memory() < 2**46


def test_a_machine_without_groups(machine: Path) -> None:
    assert free_cpu_memory(machine) == 48 * GIB


def test_another_system(tmp_path: Path) -> None:
    """Without /proc: half of the memory that there is."""
    assert 2**27 < free_cpu_memory(tmp_path) < 2**46


def test_a_container(machine: Path) -> None:
    """Version 2, its own group as the root: what the limit leaves, and what files keep that can be read again."""
    group = machine / "sys/fs/cgroup"
    write(machine, {"proc/self/cgroup": "0::/"})
    write(group, {"memory.max": "max", "memory.current": 3 * GIB})
    assert free_cpu_memory(machine) == 48 * GIB
    write(group, {"memory.max": 4 * GIB})
    assert free_cpu_memory(machine) == GIB
    write(group, {"memory.stat": f"anon 12\ninactive_file {GIB // 2}\nslab x"})
    assert free_cpu_memory(machine) == GIB + GIB // 2
    write(group, {"memory.current": 5 * GIB})
    assert free_cpu_memory(machine) == 0


def test_the_tightest_group_counts(machine: Path) -> None:
    """Groups lie in each other, and each may have a limit."""
    group = machine / "sys/fs/cgroup/system.slice/engine.service"
    write(machine, {"proc/self/cgroup": "1:cpu:/elsewhere\n0::/system.slice/engine.service"})
    write(group, {"memory.max": 9 * GIB, "memory.current": GIB})
    assert free_cpu_memory(machine) == 8 * GIB
    write(group.parent, {"memory.max": 20 * GIB, "memory.current": 18 * GIB})
    assert free_cpu_memory(machine) == 2 * GIB


def test_version_1(machine: Path) -> None:
    """Files of other names; without a limit a number above all memory. A container may be told its path on the host."""
    group = machine / "sys/fs/cgroup/memory"
    write(machine, {"proc/self/cgroup": "5:cpu,cpuacct:/docker/1a2b\n4:memory:/docker/1a2b"})
    write(group, {"memory.limit_in_bytes": 0x7FFFFFFFFFFFF000, "memory.usage_in_bytes": GIB})
    assert free_cpu_memory(machine) == 48 * GIB
    write(group, {"memory.limit_in_bytes": 6 * GIB, "memory.stat": f"inactive_file 5\ntotal_inactive_file {GIB}"})
    assert free_cpu_memory(machine) == 6 * GIB
    write(group / "docker/1a2b", {"memory.limit_in_bytes": 2 * GIB, "memory.usage_in_bytes": GIB})
    assert free_cpu_memory(machine) == GIB
