"""A conversation of two turns, by the model's own chat template. Run: python examples/chat.py [MODEL]"""

from example_model import model_from_command_line

from mini_infer import EngineConfig, LLMEngine, SamplingParams

params = SamplingParams(temperature=0.0, max_tokens=80)

with LLMEngine(EngineConfig(model=model_from_command_line(), max_num_seqs=4)) as engine:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    answer = engine.chat(messages, sampling_params=params)
    print(f"user: {messages[-1]['content']}\nassistant: {answer.text}\n")

    messages += [
        {"role": "assistant", "content": answer.text},
        {"role": "user", "content": "Name one thing that it is known for."},
    ]
    print(f"user: {messages[-1]['content']}\nassistant: ", end="")
    for increment in engine.stream_chat(messages, sampling_params=params):
        print(increment.text, end="", flush=True)
        if increment.output is not None:  # the beginning of the prompt is in the prefix cache since the first turn
            cached, total = increment.output.num_cached_tokens, len(increment.output.prompt_token_ids)
    print(f"\n\n{cached} of the {total} prompt tokens of the second turn were not computed again")
