"""What can go wrong, and what the engine says then. Run: python examples/errors.py [MODEL]"""

from example_model import model_from_command_line

from mini_infer import EngineConfig, LLMEngine
from mini_infer.exceptions import (
    InvalidRequestError,
    ModelNotFoundError,
    OutOfMemoryError,
)


def run(config: EngineConfig, prompts: list[str]) -> None:
    """Generate, and explain what went wrong if something did."""
    try:
        engine = LLMEngine(config)
        outputs = engine.generate(prompts, max_tokens=8)
        print(f"Generated: {outputs[0].text!r}")
    except OutOfMemoryError as e:
        print(f"Not enough memory: {e}")
    except InvalidRequestError as e:
        print(f"Invalid request: {e}")
    except ModelNotFoundError as e:
        print(f"Model not found: {e}")


model = model_from_command_line()
run(EngineConfig(model=model, max_num_seqs=4), ["Hello"])
run(EngineConfig(model=model, max_num_seqs=4, max_model_len=8), ["A prompt of more than eight tokens, " * 3])
run(EngineConfig(model=model, max_num_seqs=4, num_gpu_blocks=10**9), ["Hello"])
run(EngineConfig(model="./no/such/model"), ["Hello"])
