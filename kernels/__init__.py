"""The ops of mini_infer: for each a formula, a reference, a Triton kernel and a torch.library op.

Names are loaded on first use, so importing this package imports neither torch nor triton. No module here shares its
name with an exported function: ``import mini_infer.kernels.norm`` sets an attribute ``norm`` on this package, and a
module called ``rmsnorm`` would in the same way hide the function. (`linear` lives in `mini_infer.kernels.linear` and is
imported from there.)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mini_infer.kernels.activation import silu_and_mul
    from mini_infer.kernels.attention_decode import paged_attention
    from mini_infer.kernels.attention_prefill import paged_prefill_attention
    from mini_infer.kernels.kv_store import store_kv
    from mini_infer.kernels.linear import LinearWeight, pack_linear
    from mini_infer.kernels.norm import add_rmsnorm, rmsnorm
    from mini_infer.kernels.qkv_prologue import prepare_qkv
    from mini_infer.kernels.rotary import apply_rotary_emb
    from mini_infer.kernels.sampling import sample
    from mini_infer.kernels.sampling_cpu import philox_uniform

__all__ = [
    "LinearWeight",
    "add_rmsnorm",
    "apply_rotary_emb",
    "pack_linear",
    "paged_attention",
    "paged_prefill_attention",
    "philox_uniform",
    "prepare_qkv",
    "rmsnorm",
    "sample",
    "silu_and_mul",
    "store_kv",
]

_MODULE_OF = {
    "LinearWeight": "linear",
    "add_rmsnorm": "norm",
    "apply_rotary_emb": "rotary",
    "pack_linear": "linear",
    "paged_attention": "attention_decode",
    "paged_prefill_attention": "attention_prefill",
    "philox_uniform": "sampling_cpu",
    "prepare_qkv": "qkv_prologue",
    "rmsnorm": "norm",
    "sample": "sampling",
    "silu_and_mul": "activation",
    "store_kv": "kv_store",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"mini_infer.kernels.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
