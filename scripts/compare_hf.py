"""The engine against `transformers.generate` on this machine: the same greedy tokens, and how fast each decodes.

    python scripts/compare_hf.py --batch 1 8

Both run the same float32 model on the same threads in the same process, in turn. Decode rate: tokens after the first,
over the time after the first token. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from mini_infer import EngineConfig, LLMEngine, SamplingParams
from mini_infer.bench.report import environment
from mini_infer.demo_model import download_demo_model

PROMPT = "Explain in a few sentences why the sky is blue and why sunsets are red."


def main() -> None:
    """Compare tokens and decode rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder; default: the demo model")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    folder = arguments.model or str(download_demo_model())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, value in environment().items():
        print(f"{name:<12}{value}")
    library = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    config = EngineConfig(
        model=folder,
        dtype="float32",
        max_num_seqs=max(arguments.batch),
        max_model_len=1024,
        enable_prefix_caching=False,
        progress=False,
    )
    results = []
    with LLMEngine(config) as engine:
        assert engine.tokenizer is not None
        prompt = engine.tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}])
        for batch in arguments.batch:
            ours, theirs, equal = [], [], True
            for repeat in range(arguments.repeats + 1):
                our_rate, our_tokens = run_engine(engine, prompt, batch, arguments.tokens)
                their_rate, their_tokens = run_library(library, prompt, batch, arguments.tokens)
                equal = equal and our_tokens == their_tokens
                if repeat:  # the first round warms up
                    ours.append(our_rate)
                    theirs.append(their_rate)
            ratio = median(ours) / median(theirs)
            print(
                f"batch {batch}: engine {median(ours):.1f} tok/s ({min(ours):.1f} to {max(ours):.1f}), transformers "
                f"{median(theirs):.1f} ({min(theirs):.1f} to {max(theirs):.1f}), ratio {ratio:.2f}, tokens "
                f"{'equal' if equal else 'DIFFER'}"
            )
            results.append({"batch": batch, "engine": ours, "transformers": theirs, "ratio": ratio, "equal": equal})
    print(json.dumps({"benchmark": "compare_hf", **environment(), "results": results}))


def run_engine(engine: LLMEngine, prompt: list[int], batch: int, num_tokens: int) -> tuple[float, list[list[int]]]:
    """Decode rate in tokens a second, and the tokens."""
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    outputs = engine.generate([prompt] * batch, sampling_params=params)
    first = max(output.timings.first_token or 0.0 for output in outputs)
    last = max(output.timings.finished for output in outputs)
    return batch * (num_tokens - 1) / (last - first), [output.token_ids for output in outputs]


@torch.no_grad()
def run_library(
    model: PreTrainedModel, prompt: list[int], batch: int, num_tokens: int
) -> tuple[float, list[list[int]]]:
    """Decode rate in tokens a second, and the tokens."""
    ids = torch.tensor([prompt] * batch, device=model.device)

    def generate(count: int) -> tuple[float, torch.Tensor]:
        begun = time.perf_counter()
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        return time.perf_counter() - begun, output[:, len(prompt) :]

    first_s, _ = generate(1)
    all_s, output = generate(num_tokens)
    return batch * (num_tokens - 1) / (all_s - first_s), output.tolist()


if __name__ == "__main__":
    main()
