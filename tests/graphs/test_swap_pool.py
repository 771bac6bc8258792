"""Swapping, compared byte by byte; and the order of a GPU's two streams, by trying those that its events allow."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mini_infer.graphs import swap_pool
from mini_infer.graphs.kv_cache import KVCache
from mini_infer.graphs.swap_pool import StreamSwapPool, SwapPool, make_swap_pool, stage_blocks, staging_bytes
from tests.simulated_streams import SimulatedEvent, SimulatedStream, SimulatedStreams

LAYERS, HEADS, BLOCK_SIZE, HEAD_DIM = 3, 2, 4, 8
SPEC: Any = SimpleNamespace(num_layers=LAYERS, num_kv_heads=HEADS, head_dim=HEAD_DIM)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make_cache(num_blocks: int, device: torch.device, dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(SPEC, num_blocks, BLOCK_SIZE, dtype, device)


def fill_with_noise(kv: KVCache, seed: int) -> Tensor:
    """Random bits, NaN patterns among them: a copy must not look at what it copies. Returns them as bytes."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (kv.blocks.numel() * kv.blocks.element_size(),), generator=generator, dtype=torch.uint8)
    kv.blocks.copy_(raw.view(kv.blocks.dtype).view(kv.blocks.shape))
    return content(kv)


def content(kv: KVCache) -> Tensor:
    """[num_blocks + 1, bytes of a block], a copy."""
    by_block = kv.blocks.cpu().movedim(2, 0).contiguous()
    return by_block.view(torch.uint8).reshape(len(by_block), -1).clone()


