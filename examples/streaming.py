"""Text as it is generated. Run: python examples/streaming.py [MODEL]"""

from example_model import model_from_command_line

from mini_infer import EngineConfig, LLMEngine, SamplingParams

with LLMEngine(EngineConfig(model=model_from_command_line(), max_num_seqs=4)) as engine:
    params = SamplingParams(temperature=0.8, top_p=0.95, top_k=50, seed=7, max_tokens=80)
    for increment in engine.stream("The sea was calm that morning, and", sampling_params=params):
        print(increment.text, end="", flush=True)
        if increment.output is not None:  # the last increment carries the whole result
            output = increment.output

print(f"\n\n{len(output.token_ids)} tokens, ended by {output.finish_reason!r}, ", end="")
print(f"first token after {output.timings.ttft * 1e3:.0f} ms, all after {output.timings.latency * 1e3:.0f} ms")
