"""Which kernel and tile a skinny matrix product uses, by shape: measured where it was measured, else a rule.

Pure Python. `scripts/tune_linear.py` writes plans, `LinearPlan.for_gpu` finds the one that is shipped for a GPU, and
`mini_infer.kernels.linear.with_tiles` attaches a weight's choices to it. A choice is `None` where cuBLAS is best.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

DECODE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256)
"""Row counts at which every product is measured, in whole decode steps."""

M_BUCKETS = (*DECODE_BUCKETS, 512, 1024, 2048, 4096)
"""Row counts that a choice is made for; others use the next larger one, and more than the last is for cuBLAS.

Where there are many rows cuBLAS multiplies faster, but a product with the gate need not write the gate and up.
"""

REDUCED_COLUMNS = 256
"""Columns of the result that one program adds up where several shared the columns of the weight."""

MOST_PARTS = 64
"""Of sums of squares: programs that norm keep them in registers while they multiply."""

BOX_COLUMNS = 64
"""Columns of 16 bits that a hopper tile's copies take at once: the 128 bytes over which shared memory is swizzled."""

HOPPER_SUMS = 4096
"""Of a hopper tile, most sums of a warp: 128 registers of each thread."""

LEAST_GATED_ROWS = 2048
"""The bucket from which on the gate is taken in a hopper tile, where nothing was measured."""

MAX_GEMV_ROWS = 4
MAX_DOT_ROWS = 64
MAX_NORMED_ROWS = 32
"""Of a dot tile: with 64 the tensor cores take x as they do in a tma tile, and it must not be read into registers."""
PLANS = Path(__file__).parent / "plans"

Kind = Literal["gemv", "dot", "halves", "hopper", "tma", "whole"]
Role = Literal["plain", "norm", "norm_gate", "add"]
"""What is done beside the product: nothing, the norm of x before it, silu(gate) * up after it as well, or adding it to
a residual. The norm divides each row by its root mean square; its weight is part of the product's (`linear`)."""

ShapeKey = tuple[int, int, Role]
"""(n, k, role): weight rows, weight columns, what is done beside the product."""

_KINDS: tuple[Kind, ...] = ("gemv", "dot", "halves", "hopper", "tma", "whole")
_ROLES: tuple[Role, ...] = ("plain", "norm", "norm_gate", "add")


