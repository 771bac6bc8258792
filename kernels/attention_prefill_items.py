"""What the programs of `attention_prefill_hopper` work on: tiles of queries, drawn one after another.

An item is a tile of queries of one KV head. Items are numbered from the end of the batch, so that of every sequence the
last tile, which sees most keys, comes first. A program begins with the item of its own number; the others it draws, by
a count in device memory. Its loading warp does that, and tells the computing groups.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined"

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

LANES = gl.constexpr(32)


class Work(NamedTuple):
    """The items of a launch: the tiles of queries, once for each KV head."""

    context_len_ptr: Any
    start_loc_ptr: Any
    drawn_ptr: Any  # [1] int32: items that were drawn
    num_seqs: Any
    num_kv_heads: Any
    items: Any


class Item(NamedTuple):
    """A tile of queries of one KV head."""

    number: Any  # one past the last: no item
    kv_head: Any
    seq: Any
    q_start: Any  # the sequence's first token, and its number of tokens
    q_len: Any
    first: Any  # this tile's first token within the sequence, or one past its last: there is no such tile
    length: Any  # of the context


class Visit(NamedTuple):
    """The tiles of keys that a tile of queries visits."""

    start: Any  # the first
    whole: Any  # the first of which every row sees the beginning
    diagonal: Any  # the first of which some row does not see the end
    stop: Any  # one past the last
    end: Any  # one past the last position


class Channel(NamedTuple):
    """What the next two items are, from the loading warp to the computing groups."""

    smem: Any  # [2 * fields, LANES] int32: the first of each field counts
    told: Any  # [2, 1] barriers
    heard: Any


@gluon.jit
def _find(number, work, BLOCK_Q: gl.constexpr):
    """The item of this number, a sequence's longest first."""
    from_end = gl.maximum(work.items - 1 - number, 0)
    tile = from_end // work.num_kv_heads
    low = tile * 0
    high = low + work.num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if gl.load(work.start_loc_ptr + middle).to(gl.int32) // BLOCK_Q + middle <= tile:
            low = middle
        else:
            high = middle
    q_start = gl.load(work.start_loc_ptr + low).to(gl.int32)
    q_len = gl.load(work.start_loc_ptr + low + 1).to(gl.int32) - q_start
    first = (tile - q_start // BLOCK_Q - low) * BLOCK_Q
    length = gl.load(work.context_len_ptr + low).to(gl.int32)
    return Item(number, from_end % work.num_kv_heads, low, q_start, q_len, first, length)


@gluon.jit
def draw(work):
    """The number of an item that no program has, or one past the last."""
    return gl.num_programs(0) + gl.atomic_add(work.drawn_ptr, 1, sem="relaxed")


@gluon.jit
def take(number, work, BLOCK_Q: gl.constexpr):
    """This item, or if it has no tokens the next one drawn that has."""
    item = _find(number, work, BLOCK_Q)
    while (item.number < work.items) & (item.first >= item.q_len):
        item = _find(draw(work), work, BLOCK_Q)
    return item


@gluon.jit
def announce(item, turn, channel):
    """Tells the computing groups what the turn-th item of this program is."""
    mbarrier.wait(channel.heard.index(turn % 2), turn // 2 + 1 & 1)
    # Each lane has a place of its own to write to: what is read then comes from the lane that arrives at the barrier.
    one = gl.full([LANES], 1, gl.int32, gl.BlockedLayout([1], [LANES], [gl.num_warps()], [0]))
    for field in gl.static_range(7):
        channel.smem.index(turn % 2 * 7 + field).store(one * item[field])
    mbarrier.arrive(channel.told.index(turn % 2))


@gluon.jit
def _hear(field, turn, channel):
    layout: gl.constexpr = gl.BlockedLayout([1], [LANES], [gl.num_warps()], [0])
    return gl.max(channel.smem.index(turn % 2 * 7 + field).slice(0, 1).load(layout), axis=0)


@gluon.jit
def listen(turn, channel):
    """The turn-th item of this program."""
    mbarrier.wait(channel.told.index(turn % 2), turn // 2 & 1)
    item = Item(
        _hear(0, turn, channel),
        _hear(1, turn, channel),
        _hear(2, turn, channel),
        _hear(3, turn, channel),
        _hear(4, turn, channel),
        _hear(5, turn, channel),
        _hear(6, turn, channel),
    )
    mbarrier.arrive(channel.heard.index(turn % 2))
    return item


@gluon.jit
def visit_of(item, BLOCK_Q: gl.constexpr, BLOCK_N: gl.constexpr, SLIDING_WINDOW: gl.constexpr):
    """The tiles of keys that an item visits."""
    before = item.length - item.q_len  # tokens before the chunk
    lowest = before + item.first
    end = before + gl.minimum(item.first + BLOCK_Q, item.q_len)
    start = lowest * 0
    whole = start
    if SLIDING_WINDOW > 0:
        start = gl.maximum(lowest - SLIDING_WINDOW + 1, 0) // BLOCK_N
        whole = gl.cdiv(gl.maximum(end - SLIDING_WINDOW, 0), BLOCK_N)
    return Visit(start, whole, (lowest + 1) // BLOCK_N, gl.cdiv(end, BLOCK_N), end)
