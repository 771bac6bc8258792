"""Who owns which KV cache block. Pure Python: the bytes themselves live in `mini_infer.graphs.kv_cache`."""

from mini_infer.memory.block_manager import BlockManager
from mini_infer.memory.prefix_cache import PrefixCache

__all__ = ["BlockManager", "PrefixCache"]