@dataclass(frozen=True, slots=True)
class Tile:
    """How one product is cut up.

    Attributes:
        kind: "gemv" multiplies and adds in registers, for up to 4 rows of x; "dot" uses tensor cores, for up to 64;
            "tma" feeds them from shared memory, for any number, on GPUs from Hopper on; so does "hopper", on Hopper
            GPUs only, with a warp that does nothing else. "whole" and "halves" are cuBLAS for gate and up, at once or
            one after the other, which may fill the GPU's last wave of tiles better; of the other fields only ``norms``
            means something then.
        block_n: Weight rows of a program (gate and up rows together when gated).
        block_k: Weight columns that are loaded at a time.
        num_warps: Warps of a program; of a hopper tile those that compute, 4 or 8.
        num_stages: Depth of the software pipeline over the columns.
        split_k: Programs that share the columns of a block of rows; not "gemv".
        norms: Whether each program norms the rows of x for itself, where they are to be normed; else a kernel of its
            own does it before. "gemv" and, for up to 32 rows, "dot" see the whole rows; the others need the sums of
            squares that the product before left (``leaves``), and after cuBLAS the activation's kernel norms. Not with
            ``split_k``.
        block_m: Rows of x of a program; "tma" and "hopper" only, and for the latter at most 256.
        leaves: Whether it leaves the sums of squares of the rows that it added to, for a product that norms with them;
            not "gemv".
    """

    kind: Kind
    block_n: int = 0
    block_k: int = 0
    num_warps: int = 0
    num_stages: int = 1
    split_k: int = 1
    norms: bool = False
    block_m: int = 0
    leaves: bool = False

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"kind must be one of {_KINDS}, got {self.kind!r}")
        if self.leaves and (self.norms or not self.can_leave):
            raise ValueError(f"only a tile of our own that is no gemv and does not norm leaves squares, got {self}")
        if self.is_library:
            return
        copied = self.kind in ("tma", "hopper")
        bounds = [("block_n", {"gemv": 1, "dot": 16}.get(self.kind, 64)), ("num_warps", 1)]
        bounds += [("block_k", BOX_COLUMNS if self.kind == "hopper" else 16)]
        for name, low in [*bounds, ("block_m", 16)] if copied else bounds:
            value = getattr(self, name)
            if value < low or value & (value - 1):
                raise ValueError(f"{name} of a {self.kind} tile must be a power of two >= {low}, got {value}")
        if self.num_stages < 1 or self.split_k < 1 or (self.kind == "gemv" and self.split_k > 1):
            raise ValueError(f"num_stages and split_k must be >= 1, and split_k 1 for gemv, got {self}")
        if self.kind == "hopper" and (
            self.num_warps not in (4, 8)
            or self.block_n < 16 * self.num_warps
            or self.block_m > 256
            or self.block_n * self.block_m > HOPPER_SUMS * self.num_warps
        ):
            raise ValueError(
                "a hopper tile has 4 warps or 8, 16 rows of the weight or more for each of them, at most 256 of x, "
                f"and at most {HOPPER_SUMS} sums for a warp, got {self}"
            )
        if self.norms and self.split_k > 1:
            raise ValueError(f"programs that share the columns cannot norm, got {self}")

    @property
    def is_library(self) -> bool:
        """Whether cuBLAS does the product."""
        return self.kind in ("whole", "halves")

    @property
    def can_leave(self) -> bool:
        """Whether its kernel can leave squares."""
        return self.kind in ("dot", "tma", "hopper")

    @property
    def needs_squares(self) -> bool:
        """Whether it norms with squares that were left."""
        return self.norms and self.kind not in ("gemv", "dot")

    def to_ints(self) -> list[int]:
        """The tile as the ops take it."""
        kind = _KINDS.index(self.kind)
        sizes = [self.block_n, self.block_k, self.num_warps, self.num_stages, self.split_k]
        return [kind, *sizes, int(self.norms), self.block_m, int(self.leaves)]

    @classmethod
    def from_ints(cls, ints: Sequence[int]) -> Tile:
        """The inverse of `to_ints`."""
        kind, n, k, warps, stages, split_k, norms, m, leaves = ints
        return cls(_KINDS[kind], n, k, warps, stages, split_k, bool(norms), m, bool(leaves))

    def __str__(self) -> str:
        if self.is_library:
            return f"cuBLAS {self.kind}{' norms' if self.norms else ''}"
        rows = f"{self.block_m}x" if self.block_m else ""
        text = f"{self.kind} {rows}{self.block_n}x{self.block_k} w{self.num_warps} s{self.num_stages}"
        text += " norms" * self.norms + " leaves squares" * self.leaves
        return text if self.split_k == 1 else f"{text} k/{self.split_k}"


