"""The matrix product with few rows, bound by reading the weight once, with what lies before and after it in a layer.

    skinny_linear(x)     = x @ weight.T + bias
    gated                = silu(g) * u,  [g, u] = x @ weight.T + bias,  silu(z) = z / (1 + exp(-z))
    norm_linear(x)       = skinny_linear(rmsnorm(x)),  rmsnorm(x) = cast(x / sqrt(mean(x ** 2) + eps)) * norm
    add_linear(r, x)     : r += skinny_linear(x)

x: [..., k], weight: [n, k], bias: [n] or None, norm: [k], r: [..., n]; float32, float16 or bfloat16 -> [..., n], or
[..., n / 2] with the gate (rows 0 to n / 2 - 1 of the weight are the gate). Products are summed in float32 in an order
that the tile fixes: no atomics, so a result depends on nothing but its row of x, the weight and the tile.

Two kernels. `gemv` (up to 4 rows): a program owns `block_n` rows of the weight and multiplies in registers, all columns
in flight at once where they fit, and may norm x for itself. `dot` (up to 64 rows): x is padded to 16, 32 or 64 rows for
the tensor cores, which idle most of the time; a program owns `block_n` weight rows and pipelines over the columns, or
has them all in flight at once where they fit. With `split_k` > 1 several programs share the columns, and a third kernel
adds their sums.

For the gate a program's rows alternate between gate and up, row i and row n / 2 + i: the loads and the products are
those of a plain product, and each thread ends with both halves of its outputs. (`halves` is for more rows: cuBLAS for
the gate, cuBLAS for up, and the activation's own kernel.)

Both kernels begin to fetch weights while the kernel before them still runs (`dependent_launch`).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels import dependent_launch
from mini_infer.kernels.activation import silu_and_mul
from mini_infer.kernels.common import INTERPRET, cdiv, next_power_of_2, register_op
from mini_infer.kernels.dependent_launch import prefetch, release, wait
from mini_infer.kernels.linear_plan import MAX_DOT_ROWS, MAX_GEMV_ROWS, Tile
from mini_infer.kernels.norm import rmsnorm_reference

_REDUCE_BLOCK = 256
_LINE = tl.constexpr(64)  # entries of 16 bits in a cache line of 128 bytes
_PREFETCHED = 1024  # columns of a program's first weights that are fetched before it may begin


def skinny_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool) -> Tensor:
    """The formula in plain torch, rounded once."""
    both = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    if not gated:
        return both.to(x.dtype)
    gate, up = both.chunk(2, -1)
    return (F.silu(gate) * up).to(x.dtype)


def add_linear_reference(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The formula in plain torch, rounded once."""
    added = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    residual.copy_(added.add_(residual))


