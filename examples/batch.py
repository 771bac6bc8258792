"""Several prompts in one batch. Run: python examples/batch.py [MODEL]"""

from example_model import model_from_command_line

from mini_infer import EngineConfig, LLMEngine

engine = LLMEngine(EngineConfig(model=model_from_command_line(), max_num_seqs=4))

prompts = [
    "Write a haiku about programming",
    "Explain recursion",
    "What is machine learning?",
]

outputs = engine.generate(
    prompts=prompts,
    max_tokens=100,
    temperature=0.7,
)

for i, output in enumerate(outputs):
    print(f"Prompt {i}: {output.text}\n")

stats = engine.stats()
print(f"{stats.output_tokens} tokens in {stats.prefill_steps} prefill and {stats.decode_steps} decode steps")
engine.shutdown()
