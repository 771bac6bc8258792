"""One prompt in, one text out. Run: python examples/basic.py [MODEL]"""

from example_model import model_from_command_line

from mini_infer import LLMEngine
from mini_infer.config import EngineConfig

# Initialize
config = EngineConfig(model=model_from_command_line(), max_num_seqs=4)
engine = LLMEngine(config)

# Generate
outputs = engine.generate(
    prompts=["Explain quantum computing in simple terms."],
    max_tokens=200,
)

print(outputs[0].text)
engine.shutdown()
