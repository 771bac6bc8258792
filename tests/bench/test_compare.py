"""The comparison of bucket policies: engines that differ in nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from mini_infer import EngineConfig
from mini_infer.bench.arrivals import ArrivalResult
from mini_infer.bench.compare import compare_buckets, policies
from mini_infer.bench.run import ThroughputResult
from mini_infer.buckets import decode_bucket_sizes
from tests.bench.conftest import small_work


def test_policies(options: dict[str, Any]) -> None:
    """Only bucket options; plain sizes are listed, so that no start drops any by its cost."""
    plain = policies(EngineConfig(**{**options, "max_num_seqs": 40}))
    assert plain["cost"] == {"bucket_policy": "cost"}
    assert plain["round up"]["decode_buckets"] == decode_bucket_sizes(40)
    assert plain["by 16"]["decode_buckets"] == (1, 2, 4, 8, 16, 32)
    for name in ("round up", "by 16"):
        assert plain[name]["bucket_policy"] == "round_up"
        assert plain[name]["prefill_buckets"] == plain["round up"]["prefill_buckets"]


@pytest.mark.parametrize("rate", [None, 300.0])
def test_compare(options: dict[str, Any], rate: float | None) -> None:
    work, done = small_work(rate), []
    rows = compare_buckets(options, work, done=done.append)
    assert [row.policy for row in rows] == done == ["cost", "round up", "by 16"]
    assert [row.decode_buckets for row in rows] == [tuple(range(1, 9)), tuple(range(1, 9)), (1, 2, 4, 8)]
    assert rows[0].gain == 0.0
    for row in rows:
        assert isinstance(row.result, ThroughputResult if rate is None else ArrivalResult)
        assert row.result.output_tokens == work.output_tokens
        assert row.gain == pytest.approx(row.time_s / rows[0].time_s - 1)
    assert rows[1].result.steps.padded_rows == 0, "every size to 8 has a bucket, and rounding up takes it"
