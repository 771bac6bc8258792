"""What was measured once on this machine for one model and configuration, kept on disk for the next start."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mini_infer.exceptions import ConfigError

PlanKey = Mapping[str, str]
"""Everything that the measurements depend on: model shape, options, GPU, versions."""

MIN_SAVING = 0.01
"""Share of a step's cost that a bucket must save to be worth its graph: less is within what a step's time varies by."""


@dataclass(frozen=True, slots=True)
class MachinePlan:
    """Measurements that a later start need not repeat.

    Attributes:
        workspace_bytes: The most that a step needs beside weights, graphs and KV cache.
        graph_bytes: What all captured graphs take, kernels that are loaded for them included.
        decode_sizes: Decode buckets.
        prefill_sizes: Prefill buckets.
        decode_ms: Milliseconds of a decode step over rows without context, by every size that was measured. Those that
            are no buckets, since they did not earn their place, say what padding costs.
        prefill_ms: Milliseconds of a prefill step, likewise.
        swap_ms_per_block: Milliseconds to move one block one way; None without swap space.
        context_ms_per_token: Milliseconds that each token of the rows' contexts adds to a decode step.
        measured_blocks: KV cache blocks that were there to measure on, as far as more would have been of use.
    """

    workspace_bytes: int
    graph_bytes: int
    decode_sizes: tuple[int, ...]
    prefill_sizes: tuple[int, ...]
    decode_ms: dict[int, float]
    prefill_ms: dict[int, float]
    swap_ms_per_block: float | None
    context_ms_per_token: float
    measured_blocks: int


class PlanStore:
    """A folder of plans, one file for each key.

    Args:
        folder: Where the files are; made when the first plan is saved.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, key: PlanKey) -> Path:
        """File of a key's plan, whether it is there or not."""
        text = json.dumps(dict(key), sort_keys=True)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"

    def load(self, key: PlanKey) -> MachinePlan | None:
        """The plan for exactly this key, or None if there is none that can be read."""
        try:
            value = json.loads(self.path(key).read_text(encoding="utf-8"))
            if value["key"] != dict(key):
                return None
            plan = value["plan"]
            return MachinePlan(
                workspace_bytes=int(plan["workspace_bytes"]),
                graph_bytes=int(plan["graph_bytes"]),
                decode_sizes=_sizes(plan["decode_sizes"]),
                prefill_sizes=_sizes(plan["prefill_sizes"]),
                decode_ms=_costs(plan["decode_ms"]),
                prefill_ms=_costs(plan["prefill_ms"]),
                swap_ms_per_block=None if plan["swap_ms_per_block"] is None else _added_cost(plan["swap_ms_per_block"]),
                context_ms_per_token=_added_cost(plan["context_ms_per_token"]),
                measured_blocks=int(plan["measured_blocks"]),
            )
        except (OSError, AttributeError, KeyError, TypeError, ValueError):
            return None  # a plan that cannot be read is measured again

    def save(self, key: PlanKey, plan: MachinePlan) -> Path:
        """Write a key's plan; a reader sees the old file or the new one, never half of it.

        Raises:
            ConfigError: the folder cannot be written.
        """
        path = self.path(key)
        text = json.dumps({"key": dict(key), "plan": asdict(plan)}, indent=2)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._folder, prefix=".new-") as scratch:
                written = Path(scratch) / path.name
                written.write_text(text, encoding="utf-8")
                os.replace(written, path)
        except OSError as error:
            raise ConfigError(f"the plan cannot be kept in {self._folder}: {error}; set MINI_INFER_HOME") from error
        return path


def worthwhile(costs: Mapping[int, float], min_saving: float = MIN_SAVING) -> tuple[int, ...]:
    """The buckets that earn their place: the largest, and each that saves enough against the next larger one kept.

    Args:
        costs: Milliseconds of a step by bucket.
        min_saving: Share of the larger bucket's cost that a smaller one must save.
    """
    kept: list[int] = []
    for size in sorted(costs, reverse=True):
        if not kept or costs[size] <= (1 - min_saving) * costs[kept[-1]]:
            kept.append(size)
    return tuple(reversed(kept))


def _sizes(values: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in values)
    if not sizes or min(sizes) < 1:
        raise ValueError("sizes must be positive")
    return sizes


def _added_cost(value: float) -> float:
    ms = float(value)
    if not 0 <= ms < math.inf:
        raise ValueError("an added cost must be finite, and not negative")
    return ms


def _costs(values: Mapping[str, float]) -> dict[int, float]:
    costs = {int(bucket): float(ms) for bucket, ms in values.items()}
    if not costs or min(costs.values()) <= 0:
        raise ValueError("costs must be positive")
    return costs
