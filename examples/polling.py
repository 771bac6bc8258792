"""Requests queued one by one and asked for until they are ready. Run: python examples/polling.py [MODEL]

`get_output` runs a step itself when the request is not finished, so this loop ends without calling `step`.
"""

from example_model import model_from_command_line

from mini_infer import EngineConfig, LLMEngine

engine = LLMEngine(EngineConfig(model=model_from_command_line(), max_num_seqs=4))

prompts = [
    "Write a haiku about programming",
    "Explain recursion",
    "What is machine learning?",
]

# Add requests
req_ids = []
for prompt in prompts:
    req_id = engine.add_request(prompt, max_tokens=50)
    req_ids.append(req_id)

# Poll for results
while req_ids:
    for req_id in req_ids[:]:
        output = engine.get_output(req_id)
        if output:
            print(f"{req_id}: {output.text}")
            req_ids.remove(req_id)

engine.shutdown()
