"""The engine over a long life: thousands of requests, aborts, failing steps; and draws that depend on nothing else."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mini_infer import LLMEngine, SamplingParams
from mini_infer.exceptions import InvalidRequestError
from tests.tiny_engines import make_tiny_folder, tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("tiny"))


def make_engine(folder: Path, **options: Any) -> LLMEngine:
    return LLMEngine(tiny_config(folder, **{"max_num_seqs": 16, "max_model_len": 64, "block_size": 4, **options}))


@pytest.fixture
def engine(folder: Path) -> Iterator[LLMEngine]:
    with make_engine(folder) as engine:
        yield engine


def resident_bytes() -> int:
    """Memory that the process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_ten_thousand_requests(folder: Path) -> None:
    """Short requests by add_request and get_output, some aborted: no block stays in use, and memory stays flat."""
    draw = random.Random(0)
    waiting: dict[str, None] = {}
    after_warm_up = 0
    with make_engine(folder, max_num_seqs=64, max_prefill_seqs=64, max_prefill_tokens=256) as engine:
        for number in range(10_000):
            prompt = [draw.randrange(3, 320) for _ in range(draw.randint(1, 6))]
            waiting[engine.add_request(prompt, max_tokens=draw.randint(1, 3))] = None
            if draw.random() < 0.1:
                victim = draw.choice(list(waiting))
                del waiting[victim]
                assert engine.abort(victim).finish_reason in ("abort", "length", "stop")
            while len(waiting) > 128:
                for request_id in list(waiting):
                    if engine.get_output(request_id) is not None:
                        del waiting[request_id]
            if number == 3000:
                gc.collect()
                after_warm_up = resident_bytes()
        while waiting:
            for request_id in list(waiting):
                if engine.get_output(request_id) is not None:
                    del waiting[request_id]
        stats = engine.stats()
        gc.collect()
        growth = resident_bytes() - after_warm_up
        assert (stats.num_finished, stats.kv_blocks_used) == (10_000, 0)
        assert (stats.num_running, stats.num_waiting, stats.num_prefilling) == (0, 0, 0)
        assert not engine.has_unfinished_requests
        assert growth < 24 * 2**20, f"memory grew by {growth / 2**20:.1f} MiB over 7,000 requests"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_prefill_tokens": 3},
        {"steps_in_flight": 3},
        {"num_gpu_blocks": 20, "num_cpu_blocks": 40, "preemption": "swap"},
        {"num_gpu_blocks": 20, "preemption": "recompute"},
        {"decode_buckets": [16], "enable_prefix_caching": False},
    ],
)
def test_seeded_draws_depend_on_nothing_else(folder: Path, options: dict[str, Any]) -> None:
    """A seeded request gives the same tokens alone and among others, whatever the engine does with the batch."""
    prompt = [5, 9, 200, 31, 7]
    params = SamplingParams(
        temperature=1.5,
        top_p=0.95,
        top_k=100,
        min_p=0.001,
        frequency_penalty=0.4,
        seed=42,
        max_tokens=40,
        ignore_eos=True,
    )
    with make_engine(folder) as engine:
        alone = engine.generate([prompt], sampling_params=params)[0].token_ids
        again = engine.generate([prompt], sampling_params=params)[0].token_ids
    others = [SamplingParams(temperature=0.5 * i, seed=i, max_tokens=40, ignore_eos=True) for i in range(7)]
    draw = random.Random(1)
    prompts = [[draw.randrange(3, 320) for _ in range(draw.randint(1, 12))] for _ in others]
    with make_engine(folder, **options) as engine:
        outputs = engine.generate([*prompts, prompt], sampling_params=[*others, params])
    assert alone == again == outputs[-1].token_ids
    assert len(set(alone)) > 5


def test_seeds_differ(engine: LLMEngine) -> None:
    """Other seeds give other tokens, and requests without one do not share theirs."""
    params = [SamplingParams(temperature=2.0, seed=seed, max_tokens=20, ignore_eos=True) for seed in (1, 2)]
    first, second = engine.generate([[7, 8]] * 2, sampling_params=params)
    assert first.token_ids != second.token_ids
    unseeded = SamplingParams(temperature=2.0, max_tokens=20, ignore_eos=True)
    first, second = engine.generate([[7, 8]] * 2, sampling_params=unseeded)
    assert first.token_ids != second.token_ids


def test_a_failing_step_ends_its_requests_only(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The requests of a step that raises end with its error; a request that waits goes on, and all blocks come back."""
    expected = engine.generate([[11, 12]], max_tokens=5, temperature=0.0)[0].token_ids
    runner = engine._parts.runner  # type: ignore[union-attr]
    execute = runner.execute
    failures = iter([RuntimeError("device on fire")])

    def failing(outputs: Any) -> Any:
        for failure in failures:
            raise failure
        return execute(outputs)

    monkeypatch.setattr(runner, "execute", failing)
    lost = engine.add_request([3, 4, 5], max_tokens=5)
    output = engine.get_output(lost)
    assert output is not None
    assert (output.finish_reason, output.error) == ("error", "RuntimeError: device on fire")
    assert engine.stats().kv_blocks_used == 0
    assert engine.generate([[11, 12]], max_tokens=5, temperature=0.0)[0].token_ids == expected


def test_a_bad_prompt_harms_nobody(engine: LLMEngine) -> None:
    """An invalid request is refused with value and bound; one that runs goes on, and nothing was queued."""
    running = engine.add_request([3, 4, 5], max_tokens=10)
    for prompt, message in (
        ([], "empty"),
        ("", "empty"),
        ([5] * 64, "64 tokens, but max_model_len=64"),
        ([320], "between 0 and 319"),
        ([-1], "between 0 and 319"),
        ([1.5], "integers"),
        (b"bytes", "string or a list"),
        (7, "string or a list"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            engine.add_request(prompt)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="empty"):
        engine.generate([[3, 4], []])
    while (output := engine.get_output(running)) is None:
        pass
    assert output.finish_reason in ("length", "stop")
    assert engine.stats().num_finished == 1


def test_leaving_a_stream_early(engine: LLMEngine) -> None:
    """A stream that is left gives its blocks back."""
    for increment in engine.stream([3, 4, 5], sampling_params=SamplingParams(max_tokens=50, ignore_eos=True)):
        if len(increment.token_ids):
            break
    gc.collect()
    assert engine.stats().kv_blocks_used == 0
    assert not engine.has_unfinished_requests
