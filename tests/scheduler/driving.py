"""A scheduler that drives a simulated device, for its tests."""

from __future__ import annotations

from collections import deque
from typing import Any

from mini_infer.request import FinishReason, Request
from mini_infer.sampling import SamplingParams
from mini_infer.scheduler import Scheduler
from mini_infer.step import SampledTokens, SchedulerOutputs
from tests.simulated_device import Expected, Reference, SimulatedDevice


class Engine:
    """A scheduler with a simulated device, and requests by name. ``options`` are the scheduler's."""

    def __init__(self, **options: Any) -> None:
        options = {"max_num_seqs": 4, "max_model_len": 32, "block_size": 4, "num_cpu_blocks": 0, **options}
        self.scheduler = Scheduler(**options)
        self.expected: dict[str, Expected] = {}
        self.requests: dict[str, Request] = {}
        self.device = SimulatedDevice(
            self.expected,
            max_num_seqs=options["max_num_seqs"],
            block_size=options["block_size"],
            num_gpu_blocks=self.scheduler.block_manager.num_gpu_blocks,
            num_cpu_blocks=options["num_cpu_blocks"],
        )
        self.launched: deque[tuple[SchedulerOutputs, SampledTokens]] = deque()
        self.num_launches = 0

    def add(self, name: str, prompt: list[int], max_tokens: int, **fields: Any) -> Request:
        nan_at = fields.pop("nan_at", None)
        sampling = SamplingParams(max_tokens=max_tokens)
        request = Request(name, tuple(prompt), sampling, seed=len(self.requests), **fields)
        self.scheduler.add(request)
        reference = Reference(prompt, min(max_tokens, self.scheduler.max_model_len - len(prompt)))
        self.expected[name] = Expected(reference, sampling, request.seed, nan_at)
        self.requests[name] = request
        return request

    def launch(self) -> SchedulerOutputs:
        self.num_launches += 1
        assert self.num_launches < 1000, "it does not end"
        outputs = self.scheduler.schedule()
        if outputs:
            self.launched.append((outputs, self.device.run(outputs)))
        return outputs

    def read_back(self) -> list[Request]:
        return self.scheduler.update(*self.launched.popleft())

    def step(self) -> SchedulerOutputs:
        outputs = self.launch()
        if self.launched:
            self.read_back()
        return outputs

    def finish(self) -> list[SchedulerOutputs]:
        """Steps until nothing is left."""
        steps = []
        while self.scheduler.num_unfinished:
            steps.append(self.step())
        for name, request in self.requests.items():
            expected = self.expected[name]
            if request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                result = expected.reference.result(request.stop_token_ids, expected.nan_at)
                assert (request.output_token_ids, request.finish_reason) == result
        return steps


def prompt_of(length: int, first: int = 1) -> list[int]:
    """A prompt that shares no prefix with one of another ``first``."""
    return [first, *range(10, 9 + length)]


def blocks_of(engine: Engine, name: str) -> int:
    return len(engine.scheduler.metadata(name).block_table)
