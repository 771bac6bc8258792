"""The matrix product with what lies before and after it in a layer; mostly with few rows, bound by reading the weight.

    skinny_linear(x)     = x @ weight.T + bias
    gated                = silu(g) * u,  [g, u] = x @ weight.T + bias,  silu(z) = z / (1 + exp(-z))
    norm_linear(x)       = skinny_linear(x / sqrt(mean(x ** 2) + eps))
    add_linear(r, x)     : r += skinny_linear(x)

x: [..., k], weight: [n, k], bias: [n] or None, r: [..., n]; float32, float16 or bfloat16 -> [..., n], or
[..., n / 2] with the gate (rows 0 to n / 2 - 1 of the weight are the gate). Products are summed in float32 in an order
that the tile fixes: no atomics, so a result depends on nothing but its row of x, the weight and the tile.

The tile says which kernel does it: `gemv` in registers, for 1 to 4 rows (`linear_gemv`); `dot` on tensor cores through
registers, for up to 64 (`linear_dot`); `tma` on tensor cores from shared memory, for any number (`linear_tma`), and
`hopper` likewise with a warp that only loads (`linear_hopper`); `whole` and `halves` are cuBLAS, for gate and up
together or one by one, and the activation's own kernel.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mini_infer.kernels.activation import normed_silu_and_mul, silu_and_mul
from mini_infer.kernels.common import register_op
from mini_infer.kernels.linear_dot import launch_dot
from mini_infer.kernels.linear_gemv import launch_gemv
from mini_infer.kernels.linear_hopper import launch_hopper
from mini_infer.kernels.linear_plan import (
    MAX_DOT_ROWS,
    MAX_GEMV_ROWS,
    MAX_NORMED_ROWS,
    REDUCED_COLUMNS,
    Tile,
    square_parts,
)
from mini_infer.kernels.linear_tma import launch_tma
from mini_infer.kernels.norm import rmsnorm_reference


def skinny_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool) -> Tensor:
    """The formula in plain torch, rounded once."""
    both = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    if not gated:
        return both.to(x.dtype)
    gate, up = both.chunk(2, -1)
    return (F.silu(gate) * up).to(x.dtype)


def add_linear_reference(
    residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, parts: int, columns: int
) -> Tensor:
    """The formula in plain torch, rounded once; and the sums of squares, of so many columns in each part."""
    added = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    residual.copy_(added.add_(residual))
    rows = residual.reshape(-1, residual.shape[-1]).float()
    padded = F.pad(rows.square(), (0, max(0, parts * columns - rows.shape[1])))[:, : parts * columns]
    return padded.view(rows.shape[0], parts, columns).sum(-1).t().contiguous()


def launch_skinny_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tile: Tile,
    *,
    gated: bool = False,
    eps: float = 0.0,
    squares: Tensor | None = None,
) -> Tensor:
    """One product with the tile that is named; x [..., k] of at most 4 (gemv) or 64 (dot) rows, or any number (tma,
    hopper).

    A tile that norms divides each row of x by its root mean square first, with `eps` added to the mean. For this all
    but gemv and dot, which do not look at them, need the `squares` of the rows, [parts, rows] float32: parts of their
    sums, as `launch_add_linear` leaves them.

    Raises:
        ValueError: the tile does not do such a product.
    """
    shape = (*x.shape[:-1], weight.shape[0] // 2 if gated else weight.shape[0])
    if x.numel() == 0:
        return x.new_empty(shape)
    rows = _as_rows(x)
    _check_tile(tile, rows.shape[0], weight, gated)
    if tile.norms:
        _check_norm(tile, rows, bias, squares)
    if tile.is_library:
        both = _by_library(rows, weight, bias, halves=tile.kind == "halves")
        if tile.norms and squares is not None:
            return normed_silu_and_mul(both, squares, weight.shape[1], eps).view(shape)
        return silu_and_mul(both).view(shape)
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    if tile.kind == "gemv":
        launch_gemv(rows, weight, bias, tile, gated, eps, out, add=False)
    elif tile.kind == "dot":
        launch_dot(rows, weight, bias, tile, gated, eps, out, None)
    else:
        _COPYING[tile.kind](rows, weight, bias, tile, gated, eps, squares if tile.norms else None, out, None)
    return out


def launch_add_linear(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, tile: Tile) -> Tensor:
    """Add the product to the residual [..., n] in place. x and the tile as for `launch_skinny_linear`.

    Returns:
        [`square_parts`, rows] float32, parts of the sums of squares of the residual's rows.

    Raises:
        ValueError: the tile does not do such a product.
    """
    rows, n = _as_rows(x), weight.shape[0]
    squares = torch.empty((square_parts(tile, n), rows.shape[0]), dtype=torch.float32, device=x.device)
    if residual.numel() == 0:
        return squares
    _check_tile(tile, rows.shape[0], weight, gated=False)
    if tile.norms or not residual.is_contiguous():
        raise ValueError(f"a residual must be contiguous, and takes no tile that norms, got {tile}")
    if tile.kind == "gemv":
        launch_gemv(rows, weight, bias, tile, False, 0.0, residual, add=True)
    elif tile.kind == "dot":
        launch_dot(rows, weight, bias, tile, False, 0.0, residual, squares)
    else:
        _COPYING[tile.kind](rows, weight, bias, tile, False, 0.0, None, residual, squares)
    return squares


_COPYING = {"tma": launch_tma, "hopper": launch_hopper}  # tiles to shared memory


def _as_rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, x.shape[-1]).contiguous()


def _check_tile(tile: Tile, m: int, weight: Tensor, gated: bool) -> None:
    n = weight.shape[0]
    most = {"gemv": MAX_GEMV_ROWS, "dot": MAX_DOT_ROWS}.get(tile.kind, m)
    if tile.is_library and not gated:
        raise ValueError(f"{tile} is for gate and up, and there are none")
    narrow = gated and not tile.is_library and tile.block_n < 2
    if m > most or narrow or (gated and n % 2) or weight.stride(1) != 1:
        raise ValueError(f"{tile} does not do {m} rows of a weight {tuple(weight.shape)}, gated: {gated}")


def _check_norm(tile: Tile, rows: Tensor, bias: Tensor | None, squares: Tensor | None) -> None:
    m = rows.shape[0]
    if tile.kind == "dot" and m > MAX_NORMED_ROWS:
        raise ValueError(f"{tile}: at most {MAX_NORMED_ROWS} rows, got {m}")
    if tile.is_library and bias is not None:
        raise ValueError(f"{tile}, after the product, which must have no bias then")
    if tile.needs_squares:
        if squares is None:
            raise ValueError(f"{tile} with the squares of x, and there are none")
        if squares.dtype != torch.float32 or squares.shape[1:] != (m,) or not squares.is_contiguous():
            raise ValueError(f"squares must be float32 [parts, {m}], got {squares.dtype} {tuple(squares.shape)}")


def _by_library(rows: Tensor, weight: Tensor, bias: Tensor | None, *, halves: bool) -> Tensor:
    """Gate and up side by side."""
    if not halves:
        return F.linear(rows, weight, bias)
    half = weight.shape[0] // 2
    both = torch.empty((rows.shape[0], 2 * half), dtype=rows.dtype, device=rows.device)
    for part in (slice(0, half), slice(half, 2 * half)):
        if bias is None:
            torch.mm(rows, weight[part].t(), out=both[:, part])
        else:
            torch.addmm(bias[part], rows, weight[part].t(), out=both[:, part])
    return both


def _skinny_linear_cuda(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool, tile: Sequence[int]) -> Tensor:
    return launch_skinny_linear(x, weight, bias, Tile.from_ints(tile), gated=gated)


def _skinny_linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool, tile: Sequence[int]) -> Tensor:
    return skinny_linear_reference(x, weight, bias, gated)


def _skinny_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool, tile: Sequence[int]) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2 if gated else weight.shape[0]))


def _norm_linear_cuda(
    x: Tensor,
    squares: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    gated: bool,
    tile: Sequence[int],
) -> Tensor:
    return launch_skinny_linear(x, weight, bias, Tile.from_ints(tile), gated=gated, eps=eps, squares=squares)


def _norm_linear_cpu(
    x: Tensor,
    squares: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    gated: bool,
    tile: Sequence[int],
) -> Tensor:
    if not Tile.from_ints(tile).needs_squares:
        return skinny_linear_reference(rmsnorm_reference(x, None, eps), weight, bias, gated)
    assert squares is not None
    inv_rms = squares.sum(0).div_(x.shape[-1]).add_(eps).rsqrt_().view(*x.shape[:-1], 1)
    return skinny_linear_reference((x.float() * inv_rms).to(x.dtype), weight, bias, gated)


def _norm_linear_fake(
    x: Tensor,
    squares: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    gated: bool,
    tile: Sequence[int],
) -> Tensor:
    return _skinny_linear_fake(x, weight, bias, gated, tile)


def _add_linear_cuda(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, tile: Sequence[int]) -> Tensor:
    return launch_add_linear(residual, x, weight, bias, Tile.from_ints(tile))


def _add_linear_cpu(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, tile: Sequence[int]) -> Tensor:
    chosen = Tile.from_ints(tile)
    columns = REDUCED_COLUMNS if chosen.split_k > 1 else chosen.block_n
    return add_linear_reference(residual, x, weight, bias, square_parts(chosen, weight.shape[0]), columns)


def _add_linear_fake(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, tile: Sequence[int]) -> Tensor:
    parts = square_parts(Tile.from_ints(tile), weight.shape[0])
    return x.new_empty((parts, x.shape[:-1].numel()), dtype=torch.float32)


skinny_linear_op = register_op("skinny_linear", _skinny_linear_fake, cpu=_skinny_linear_cpu, cuda=_skinny_linear_cuda)
"""(x, weight, bias, gated, `Tile.to_ints` of one that does not norm) -> y."""

norm_linear_op = register_op("norm_linear", _norm_linear_fake, cpu=_norm_linear_cpu, cuda=_norm_linear_cuda)
"""(x, squares, weight, bias, eps, gated, `Tile.to_ints` of one that norms) -> y."""

add_linear_op = register_op(
    "add_linear", _add_linear_fake, cpu=_add_linear_cpu, cuda=_add_linear_cuda, mutates=("residual",)
)
"""(residual, x, weight, bias, `Tile.to_ints`) -> squares. `mini_infer.kernels.linear` chooses the tiles."""
