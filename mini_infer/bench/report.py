"""What every benchmark says: where it ran, what its steps came to, and the JSON object that it prints last."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import mini_infer
from mini_infer.buckets import BucketUse, padding_share
from mini_infer.metrics import EngineStats, StepTime, idle_share, median_step_ms
from mini_infer.step import StepKind


def environment() -> dict[str, str]:
    """Hardware and versions, for the output of every benchmark."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "mini_infer": mini_infer.__version__,
        "commit": commit_of(Path(__file__)),
    }


def commit_of(file: Path) -> str:
    """The commit of the checkout that a file belongs to, marked "dirty" if anything has changed; else "unknown"."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=file.parent, check=False)

    try:
        if git("ls-files", "--error-unmatch", file.name).returncode:
            return "unknown"  # none, or another project's, with the package installed inside
        return git("describe", "--always", "--dirty", "--exclude=*").stdout.strip() or "unknown"
    except OSError:  # no git
        return "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def last_line(name: str, options: Mapping[str, Any], results: Any) -> str:
    """The JSON object that ends the output of every benchmark.

    Args:
        name: The benchmark.
        options: The engine's options, the seed of its weights and draws among them.
        results: A dataclass or a list of them, with the workload's own seed inside.
    """
    rows = [asdict(row) for row in results] if isinstance(results, list) else asdict(results)
    return json.dumps(
        {"benchmark": name, "model": options["model"], **environment(), "options": dict(options), "results": rows}
    )


@dataclass(frozen=True, slots=True)
class BucketRow:
    """How one bucket was used, and what its steps took.

    Attributes:
        kind: Prefill or decode.
        bucket: Its rows or tokens.
        use: Steps, real and padded rows, what padding cost.
        predicted_ms: Mean milliseconds of its steps as the scheduler predicted them, contexts included.
        measured_ms: Median milliseconds of the steps as they ran; None if they were not measured.
    """

    kind: StepKind
    bucket: int
    use: BucketUse
    predicted_ms: float
    measured_ms: float | None


@dataclass(frozen=True, slots=True)
class StepSummary:
    """What the steps of a run came to.

    Attributes:
        decode_steps, prefill_steps: Steps of each kind.
        decode_padding, prefill_padding: Share of rows (tokens) that were padding, 0 to 1.
        padded_rows: Padded rows of all decode steps.
        padding_ms: Milliseconds lost to padding by the cost table, decode and prefill together.
        off_graph_steps: Steps on a GPU that were not a replay.
        gpu_idle: Share of the steady decode state in which the device ran no step; None if it was not measured.
    """

    decode_steps: int
    prefill_steps: int
    decode_padding: float
    prefill_padding: float
    padded_rows: int
    padding_ms: float
    off_graph_steps: int
    gpu_idle: float | None


class StepUsage:
    """The steps that an engine ran between two snapshots.

    Attributes:
        step_times: Those that were measured.
        buckets: One row for each bucket that was used, decode first, smallest first.
        summary: All of them together.
    """

    def __init__(self, before: EngineStats, after: EngineStats) -> None:
        self.step_times: tuple[StepTime, ...] = after.step_times[len(before.step_times) :]
        decode = _used(before.decode_buckets, after.decode_buckets)
        prefill = _used(before.prefill_buckets, after.prefill_buckets)
        self.buckets = [
            *self._rows(StepKind.DECODE, decode),
            *self._rows(StepKind.PREFILL, prefill),
        ]
        self.summary = StepSummary(
            decode_steps=after.decode_steps - before.decode_steps,
            prefill_steps=after.prefill_steps - before.prefill_steps,
            decode_padding=padding_share(decode.values()),
            prefill_padding=padding_share(prefill.values()),
            padded_rows=sum(use.padded for use in decode.values()),
            padding_ms=sum(row.use.padding_ms for row in self.buckets),
            off_graph_steps=after.off_graph_steps - before.off_graph_steps,
            gpu_idle=idle_share(self.step_times),
        )

    def _rows(self, kind: StepKind, uses: Mapping[int, BucketUse]) -> list[BucketRow]:
        measured = median_step_ms(self.step_times, kind)
        return [
            BucketRow(kind, bucket, use, use.predicted_ms / use.steps, measured.get(bucket))
            for bucket, use in uses.items()
        ]


def _used(before: Mapping[int, BucketUse], after: Mapping[int, BucketUse]) -> dict[int, BucketUse]:
    """The buckets that were used in between."""
    uses = {bucket: use - before.get(bucket, BucketUse()) for bucket, use in after.items()}
    return {bucket: use for bucket, use in uses.items() if use.steps}


def bucket_table(rows: Sequence[BucketRow]) -> str:
    """A line for each bucket: steps, real and padded rows, what padding cost, and what its steps took, as predicted
    on average and as measured."""
    lines = [
        f"{'step':<8}{'bucket':>7}{'steps':>8}{'rows':>10}{'padded':>9}{'padding ms':>12}"
        f"{'predicted':>11}{'measured':>10}{'ratio':>7}"
    ]
    for row in rows:
        use, measured = row.use, f"{'-':>10}{'-':>7}"
        if row.measured_ms is not None:
            measured = f"{row.measured_ms:>10.3f}{row.measured_ms / row.predicted_ms:>7.2f}"
        lines.append(
            f"{row.kind.value:<8}{row.bucket:>7}{use.steps:>8}{use.rows:>10}{use.padded:>9}{use.padding_ms:>12.1f}"
            f"{row.predicted_ms:>11.3f}{measured}"
        )
    return "\n".join(lines)


def percent(share: float | None) -> str:
    """A share for people; "-" if it is not known."""
    return "-" if share is None else f"{share:.1%}"