@triton.jit
def _weight_rows(n, BLOCK_N: tl.constexpr, GATED: tl.constexpr):
    """This program's weight rows [BLOCK_N]; past the end the last one again, so that loads need no mask."""
    j = tl.arange(0, BLOCK_N)
    if GATED:
        half = n // 2
        rows = tl.minimum(tl.program_id(0) * (BLOCK_N // 2) + j // 2, half - 1) + j % 2 * half
    else:
        rows = tl.minimum(tl.program_id(0) * BLOCK_N + j, n - 1)
    return rows.to(tl.int64)


@triton.jit
def _silu_mul(pairs, M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[M, BLOCK_N] of alternating gate and up -> [M, BLOCK_N // 2]."""
    gate, up = tl.split(tl.reshape(pairs, [M, BLOCK_N // 2, 2]))
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _store_row(
    total,  # [BLOCK_N] float32
    row,
    rows,
    bias_ptr,
    out_ptr,
    m,
    n,
    BLOCK_N: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,
):
    if HAS_BIAS:
        total += tl.load(bias_ptr + rows).to(tl.float32)
    total = total[None, :]  # [1, BLOCK_N]
    if GATED:
        total = _silu_mul(total, 1, BLOCK_N)
        width = n // 2
        cols = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    else:
        width = n
        cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    out = (out_ptr + row * width + cols)[None, :]  # int32: at most 4 rows
    mask = ((cols < width) & (row < m))[None, :]
    if ADD:
        total += tl.load(out, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_x(x_ptr, row, m, x_stride, cols, k, EVEN_K: tl.constexpr):
    """Row `row` of x, [1, BLOCK_K] float32. Past the last row that one again: its result is not stored."""
    source = x_ptr + tl.minimum(row, m - 1).to(tl.int64) * x_stride + cols
    x = tl.load(source) if EVEN_K else tl.load(source, mask=cols < k, other=0.0)
    return x.to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["m"])
def _gemv_kernel(
    x_ptr,  # [m, k]
    weight_ptr,  # [n, k]
    bias_ptr,  # [n]
    norm_ptr,  # [k]; unread unless HAS_NORM
    out_ptr,  # [m, n] or [m, n / 2] contiguous
    m,
    n,
    k,
    eps,
    x_stride,
    weight_stride,
    M_PAD: tl.constexpr,  # 1, 2 or 4
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,  # needs ONE_TILE
    ADD: tl.constexpr,  # to what out holds
    ONE_TILE: tl.constexpr,  # BLOCK_K >= k
    EVEN_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    release(DEPENDENT)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    rows = _weight_rows(n, BLOCK_N, GATED)
    offsets = tl.arange(0, BLOCK_K)
    source = weight_ptr + rows[:, None] * weight_stride
    if ONE_TILE:
        if EVEN_K:
            w = tl.load(source + offsets[None, :], eviction_policy="evict_first")
        else:
            w = tl.load(
                source + offsets[None, :], mask=(offsets < k)[None, :], other=0.0, eviction_policy="evict_first"
            )
        if HAS_NORM:
            norm = tl.load(norm_ptr + offsets, mask=offsets < k, other=0.0).to(tl.float32)[None, :]
        wait(DEPENDENT)
        w = w.to(tl.float32)
        for row in tl.static_range(M_PAD):
            x = _load_x(x_ptr, row, m, x_stride, offsets, k, EVEN_K)
            if HAS_NORM:  # with the roundings of `rmsnorm`
                inv_rms = 1.0 / tl.sqrt_rn(tl.sum(x * x) / k + tl.cast(eps, tl.float32))
                x = ((x * inv_rms).to(dtype).to(tl.float32) * norm).to(dtype).to(tl.float32)
            _store_row(tl.sum(w * x, 1), row, rows, bias_ptr, out_ptr, m, n, BLOCK_N, GATED, HAS_BIAS, ADD)
    else:
        if DEPENDENT:
            prefetch(source + tl.minimum(tl.arange(0, max(BLOCK_K // _LINE, 1)) * _LINE, k - 1)[None, :])
        wait(DEPENDENT)
        sum0 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        sum1 = sum0
        sum2 = sum0
        sum3 = sum0
        for start in tl.range(0, k, BLOCK_K, num_stages=NUM_STAGES):
            cols = start + offsets
            if EVEN_K:
                w = tl.load(source + cols[None, :], eviction_policy="evict_first")
            else:
                w = tl.load(source + cols[None, :], mask=(cols < k)[None, :], other=0.0)
            w = w.to(tl.float32)
            sum0 += w * _load_x(x_ptr, 0, m, x_stride, cols, k, EVEN_K)
            if M_PAD > 1:
                sum1 += w * _load_x(x_ptr, 1, m, x_stride, cols, k, EVEN_K)
            if M_PAD > 2:
                sum2 += w * _load_x(x_ptr, 2, m, x_stride, cols, k, EVEN_K)
                sum3 += w * _load_x(x_ptr, 3, m, x_stride, cols, k, EVEN_K)
        _store_row(tl.sum(sum0, 1), 0, rows, bias_ptr, out_ptr, m, n, BLOCK_N, GATED, HAS_BIAS, ADD)
        if M_PAD > 1:
            _store_row(tl.sum(sum1, 1), 1, rows, bias_ptr, out_ptr, m, n, BLOCK_N, GATED, HAS_BIAS, ADD)
        if M_PAD > 2:
            _store_row(tl.sum(sum2, 1), 2, rows, bias_ptr, out_ptr, m, n, BLOCK_N, GATED, HAS_BIAS, ADD)
            _store_row(tl.sum(sum3, 1), 3, rows, bias_ptr, out_ptr, m, n, BLOCK_N, GATED, HAS_BIAS, ADD)


@triton.jit(do_not_specialize=["m"])
def _dot_kernel(
    x_ptr,  # [m, k]
    weight_ptr,  # [n, k]
    bias_ptr,  # [n]
    out_ptr,  # [m, n] or [m, n / 2]; with SPLIT_K > 1 the sums [SPLIT_K, m, n] float32; contiguous
    m,
    n,
    k,
    x_stride,
    weight_stride,
    M_PAD: tl.constexpr,  # 16, 32 or 64
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,  # to what out holds
    ONE_TILE: tl.constexpr,  # BLOCK_K takes all of a program's columns
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    PREFETCHED: tl.constexpr,  # columns, a power of two; unused if ONE_TILE
    DEPENDENT: tl.constexpr,
):
    release(DEPENDENT)
    rows = _weight_rows(n, BLOCK_N, GATED)
    x_rows = tl.arange(0, M_PAD)
    offsets = tl.arange(0, BLOCK_K)
    x_source = x_ptr + x_rows.to(tl.int64)[:, None] * x_stride
    w_source = weight_ptr + rows[:, None] * weight_stride
    if SPLIT_K == 1:
        first = 0
        last = k
    else:
        span = tl.cdiv(tl.cdiv(k, BLOCK_K), SPLIT_K) * BLOCK_K
        first = tl.program_id(1) * span
        last = tl.minimum(first + span, k)
    if ONE_TILE:
        cols = first + offsets
        w = tl.load(w_source + cols[None, :], mask=(cols < last)[None, :], other=0.0, eviction_policy="evict_first")
        wait(DEPENDENT)
        x = tl.load(x_source + cols[None, :], mask=(x_rows < m)[:, None] & (cols < last)[None, :], other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(x, tl.trans(w), input_precision="ieee")
    else:
        if DEPENDENT:
            prefetch(w_source + tl.minimum(first + tl.arange(0, PREFETCHED // _LINE) * _LINE, k - 1)[None, :])
        wait(DEPENDENT)
        acc = tl.zeros([M_PAD, BLOCK_N], tl.float32)
        for start in range(first, last, BLOCK_K):
            cols = start + offsets
            # Masked: the padding rows cost no traffic.
            if EVEN_K:
                x = tl.load(x_source + cols[None, :], mask=(x_rows < m)[:, None], other=0.0)
                w = tl.load(w_source + cols[None, :], eviction_policy="evict_first")
            else:
                x = tl.load(x_source + cols[None, :], mask=(x_rows < m)[:, None] & (cols < k)[None, :], other=0.0)
                w = tl.load(w_source + cols[None, :], mask=(cols < k)[None, :], other=0.0)
            if UPCAST:
                x = x.to(tl.float32)
                w = w.to(tl.float32)
            acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows).to(tl.float32)[None, :]
    if GATED:
        acc = _silu_mul(acc, M_PAD, BLOCK_N)
        width = n // 2
        out_cols = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    else:
        width = n
        out_cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    out_rows = x_rows.to(tl.int64)
    if SPLIT_K > 1:
        out_rows += tl.program_id(1).to(tl.int64) * m
    target = out_ptr + out_rows[:, None] * width + out_cols[None, :]
    mask = (x_rows < m)[:, None] & (out_cols < width)[None, :]
    if ADD:
        acc += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["m"])
def _reduce_kernel(
    sums_ptr,  # [SPLIT_K, m, n] float32 contiguous
    bias_ptr,  # [n]
    out_ptr,  # [m, n] or [m, n / 2] contiguous
    m,
    n,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    release(DEPENDENT)
    row = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    width = n
    if GATED:
        width = n // 2
    mask = cols < width
    source = sums_ptr + row * n + cols
    step = m.to(tl.int64) * n
    total = tl.zeros([BLOCK], tl.float32)
    up = tl.zeros([BLOCK], tl.float32)
    wait(DEPENDENT)
    for split in tl.static_range(SPLIT_K):
        total += tl.load(source + split * step, mask=mask, other=0.0)
        if GATED:
            up += tl.load(source + split * step + width, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        if HAS_BIAS:
            up += tl.load(bias_ptr + width + cols, mask=mask, other=0.0).to(tl.float32)
        total = total / (1.0 + tl.exp(-total)) * up
    target = out_ptr + row * width + cols
    if ADD:
        total += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=mask)


def launch_skinny_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tile: Tile,
    *,
    gated: bool = False,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """One product with the tile that is named; x [..., k] of at most 4 (gemv) or 64 (dot) rows.

    With `norm` [k] x is normed first; with `residual` [..., n] the product is added to it in place.

    Raises:
        ValueError: the tile does not do such a product.
    """
    n, k = weight.shape
    width = n // 2 if gated else n
    out = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device) if residual is None else residual
    if out.numel() == 0:
        return out
    rows = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, k).contiguous()
    m = rows.shape[0]
    _check_tile(tile, m, weight, gated, norm, residual)
    if tile.kind == "halves":
        return _by_halves(rows, weight, bias).view(out.shape)
    if tile.kind == "gemv":
        _launch_gemv(rows, weight, bias, tile, gated, norm, eps, out, residual is not None)
    else:
        _launch_dot(rows, weight, bias, tile, gated, out, residual is not None)
    return out


def _check_tile(tile: Tile, m: int, weight: Tensor, gated: bool, norm: Tensor | None, residual: Tensor | None) -> None:
    n, k = weight.shape
    most = {"gemv": MAX_GEMV_ROWS, "dot": MAX_DOT_ROWS, "halves": m}[tile.kind]
    if tile.kind == "halves" and not gated:
        raise ValueError("without a gate there are no halves")
    narrow = gated and tile.kind != "halves" and tile.block_n < 2
    if m > most or narrow or (gated and n % 2) or weight.stride(1) != 1:
        raise ValueError(f"{tile} does not do {m} rows of a weight {tuple(weight.shape)}, gated: {gated}")
    if norm is not None and (tile.kind != "gemv" or tile.block_k < k):
        raise ValueError(f"{tile} does not norm rows of {k}: a program must see whole rows")
    if residual is not None and (gated or not residual.is_contiguous()):
        raise ValueError("a residual must be contiguous, and takes no gate")


def _by_halves(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    half = weight.shape[0] // 2
    both = torch.empty((rows.shape[0], 2 * half), dtype=rows.dtype, device=rows.device)
    for part in (slice(0, half), slice(half, 2 * half)):
        if bias is None:
            torch.mm(rows, weight[part].t(), out=both[:, part])
        else:
            torch.addmm(bias[part], rows, weight[part].t(), out=both[:, part])
    return silu_and_mul(both)


def _launch_gemv(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tile: Tile,
    gated: bool,
    norm: Tensor | None,
    eps: float,
    out: Tensor,
    add: bool,
) -> None:
    m, (n, k) = rows.shape[0], weight.shape
    _gemv_kernel[(cdiv(n, tile.block_n),)](
        rows,
        weight,
        weight if bias is None else bias,
        weight if norm is None else norm,
        out,
        m,
        n,
        k,
        eps,
        rows.stride(0),
        weight.stride(0),
        M_PAD=next_power_of_2(m),
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        NUM_STAGES=tile.num_stages,
        GATED=gated,
        HAS_BIAS=bias is not None,
        HAS_NORM=norm is not None,
        ADD=add,
        ONE_TILE=tile.block_k >= k,
        EVEN_K=k % tile.block_k == 0,
        num_warps=tile.num_warps,
        **dependent_launch.options(),
    )


def _launch_dot(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tile: Tile,
    gated: bool,
    out: Tensor,
    add: bool,
) -> None:
    m, (n, k), split_k = rows.shape[0], weight.shape, tile.split_k
    whole = split_k == 1
    some_bias = weight if bias is None else bias  # not read without one
    target = out if whole else torch.empty((split_k, m, n), dtype=torch.float32, device=rows.device)
    _dot_kernel[(cdiv(n, tile.block_n), split_k)](
        rows,
        weight,
        some_bias,
        target,
        m,
        n,
        k,
        rows.stride(0),
        weight.stride(0),
        M_PAD=max(16, next_power_of_2(m)),
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        SPLIT_K=split_k,
        GATED=gated and whole,
        HAS_BIAS=bias is not None and whole,
        ADD=add and whole,
        ONE_TILE=tile.block_k * split_k >= k,
        EVEN_K=k % tile.block_k == 0,
        UPCAST=INTERPRET,
        PREFETCHED=min(_PREFETCHED, max(_LINE.value, next_power_of_2(cdiv(k, split_k)))),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **dependent_launch.options(),
    )
    if not whole:
        _reduce_kernel[(cdiv(n // 2 if gated else n, _REDUCE_BLOCK), m)](
            target,
            some_bias,
            out,
            m,
            n,
            SPLIT_K=split_k,
            BLOCK=_REDUCE_BLOCK,
            GATED=gated,
            HAS_BIAS=bias is not None,
            ADD=add,
            num_warps=2,
            **dependent_launch.options(),
        )


def _skinny_linear_cuda(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool, tile: Sequence[int]) -> Tensor:
    return launch_skinny_linear(x, weight, bias, Tile.from_ints(tile), gated=gated)


def _skinny_linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool, tile: Sequence[int]) -> Tensor:
    return skinny_linear_reference(x, weight, bias, gated)


def _skinny_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool, tile: Sequence[int]) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2 if gated else weight.shape[0]))


def _norm_linear_cuda(
    x: Tensor, norm: Tensor, weight: Tensor, bias: Tensor | None, eps: float, gated: bool, tile: Sequence[int]
) -> Tensor:
    return launch_skinny_linear(x, weight, bias, Tile.from_ints(tile), gated=gated, norm=norm, eps=eps)


def _norm_linear_cpu(
    x: Tensor, norm: Tensor, weight: Tensor, bias: Tensor | None, eps: float, gated: bool, tile: Sequence[int]
) -> Tensor:
    return skinny_linear_reference(rmsnorm_reference(x, norm, eps), weight, bias, gated)


def _norm_linear_fake(
    x: Tensor, norm: Tensor, weight: Tensor, bias: Tensor | None, eps: float, gated: bool, tile: Sequence[int]
) -> Tensor:
    return _skinny_linear_fake(x, weight, bias, gated, tile)


def _add_linear_cuda(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, tile: Sequence[int]) -> None:
    launch_skinny_linear(x, weight, bias, Tile.from_ints(tile), residual=residual)


def _add_linear_cpu(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, tile: Sequence[int]) -> None:
    add_linear_reference(residual, x, weight, bias)


def _add_linear_fake(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, tile: Sequence[int]) -> None:
    return None


skinny_linear_op = register_op("skinny_linear", _skinny_linear_fake, cpu=_skinny_linear_cpu, cuda=_skinny_linear_cuda)
"""(x, weight, bias, gated, `Tile.to_ints`) -> y."""

norm_linear_op = register_op("norm_linear", _norm_linear_fake, cpu=_norm_linear_cpu, cuda=_norm_linear_cuda)
"""(x, norm, weight, bias, eps, gated, `Tile.to_ints`) -> y."""

add_linear_op = register_op(
    "add_linear", _add_linear_fake, cpu=_add_linear_cpu, cuda=_add_linear_cuda, mutates=("residual",)
)
"""(residual, x, weight, bias, `Tile.to_ints`). `mini_infer.kernels.linear` chooses the tiles."""