@pytest.fixture
def small_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Staging buffers of three blocks, so that most swaps need several of them."""
    monkeypatch.setattr(swap_pool, "MAX_STAGE_BLOCKS", 3)


# What is copied


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_and_in_by_bytes(device: torch.device, dtype: torch.dtype) -> None:
    """What was swapped out comes back bit for bit, into other blocks; no other block changes."""
    kv = make_cache(9, device, dtype)
    before = fill_with_noise(kv, 0)
    pool = make_swap_pool(kv, 6)
    pool.swap_out([(7, 2), (1, 5), (9, 0)])
    assert torch.equal(content(kv), before)  # copying out changes nothing on the device
    scrambled = fill_with_noise(kv, 1)
    pool.swap_in([(3, 5), (8, 2), (1, 0)])
    expected = scrambled.clone()
    expected[3], expected[8], expected[1] = before[1], before[7], before[9]
    assert torch.equal(content(kv), expected)


@pytest.mark.usefixtures("small_stages")
def test_random_traffic(device: torch.device) -> None:
    """Hundreds of copies either way, against a list of bytes."""
    num_blocks, num_cpu_blocks = 12, 7
    kv = make_cache(num_blocks, device)
    on_device = fill_with_noise(kv, 2)
    pool = make_swap_pool(kv, num_cpu_blocks)
    on_cpu: dict[int, Tensor] = {}
    address = kv.blocks.data_ptr()
    draw = random.Random(0)
    for step in range(120):
        if step % 10 == 9:
            on_device = fill_with_noise(kv, step)
        count = draw.randint(0, num_cpu_blocks)
        out = list(
            zip(draw.sample(range(1, num_blocks + 1), count), draw.sample(range(num_cpu_blocks), count), strict=True)
        )
        pool.swap_out(out)
        on_cpu.update({cpu: on_device[gpu].clone() for gpu, cpu in out})
        back = draw.sample(sorted(on_cpu), draw.randint(0, len(on_cpu)))
        pairs = list(zip(draw.sample(range(1, num_blocks + 1), len(back)), back, strict=True))
        pool.swap_in(pairs)
        for gpu, cpu in pairs:
            on_device[gpu] = on_cpu[cpu]
        assert torch.equal(content(kv), on_device)
    assert kv.blocks.data_ptr() == address


def test_shared_and_repeated_blocks(device: torch.device) -> None:
    """A shared prefix goes out once for each sequence; of two copies to one CPU block, the later one stays."""
    kv = make_cache(6, device)
    before = fill_with_noise(kv, 4)
    pool = make_swap_pool(kv, 4)
    pool.swap_out([(5, 0), (5, 1), (2, 1), (5, 2), (3, 0)])
    pool.swap_in([(1, 0), (4, 1), (6, 2)])
    expected = before.clone()
    expected[1], expected[4], expected[6] = before[3], before[2], before[5]
    assert torch.equal(content(kv), expected)


@pytest.mark.parametrize("num_cpu_blocks", [0, 3])
def test_no_pairs(device: torch.device, num_cpu_blocks: int) -> None:
    """Most steps swap nothing; an engine without swap space never does."""
    kv = make_cache(2, device)
    before = fill_with_noise(kv, 3)
    pool = make_swap_pool(kv, num_cpu_blocks)
    assert len(pool) == num_cpu_blocks
    for pairs in ([], ()):
        pool.swap_out(pairs)
        pool.swap_in(pairs)
    assert torch.equal(content(kv), before)


def test_size_of_the_staging_buffers() -> None:
    """Bounded in blocks and in bytes, no larger than the pool, and of at least one block if there are any."""
    mib = 1 << 20
    assert stage_blocks(1000, mib // 4) == 64
    assert stage_blocks(1000, 3 * mib) == 21
    assert stage_blocks(1000, 100 * mib) == 1
    assert stage_blocks(5, mib) == 5
    assert staging_bytes(5, mib) == 10 * mib
    assert staging_bytes(0, mib) == 0


# In which order


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> SimulatedStreams:
    """Simulated streams in place of `torch.cuda`."""
    fake = SimulatedStreams()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: fake.copies)
    monkeypatch.setattr(torch.cuda, "Event", SimulatedEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: fake.current)
    monkeypatch.setattr(torch.cuda, "stream", fake.stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    return fake


ORDERS = ["main first", "copies first", *range(12)]


def preference(order: str | int, fake: SimulatedStreams) -> Callable[[], SimulatedStream]:
    if order == "main first":
        return lambda: fake.main
    if order == "copies first":
        return lambda: fake.copies
    draw = random.Random(order)
    return lambda: draw.choice((fake.main, fake.copies))


class Steps:
    """Swaps and the steps between them, on a cache of integers, and what each step must have read."""

    def __init__(self, kv: KVCache, pool: SwapPool, seed: int) -> None:
        self.kv, self.pool, self.draw = kv, pool, random.Random(seed)
        self.expected: list[Tensor] = [kv.blocks[:, :, block].clone() for block in range(kv.num_blocks + 1)]
        self.free_cpu = deque(range(len(pool)))
        self.swapped: dict[int, Tensor] = {}  # by CPU block
        self.reads: list[tuple[Tensor, Tensor]] = []  # what was read, what should have been

    def write(self, block: int) -> None:
        """A step writes new K/V."""
        self.expected[block] = torch.randint(2**31 - 1, self.expected[block].shape, device=self.kv.blocks.device).int()
        self.kv.blocks[:, :, block].copy_(self.expected[block])

    def read(self, block: int) -> None:
        """A step reads K/V."""
        seen = torch.empty_like(self.expected[block])
        seen.copy_(self.kv.blocks[:, :, block])
        self.reads.append((seen, self.expected[block]))

    def swap_out(self, blocks: list[int]) -> None:
        pairs = [(block, self.free_cpu.popleft()) for block in blocks]
        self.pool.swap_out(pairs)
        self.swapped.update({cpu_block: self.expected[block] for block, cpu_block in pairs})

    def swap_in(self, pairs: list[tuple[int, int]]) -> None:
        self.pool.swap_in(pairs)
        for block, cpu_block in pairs:
            self.expected[block] = self.swapped.pop(cpu_block)
            self.free_cpu.append(cpu_block)

    def some(self, most: int) -> list[int]:
        """Some device blocks, in any order."""
        return self.draw.sample(range(1, self.kv.num_blocks + 1), self.draw.randint(0, min(most, self.kv.num_blocks)))

    def round(self) -> None:
        """Some blocks go out and are overwritten at once; some others come in and are read at once."""
        out = self.some(len(self.free_cpu))
        self.swap_out(out)
        for block in out:
            self.write(block)
        into = self.some(len(self.swapped))
        self.swap_in(list(zip(into, self.draw.sample(sorted(self.swapped), len(into)), strict=True)))
        for block in {*into, *self.some(3)}:
            self.read(block)

    def check(self) -> None:
        for block in range(1, self.kv.num_blocks + 1):
            self.read(block)
        assert all(torch.equal(seen, expected) for seen, expected in self.reads)


@pytest.mark.usefixtures("small_stages")
@pytest.mark.parametrize("order", ORDERS)
def test_any_order_of_the_streams(fake: SimulatedStreams, order: str | int) -> None:
    """Rounds back to back: in whatever order the device gets to its work, everybody reads what was saved for them."""
    with fake:
        kv = make_cache(12, torch.device("cpu"), torch.int32)
        steps = Steps(kv, StreamSwapPool(kv, 10), seed=0)
        for _ in range(25):
            steps.round()
    fake.run(preference(order, fake))
    steps.check()


@pytest.mark.usefixtures("small_stages")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("first", ["out", "in"])
def test_a_swap_that_breaks_off(fake: SimulatedStreams, first: str, order: str | int) -> None:
    """Wherever it does: blocks that were saved before, and those that are saved after, come back as they were."""
    num_launches = 0
    while True:
        with fake:
            kv = make_cache(14, torch.device("cpu"), torch.int32)
            steps = Steps(kv, StreamSwapPool(kv, 14), seed=0)
            for block in range(1, 15):
                steps.write(block)
            steps.swap_out([1, 2, 3, 4, 5, 6])  # to CPU blocks 0 to 5
            for block in range(1, 7):
                steps.write(block)
            lost = [(7, 13), (8, 11), (9, 12), (10, 10)]
            fake.launches_left = num_launches
            try:
                steps.pool.swap_out(lost)
                steps.pool.swap_in(lost)  # back where they were: nothing changes
                break
            except KeyboardInterrupt:
                num_launches += 1
            if first == "out":
                steps.swap_out([11, 12, 13, 14])  # to CPU blocks 6 to 9
                for block in range(11, 15):
                    steps.write(block)
                steps.swap_in([(11, 8), (12, 6), (14, 7), (13, 9)])
            steps.swap_in([(3, 0), (2, 1), (1, 2), (6, 3), (5, 4), (4, 5)])
        fake.run(preference(order, fake))
        steps.check()
    assert num_launches > 25


def test_nothing_is_launched_for_no_pairs(fake: SimulatedStreams) -> None:
    with fake:
        pool = StreamSwapPool(make_cache(2, torch.device("cpu")), 0)
        pool.swap_out(())
        pool.swap_in(())
    assert not fake.main.queue and not fake.copies.queue


@pytest.mark.gpu
@pytest.mark.usefixtures("small_stages")
@pytest.mark.parametrize("busy", ["neither", "main", "copies"])
def test_rounds_without_waiting(busy: str) -> None:
    """The same on a GPU: hundreds of rounds with no synchronisation, and now and then one stream far behind."""
    kv = make_cache(12, torch.device("cuda"), torch.int32)
    pool = StreamSwapPool(kv, 10)
    steps = Steps(kv, pool, seed=1)
    behind = torch.cuda.stream(pool._copies) if busy == "copies" else nullcontext()
    for number in range(200):
        if busy != "neither" and number % 20 == 0:
            with behind:
                torch.cuda._sleep(20_000_000)  # about 10 ms
        steps.round()
    steps.check()


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.usefixtures("small_stages")
def test_the_host_does_not_wait() -> None:
    """Both ways return at once while the device has 100 ms of work before it."""
    kv = make_cache(40, torch.device("cuda"))
    pool = StreamSwapPool(kv, 20)
    out = [(block + 1, block) for block in range(20)]
    back = [(40 - block, block) for block in range(20)]
    for _ in range(2):  # the first round fills the allocators' caches
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)
        slept = torch.cuda.Event()
        slept.record()
        begun = time.perf_counter()
        pool.swap_out(out)
        pool.swap_in(back)
        milliseconds = (time.perf_counter() - begun) * 1e3
        assert not slept.query(), "the host waited, or the device was not busy long enough"
    assert milliseconds < 5
