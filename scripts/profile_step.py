"""Where the time of a step goes: GPU microseconds by kernel, from the profiler.

python scripts/profile_step.py --model llama-3.1-8b --batch 1 64 256
python scripts/profile_step.py --model llama-3.1-8b --batch --prefill 8192 --prompt-tokens 2048
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
    """Profile decode and prefill steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-0.6b")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 64, 256], help="rows of decode steps")
    parser.add_argument("--prefill", type=int, nargs="*", default=[], help="tokens of prefill steps")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="context of the rows, and of each prompt")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=32)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("profile_step: there is no GPU to profile on")
    print(environment())
    most_rows = max(arguments.batch, default=64)
    config = EngineConfig(
        model=workloads.shape_folder(arguments.model),
        load_format="dummy",
        dtype="bfloat16",
        max_num_seqs=most_rows,
        max_model_len=max(4096, arguments.prompt_tokens + output_tokens(arguments.steps, most_rows)),
        max_prefill_tokens=max(arguments.prefill, default=2048),
        decode_buckets=arguments.batch or [1],
        prefill_buckets=arguments.prefill or [512, 2048],
        steps_in_flight=2,
        enable_prefix_caching=False,
        num_cpu_blocks=0,
        progress=False,
    )
    with LLMEngine(config) as engine:
        for batch in arguments.batch:
            profile_batch(engine, batch, arguments)
        for tokens in arguments.prefill:
            profile_prefill(engine, tokens, arguments)


def output_tokens(steps: int, batch: int) -> int:
    """As many as no row runs out of while ``batch`` rows are prefilled and some steps profiled."""
    return 4 * (steps + batch)


def add_requests(engine: LLMEngine, count: int, prompt_tokens: int, params: SamplingParams) -> list[str]:
    """Requests with random prompts. Returns their ids."""
    draw = random.Random(count)
    prompts = [[draw.randint(0, 10000) for _ in range(prompt_tokens)] for _ in range(count)]
    return [engine.add_request(prompt, sampling_params=params) for prompt in prompts]


def profile_batch(engine: LLMEngine, batch: int, arguments: argparse.Namespace) -> None:
    """Print the kernels of one decode step at ``batch`` rows."""
    steps = arguments.steps
    most = output_tokens(steps, batch)
    params = SamplingParams(temperature=arguments.temperature, max_tokens=most, ignore_eos=True)
    request_ids = add_requests(engine, batch, arguments.prompt_tokens, params)
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
    show(f"decode, {batch} rows", profiler, steps // 2)


def profile_prefill(engine: LLMEngine, tokens: int, arguments: argparse.Namespace) -> None:
    """Print the kernels of one prefill step of ``tokens`` tokens of whole prompts."""
    params = SamplingParams(temperature=arguments.temperature, max_tokens=1, ignore_eos=True)
    length = min(arguments.prompt_tokens, tokens)

    def run_step() -> None:
        add_requests(engine, tokens // length, length, params)
        while engine.has_unfinished_requests:
            engine.step()

    run_step()
    before = engine.stats().prefill_steps
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(max(1, arguments.steps // 8)):
            run_step()
        torch.cuda.synchronize()
    show(f"prefill, {tokens} tokens", profiler, engine.stats().prefill_steps - before)


def show(title: str, profiler: profile, ran: int) -> None:
    """Print the kernels of ``ran`` steps that take most time."""
    times: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for event in profiler.events():
        times[event.name] += event.device_time_total
        counts[event.name] += 1
    total = sum(times.values()) / ran
    print(f"\n{title}: {total:.0f} us of kernels a step")
    for name, spent in sorted(times.items(), key=lambda item: -item[1])[:18]:
        print(f"{spent / ran:9.1f} us {counts[name] / ran:7.1f} x {spent / counts[name]:8.2f} us  {name[:90]}")


if __name__ == "__main__":
    main()