def square_parts(tile: Tile, n: int) -> int:
    """In how many parts a tile leaves the sums of squares of the n columns that it added to; 0: it leaves none."""
    parts = -(-n // (REDUCED_COLUMNS if tile.split_k > 1 else tile.block_n)) if tile.leaves else 0
    return parts if parts <= MOST_PARTS else 0


Tiles = tuple[Tile | None, ...]
"""A choice for each of M_BUCKETS; empty where there is nothing to choose."""


def pick(tiles: Tiles, m: int) -> Tile | None:
    """The choice for a product with m rows."""
    for bucket, tile in zip(M_BUCKETS, tiles, strict=False):
        if m <= bucket:
            return tile
    return None


def default_tile(m: int, n: int, k: int, role: Role, element_size: int, *, hopper: bool) -> Tile | None:
    """A choice that was not measured for this shape: what did well on an H200 or an H100 on others.

    Up to 4 rows: one or a few weight rows a program with all their columns in flight. From 5 to 64, on a Hopper GPU:
    hopper tiles, as deep as shared memory allows; two programs share a multiprocessor where the weight has rows for
    more than one each. Elsewhere up to 32: tensor-core tiles of 16 or 32 weight rows, deep in k, few warps. Above,
    cuBLAS is hard to beat, and so it is in float32; but for the gate with thousands of rows, on a Hopper GPU.

    Args:
        m, n, k: Rows of x; rows and columns of the weight.
        role: What is done beside the product.
        element_size: Bytes of an element of the weight.
        hopper: Whether hopper tiles can be used.
    """
    if m <= MAX_GEMV_ROWS:
        block_k = max(16, 1 << (k - 1).bit_length())
        if block_k > 16384:
            return Tile("gemv", 2, 2048, num_warps=8, num_stages=3)
        block_n = max(2 if role == "norm_gate" else 1, min(4, 4096 // block_k))
        norms = role in ("norm", "norm_gate") and m == 1 and block_k <= 2048  # much less than the product
        return Tile("gemv", block_n, block_k, num_warps=8 if block_n * block_k >= 4096 else 4, norms=norms)
    if element_size != 2:
        return None
    hopper = hopper and k % 8 == 0 and n % (16 if role == "norm_gate" else 8) == 0
    if hopper and m >= LEAST_GATED_ROWS and role == "norm_gate":
        block_n, num_stages, block_m = (128, 3, 256) if k >= 2048 else (256, 4, 128)
        return Tile("hopper", block_n, 64, num_warps=8, num_stages=num_stages, block_m=block_m)
    if m > MAX_DOT_ROWS:
        return None
    if hopper:
        return _default_hopper_tile(m, n, role)
    if m > 32:
        return None
    block_k = 256 if m <= 16 else 128
    block_n = 16 if n < 4096 else 32
    return Tile("dot", block_n, block_k, num_warps=2 if block_n * m <= 512 else 4, num_stages=4)


def _default_hopper_tile(m: int, n: int, role: Role) -> Tile:
    block_m = max(16, 1 << (m - 1).bit_length())
    many = n > 16384
    block_n = 128 if many and block_m == 64 and role == "norm_gate" else 64
    kib = 104 if many and block_n == 64 else 200  # of shared memory
    stages = min(8, kib * 1024 // (2 * 128 * (block_m + block_n)))
    norms = role in ("norm", "norm_gate")
    return Tile("hopper", block_n, 128, 4, stages, norms=norms, block_m=block_m, leaves=role == "add")


@dataclass(frozen=True, slots=True)
class LinearPlan:
    """Choices by shape and row count.

    Attributes:
        gpu: Name of the GPU that was measured; empty without measurements.
        dtype: Type of the weights that were measured; float16 and bfloat16 pass for each other.
        measured: For each shape its choices by row count (of M_BUCKETS).
    """

    gpu: str = ""
    dtype: str = "bfloat16"
    measured: Mapping[ShapeKey, Mapping[int, Tile | None]] = field(default_factory=dict)

    def choose(self, m: int, n: int, k: int, role: Role, element_size: int = 2, *, hopper: bool = False) -> Tile | None:
        """Tile of the product of x [m, k] and w [n, k]; None for cuBLAS. Hopper tiles only where they can be used."""
        bucket = next((b for b in M_BUCKETS if m <= b), None)
        if bucket is None:
            return None
        by_rows = self.measured.get((n, k, role), {}) if element_size == 2 else {}
        tile = by_rows.get(bucket)
        if bucket in by_rows and (hopper or tile is None or tile.kind != "hopper"):
            return tile
        return default_tile(bucket, n, k, role, element_size, hopper=hopper)

    def tiles(self, n: int, k: int, role: Role, element_size: int = 2, *, hopper: bool = False) -> Tiles:
        """The choices of one weight, for every row count."""
        return tuple(self.choose(m, n, k, role, element_size, hopper=hopper) for m in M_BUCKETS)

    def to_json(self) -> str:
        """The plan as text."""
        shapes = [
            {
                "n": n,
                "k": k,
                "role": role,
                "tiles": {str(m): None if tile is None else asdict(tile) for m, tile in by_rows.items()},
            }
            for (n, k, role), by_rows in self.measured.items()
        ]
        return json.dumps({"gpu": self.gpu, "dtype": self.dtype, "shapes": shapes}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> LinearPlan:
        """The plan that `to_json` wrote.

        Raises:
            ValueError: the text is no plan.
        """
        try:
            value = json.loads(text)
            measured = {
                (int(shape["n"]), int(shape["k"]), _ROLES[_ROLES.index(shape["role"])]): {
                    int(m): None if tile is None else Tile(**tile) for m, tile in shape["tiles"].items()
                }
                for shape in value["shapes"]
            }
            return cls(str(value["gpu"]), str(value["dtype"]), measured)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"this is no plan of linear layers: {error!r}") from error

    @classmethod
    def for_gpu(cls, gpu: str, folder: Path = PLANS) -> LinearPlan:
        """The shipped plan that was measured on a GPU of this name, else one that only has the rule."""
        for path in sorted(folder.glob("*.json")):
            plan = cls.from_json(path.read_text(encoding="utf-8"))
            if plan.gpu == gpu:
                return plan
        return cls()
