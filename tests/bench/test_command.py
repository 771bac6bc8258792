"""`mini-infer bench`: tables, a line of JSON last, and options that do not go together refused."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mini_infer.bench.arguments import add_arguments
from mini_infer.cli import main
from mini_infer.config import EngineConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture
def arguments(folder: Path) -> list[str]:
    return ["--model", str(folder), "--max-num-seqs", "8", "--max-model-len", "160", "--dtype", "float32"]


def reports(out: str) -> list[dict[str, Any]]:
    """The lines of JSON; the last line is one."""
    lines = out.rstrip("\n").splitlines()
    assert lines[-1].startswith("{")
    return [json.loads(line) for line in lines if line.startswith("{")]


def test_several_on_one_engine(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Each prints its table and its line; versions, seeds and options are in every line."""
    assert main(["bench", "latency", "bench-256", "--batch", "2", "--repeats", "2", *arguments]) == 0
    out = capsys.readouterr().out
    assert out.count("started in ") == 1
    latency, throughput = reports(out)
    assert (latency["benchmark"], throughput["benchmark"]) == ("latency", "bench-256")
    for report in (latency, throughput):
        assert report["model"] == arguments[1] and report["torch"] and report["commit"]
        assert report["options"]["seed"] == 0 and report["options"]["measure_steps"] is True
    assert [(row["batch"], row["seed"]) for row in latency["results"]] == [(2, 2)]
    assert len(throughput["results"]["walls_s"]) == 2 and throughput["results"]["seed"] == 11
    assert "median of 2, spread " in out
    assert "  padding ms  predicted  measured  ratio" in out


def test_rate(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "sharegpt-1500", "--rate", "300", *arguments]) == 0
    out = capsys.readouterr().out
    (report,) = reports(out)
    assert report["options"]["rate"] == 300.0
    assert {"ttft_ms", "itl_ms", "latency_ms", "requests_per_s"} <= set(report["results"])
    assert set(report["results"]["itl_ms"]) == {"mean", "p50", "p90", "p95", "p99", "largest"}
    for name in ("TTFT", "ITL", "latency"):
        assert f"\n{name} " in out


def test_unmeasured_steps(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "sharegpt-1500", "--no-measure-steps", *arguments]) == 0
    (report,) = reports(capsys.readouterr().out)
    assert report["results"]["steps"]["gpu_idle"] is None


def test_compare_buckets(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "compare-buckets", *arguments]) == 0
    out = capsys.readouterr().out
    (report,) = reports(out)
    assert [row["policy"] for row in report["results"]] == ["cost", "round up", "by 16"]
    for policy in ("cost", "round up", "by 16"):
        assert sum(line.startswith(f"{policy:<10}") for line in out.splitlines()) == 1
    assert "+0.0%" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["bench-256", "--rate", "5"], "--rate goes with sharegpt-1500 and compare-buckets, got bench-256"),
        (["sharegpt-1500", "--rate", "0"], "--rate must be a positive number of requests a second, got 0"),
        (["sharegpt-1500", "--rate", "inf"], "--rate must be a positive number"),
        (["sharegpt-1500", "--rate", "5", "--no-measure-steps"], "--rate needs --measure-steps"),
        (["sharegpt-1500", "--rate", "5", "--repeats", "2"], "--repeats goes with"),
        (["latency", "--repeats", "2"], "--repeats goes with"),
        (["bench-256", "--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["latency", "--batch", "4", "0"], "--batch must be between 1 and --max-num-seqs=8, got 0"),
        (["latency", "--batch", "9"], "--batch must be between 1 and --max-num-seqs=8, got 9"),
        (["bench-256", "--batch", "4"], "--batch goes with latency, got bench-256"),
        (["latency", "startup"], "compare-buckets and startup start engines of their own and run alone"),
        (["compare-buckets", "bench-256"], "run alone, got compare-buckets bench-256"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_do_not_go_together(
    options: list[str], words: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *options, *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and words in captured.err


def test_defaults_are_the_engines_own() -> None:
    """What a benchmark measures by default is what an engine does by default."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments, config = parser.parse_args(["latency"]), EngineConfig(model="any")
    assert arguments.prefill_share == config.prefill_share == 0.97
    assert (arguments.max_num_seqs, arguments.steps_in_flight) == (config.max_num_seqs, config.steps_in_flight)


def test_unknown_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["bench", "nonsense"])
    assert raised.value.code == 2


def test_the_script_is_the_command(arguments: list[str]) -> None:
    """scripts/bench.py fails as the command does, in a process of its own."""
    command = [sys.executable, "scripts/bench.py", "bench-256", "--rate", "5", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("mini-infer: ConfigError: --rate goes with")


def test_summary(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """scripts/bench_summary.py makes a table of what the benchmarks printed."""
    assert main(["bench", "latency", "bench-256", "--batch", "1", "3", *arguments]) == 0
    command = [sys.executable, "scripts/bench_summary.py"]
    printed = capsys.readouterr().out
    done = subprocess.run(command, cwd=ROOT, input=printed, capture_output=True, text=True, check=True, timeout=60)
    first, second, third = done.stdout.splitlines()
    assert "latency, 1 " in first and "latency, 3 " in second and "ms a step (median " in second
    assert " bench-256 " in third and "output tok/s" in third and "off graph" in third
    done = subprocess.run(command, cwd=ROOT, input="no JSON\n", capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1 and "no benchmark's line" in done.stderr
