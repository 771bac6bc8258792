"""Where the time of a decode step goes: GPU microseconds by kernel, from the profiler, at some batch sizes.

python scripts/profile_step.py --model llama-3.1-8b --batch 1 64 256
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict

import torch
from torch.profiler import ProfilerActivity, profile

from mini_infer import EngineConfig, LLMEngine, SamplingParams
from mini_infer.bench import workloads
from mini_infer.bench.report import environment


def main() -> None:
    """Profile decode steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-0.6b")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--prompt-tokens", type=int, default=128, help="context of the rows")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=32)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("profile_step: there is no GPU to profile on")
    print(environment())
    config = EngineConfig(
        model=workloads.shape_folder(arguments.model),
        load_format="dummy",
        dtype="bfloat16",
        max_num_seqs=max(arguments.batch),
        max_model_len=4096,
        decode_buckets=arguments.batch,
        prefill_buckets=[512, 2048],
        steps_in_flight=2,
        enable_prefix_caching=False,
        num_cpu_blocks=0,
        progress=False,
    )
    with LLMEngine(config) as engine:
        for batch in arguments.batch:
            profile_batch(engine, batch, arguments)


def profile_batch(engine: LLMEngine, batch: int, arguments: argparse.Namespace) -> None:
    """Print the kernels of one decode step at ``batch`` rows."""
    steps = arguments.steps
    params = SamplingParams(temperature=arguments.temperature, max_tokens=4 * (steps + batch), ignore_eos=True)
    draw = random.Random(batch)
    prompts = [[draw.randint(0, 10000) for _ in range(arguments.prompt_tokens)] for _ in range(batch)]
    request_ids = [engine.add_request(prompt, sampling_params=params) for prompt in prompts]
    while engine.stats().num_running < batch:
        engine.step()
    engine.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps // 2):
            engine.step()
        torch.cuda.synchronize()
    for request_id in request_ids:
        engine.abort(request_id)
    times: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for event in profiler.events():
        times[event.name] += event.device_time_total
        counts[event.name] += 1
    ran = steps // 2
    total = sum(times.values()) / ran
    print(f"\nbatch {batch}: {total:.0f} us of kernels a step")
    for name, spent in sorted(times.items(), key=lambda item: -item[1])[:18]:
        print(f"{spent / ran:9.1f} us {counts[name] / ran:7.1f} x {spent / counts[name]:8.2f} us  {name[:90]}")


if __name__ == "__main__":
    main()
