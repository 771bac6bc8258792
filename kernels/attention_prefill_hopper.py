"""Prefill attention for Hopper GPUs: one warp loads, the others compute. See `attention_prefill` for what it computes.

FlashAttention-3 (Shah et al. 2024, https://arxiv.org/abs/2407.08608) over the paged cache, in Gluon, Triton's language
for kernels that say which warp does what. One warp has the tensor memory accelerator copy tiles of keys and values to
shared memory, as far ahead as there is room (`attention_prefill_load`). Two groups of four warps take half of a tile's
query rows each (`attention_prefill_compute`): while one is at its softmax the tensor cores have the other's products.

A program stays on each multiprocessor, and computes one tile of queries after another (`attention_prefill_items`). The
loading warp goes on to the next one's keys while this one's are computed; its queries are fetched meanwhile, too.

A row's result does not depend on where its chunk begins, nor on which program computes it.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined"

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mini_infer.kernels.attention_prefill_compute import Queries, compute_partition
from mini_infer.kernels.attention_prefill_items import LANES, Channel, Work
from mini_infer.kernels.attention_prefill_load import Ring, load_partition
from mini_infer.kernels.common import ALIGNMENT, multiprocessors, on_hopper

_BLOCK_M = 128  # query rows of a tile: tokens times query heads of a KV head
_BLOCK_N = 128  # tokens of the context in a tile
_STAGES = 2  # tiles of keys, and as many of values, in shared memory
_BOX_ROWS = 16  # tokens of a block that one copy takes at most
_BOX_DIMS = 64  # elements of a head that one copy takes: the 128 bytes over which shared memory is swizzled
_COMPUTE_REGISTERS, _LOAD_REGISTERS = 232, 40  # of a thread; what a multiprocessor has for 12 warps is used up


def supports(query: Tensor, key_cache: Tensor, value_cache: Tensor) -> bool:
    """Whether this kernel takes the arguments, caches of the same strides; else that of `attention_prefill` does."""
    _, num_heads, head_dim = query.shape
    _, num_kv_heads, block_size, _ = key_cache.shape
    stride_block, stride_head, stride_slot, _ = key_cache.stride()
    return (
        on_hopper()
        and query.element_size() == 2
        and head_dim in (64, 128)
        and num_heads // num_kv_heads <= _BLOCK_M
        and block_size >= 8  # shared memory is swizzled over 8 rows
        and block_size & (block_size - 1) == 0
        and stride_block % stride_slot == 0
        and stride_head % stride_slot == 0
        and all(stride % 16 == 0 for stride in (stride_slot, query.stride(0), query.stride(1)))
        and all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in (query, key_cache, value_cache))
    )


@gluon.jit
def _hopper_prefill_kernel(
    query_ptr,  # [num_tokens, num_heads, HEAD_DIM], strided
    keys,  # the caches, as rows of one token and head each: [rows, HEAD_DIM]
    values,
    block_table_ptr,  # [num_seqs, max_blocks]
    context_len_ptr,  # [num_seqs]
    start_loc_ptr,  # [num_seqs + 1]
    drawn_ptr,  # [1] int32, 0
    out_ptr,  # [num_tokens, num_heads, HEAD_DIM] contiguous
    items,
    num_seqs,
    num_heads,
    num_kv_heads,
    q_stride_token,
    q_stride_head,
    rows_block,
    rows_head,
    table_stride,
    scale,
    SLIDING_WINDOW: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    COMPUTE_REGISTERS: gl.constexpr,
    LOAD_REGISTERS: gl.constexpr,
):
    dtype: gl.constexpr = query_ptr.dtype.element_ty
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    query_smem = gl.allocate_shared_memory(dtype, [4, BLOCK_M // 2, HEAD_DIM], keys.layout)
    key_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], keys.layout)
    value_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], keys.layout)
    item_smem = gl.allocate_shared_memory(gl.int32, [14, LANES], bars)
    query_ready = gl.allocate_shared_memory(gl.int64, [2, 1], bars)  # of each group
    item_told = gl.allocate_shared_memory(gl.int64, [2, 1], bars)
    item_heard = gl.allocate_shared_memory(gl.int64, [2, 1], bars)
    key_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    key_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    value_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    value_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    cut_ready = gl.allocate_shared_memory(gl.int64, [1], bars)
    mbarrier.init(cut_ready, count=1)
    for index in gl.static_range(2):
        mbarrier.init(query_ready.index(index), count=128)  # threads of a group
        mbarrier.init(item_told.index(index), count=1)
        mbarrier.init(item_heard.index(index), count=2)  # groups
    for stage in gl.static_range(STAGES):
        mbarrier.init(key_ready.index(stage), count=1)
        mbarrier.init(key_free.index(stage), count=2)
        mbarrier.init(value_ready.index(stage), count=1)
        mbarrier.init(value_free.index(stage), count=2)
    queries = Queries(query_ptr, out_ptr, num_heads, q_stride_token, q_stride_head, scale)
    work = Work(context_len_ptr, start_loc_ptr, drawn_ptr, num_seqs, num_kv_heads, items)
    channel = Channel(item_smem, item_told, item_heard)
    ring = Ring(key_smem, value_smem, key_ready, key_free, value_ready, value_free, cut_ready)
    # The arguments are spelt out where they are passed: in a variable, the constants would become values.
    gl.warp_specialize(
        [
            (
                compute_partition,
                (
                    gl.constexpr(0),
                    queries,
                    items,
                    channel,
                    ring,
                    query_smem,
                    query_ready.index(0),
                    SLIDING_WINDOW,
                    GROUP,
                    HEAD_DIM,
                    BLOCK_Q,
                    BLOCK_N,
                    STAGES,
                ),
            ),
            (
                compute_partition,
                (
                    gl.constexpr(1),
                    queries,
                    items,
                    channel,
                    ring,
                    query_smem,
                    query_ready.index(1),
                    SLIDING_WINDOW,
                    GROUP,
                    HEAD_DIM,
                    BLOCK_Q,
                    BLOCK_N,
                    STAGES,
                ),
            ),
            (
                load_partition,
                (
                    keys,
                    values,
                    block_table_ptr,
                    rows_block,
                    rows_head,
                    table_stride,
                    work,
                    channel,
                    ring,
                    SLIDING_WINDOW,
                    HEAD_DIM,
                    BLOCK_SIZE,
                    BLOCK_Q,
                    BLOCK_N,
                    STAGES,
                ),
            ),
        ],
        [4, 1],
        [COMPUTE_REGISTERS, LOAD_REGISTERS],
    )


def _describe(cache: Tensor) -> TensorDescriptor:
    """A cache as rows of one token and head each, of which a box is copied at a time."""
    num_blocks, _, block_size, head_dim = cache.shape
    stride_block, _, stride_slot, _ = cache.stride()
    rows = num_blocks * stride_block // stride_slot
    box = [min(_BOX_ROWS, block_size), _BOX_DIMS]
    return TensorDescriptor(cache, [rows, head_dim], [stride_slot, 1], box, gl.NVMMASharedLayout(128, 16, 2))


def launch_hopper_prefill(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    sliding_window: int,
    out: Tensor,
) -> None:
    """Compute prefill attention into `out`, contiguous and of the shape of query.

    The other arguments are those of `paged_prefill_attention`, of which `supports` is true, with block tables of stride
    1 and contiguous lengths and starts.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, block_size = key_cache.shape[1], key_cache.shape[2]
    num_seqs = context_lens.shape[0]
    group = num_heads // num_kv_heads
    block_q = _BLOCK_M // group
    items = (num_tokens // block_q + num_seqs) * num_kv_heads
    stride_block, stride_head, stride_slot, _ = key_cache.stride()
    _hopper_prefill_kernel[(min(items, multiprocessors(query.device)),)](
        query,
        _describe(key_cache),
        _describe(value_cache),
        block_tables,
        context_lens,
        query_start_loc,
        torch.zeros((1,), dtype=torch.int32, device=query.device),
        out,
        items,
        num_seqs,
        num_heads,
        num_kv_heads,
        query.stride(0),
        query.stride(1),
        stride_block // stride_slot,
        stride_head // stride_slot,
        block_tables.stride(0),
        scale,
        SLIDING_WINDOW=sliding_window,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_M=_BLOCK_M,
        BLOCK_Q=block_q,
        BLOCK_N=_BLOCK_N,
        STAGES=_STAGES,
        COMPUTE_REGISTERS=_COMPUTE_REGISTERS,
        LOAD_REGISTERS=_LOAD_REGISTERS,
        num_warps=4,
    )
