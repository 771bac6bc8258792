"""The second kernel of decode attention: merges what several programs made of one row, and clears padded rows.

A program of the first kernel (`attention_decode`) leaves at most two parts, each a normalised sum over the tiles that
it had of a row, with its log-sum-exp: of a row that others began, and of one that it began and left to others. For the
latter it says which row that is, and which program has its end. Here the program of the same number merges that row's
parts, from there to the end, weighted by their log-sum-exp, in order.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels import dependent_launch
from mini_infer.kernels.common import next_power_of_2
from mini_infer.kernels.dependent_launch import release, wait

_AT_ONCE = 8  # parts whose loads are in flight


@triton.jit
def _merge_kernel(
    part_ptr,  # [programs, 2, GROUP, HEAD_DIM] float32
    lse_ptr,  # [programs, 2, GROUP] float32, base 2
    left_ptr,  # [programs, 2] int32
    context_len_ptr,  # [num_seqs]
    out_ptr,  # [num_seqs, num_heads, HEAD_DIM] contiguous
    num_seqs,
    num_kv_heads,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    AT_ONCE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    release(DEPENDENT)
    program = tl.program_id(0)
    head = tl.program_id(1)  # of the group
    dims = tl.arange(0, BLOCK_DIM)
    offsets = tl.arange(0, AT_ONCE)
    part = (2 * (program + offsets) + (offsets == 0).to(tl.int32)) * GROUP + head  # [AT_ONCE]
    exists = program + offsets < tl.num_programs(0)
    wait(DEPENDENT)
    # The first parts are loaded before it is known whether anything is to be merged, and how many: one wait, not two.
    item = tl.load(left_ptr + 2 * program)
    last = tl.load(left_ptr + 2 * program + 1)
    lse = tl.load(lse_ptr + part, mask=exists, other=float("-inf"))
    parts = tl.load(
        part_ptr + part[:, None] * HEAD_DIM + dims[None, :], mask=exists[:, None] & (dims < HEAD_DIM)[None, :]
    )
    if item >= 0:
        highest = tl.full([1], float("-inf"), tl.float32)
        total = tl.zeros([1], tl.float32)
        acc = tl.zeros([BLOCK_DIM], tl.float32)
        for start in range(program, last + 1, AT_ONCE):
            if start > program:
                part = 2 * (start + offsets) * GROUP + head
                lse = tl.load(lse_ptr + part, mask=start + offsets <= last, other=float("-inf"))
                mask = (start + offsets <= last)[:, None] & (dims < HEAD_DIM)[None, :]
                parts = tl.load(part_ptr + part[:, None] * HEAD_DIM + dims[None, :], mask=mask)
            belongs = start + offsets <= last
            lse = tl.where(belongs, lse, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(lse, axis=0))
            weights = tl.exp2(lse - new_highest)  # [AT_ONCE]
            rescale = tl.exp2(highest - new_highest)
            total = total * rescale + tl.sum(weights, axis=0)
            acc = acc * rescale + tl.sum(tl.where(belongs[:, None], parts * weights[:, None], 0.0), axis=0)
            highest = new_highest
        out = out_ptr + (item.to(tl.int64) * GROUP + head) * HEAD_DIM
        tl.store(out + dims, (acc / total).to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)
    for row in range(program, num_seqs, tl.num_programs(0)):
        if tl.load(context_len_ptr + row) == 0:
            for kv_head in range(num_kv_heads):
                out = out_ptr + ((tl.cast(row, tl.int64) * num_kv_heads + kv_head) * GROUP + head) * HEAD_DIM
                tl.store(out + dims, tl.zeros([BLOCK_DIM], out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


def merge_parts(parts: Tensor, lse: Tensor, left: Tensor, context_lens: Tensor, out: Tensor, num_kv_heads: int) -> None:
    """Write the rows that no program had whole, and zeros for rows of length 0.

    Args:
        parts: [programs, 2, group, head_dim] float32: of a row that others began, and of one left to others.
        lse: [programs, 2, group] float32: their log-sum-exp, base 2.
        left: [programs, 2] int32: row * num_kv_heads + KV head of the one left to others, or -1; the last of them.
        context_lens: [num_seqs].
        out: [num_seqs, num_heads, head_dim], contiguous; changed.
        num_kv_heads: Heads of the cache.
    """
    programs, _, group, head_dim = parts.shape
    _merge_kernel[(programs, group)](
        parts,
        lse,
        left,
        context_lens,
        out,
        out.shape[0],
        num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_DIM=max(16, next_power_of_2(head_dim)),
        AT_ONCE=_AT_ONCE,
        num_warps=1,
        **dependent_launch.options(),
    )
