"""mini_infer: a static LLM inference engine.

from mini_infer import LLMEngine
from mini_infer.config import EngineConfig

with LLMEngine(EngineConfig(model="path/or/name")) as engine:
    print(engine.generate("Hello")[0].text)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mini_infer.config import EngineConfig
    from mini_infer.engine import LLMEngine
    from mini_infer.outputs import GenerateOutput, StreamIncrement
    from mini_infer.sampling import SamplingParams

__version__ = "0.1.0"
__all__ = ["EngineConfig", "GenerateOutput", "LLMEngine", "SamplingParams", "StreamIncrement", "__version__"]


def __getattr__(name: str) -> Any:
    # Lazy (PEP 562), so that `import mini_infer.scheduler` does not pull in torch.
    modules = {
        "EngineConfig": "mini_infer.config",
        "GenerateOutput": "mini_infer.outputs",
        "LLMEngine": "mini_infer.engine",
        "SamplingParams": "mini_infer.sampling",
        "StreamIncrement": "mini_infer.outputs",
    }
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(modules[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
