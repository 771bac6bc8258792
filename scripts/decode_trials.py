"""Whole decode steps of a model of random weights, timed with one choice of kernels for its products or another."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from mini_infer import EngineConfig
from mini_infer.bench import workloads
from mini_infer.graphs.kv_cache import KVCache
from mini_infer.graphs.params import Params
from mini_infer.graphs.state import DecodeState
from mini_infer.graphs.steps import Model
from mini_infer.kernels.compile_ahead import compile_ahead
from mini_infer.kernels.linear import LinearWeight
from mini_infer.kernels.linear_plan import M_BUCKETS, Tile
from mini_infer.loader import find_model, load_params, read_model_files
from mini_infer.measuring import long_rows
from mini_infer.shape import Shape

CONTEXT = 512  # tokens of each row
MOST_REPLAYS = 16  # each makes the rows one token longer
ROUND_MS = 10.0  # of replays of one choice before the next one's turn
ROUNDS = 5

Choice = Mapping[str, Tile | None]
"""The kernel of each product by its name in the model's parameters; None for cuBLAS."""


class DecodeTrials:
    """A model on the GPU, whose decode step runs with any choice of kernels.

    Args:
        model: One of the bundled shapes.
        max_rows: Most rows of a step.
    """

    def __init__(self, model: str, max_rows: int) -> None:
        config = EngineConfig(
            model=workloads.shape_folder(model),
            load_format="dummy",
            dtype="bfloat16",
            max_num_seqs=max_rows,
            max_model_len=2 * CONTEXT,
            progress=False,
        )
        shape = Shape.of(config)
        files = read_model_files(find_model(config.model, weights=False))
        blocks = max_rows * -(-(CONTEXT + MOST_REPLAYS) // config.block_size)
        self._params = load_params(
            files, dtype=shape.dtype, device=shape.device, max_positions=shape.max_model_len, dummy_seed=0
        )
        self._spec = shape.spec
        self._block_size, self._max_blocks = config.block_size, shape.max_blocks
        self._kv = KVCache(shape.spec, blocks, config.block_size, shape.dtype, shape.device)
        self._kv.blocks.normal_()
        self._state = DecodeState(max_rows, shape.max_blocks, shape.spec.vocab_size, shape.device)
        self._stream = torch.cuda.Stream()

    @torch.inference_mode()
    def compile(self, choices: Sequence[tuple[int, Choice]]) -> None:
        """Compile what steps of so many rows with these choices launch."""
        with compile_ahead():
            for rows, choice in choices:
                self._model(choice).few_layers().run_decode(rows)

    @torch.inference_mode()
    def measure(self, rows: int, choices: Sequence[Choice]) -> list[float]:
        """Milliseconds of a step with each of the choices: medians of turns that they take one after the other.

        Args:
            rows: Rows of the step, all of them with a context.
            choices: What to compare. The times of the others are those of the first, by the median of the ratios that
                each round found: the GPU's clock drifts.
        """
        pool = torch.cuda.graph_pool_handle()  # it goes with its graphs
        steps = [self._capture(rows, choice, pool) for choice in choices]
        replays = max(2, min(MOST_REPLAYS - 2, int(ROUND_MS / self._time(steps[0], rows, 4))))
        rounds = [[self._time(step, rows, replays) for step in steps] for _ in range(ROUNDS)]
        first = statistics.median(times[0] for times in rounds)
        return [first * statistics.median(times[i] / times[0] for times in rounds) for i in range(len(steps))]

    def _model(self, choice: Choice) -> Model:
        return Model(self._spec, with_choice(self._params, choice), self._kv, self._state)

    def _capture(self, rows: int, choice: Choice, pool: Any) -> Callable[[], None]:
        model = self._model(choice)
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            model.few_layers().run_decode(rows)  # whatever is set up on a first call
            torch.cuda.synchronize()
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            model.run_decode(rows)
            graph.capture_end()
        return graph.replay

    def _time(self, step: Callable[[], None], rows: int, replays: int) -> float:
        """Milliseconds of a step, after a first one."""
        places = long_rows(
            rows,
            rows * CONTEXT,
            ahead=MOST_REPLAYS,
            max_blocks=self._max_blocks,
            num_blocks=self._kv.num_blocks,
            block_size=self._block_size,
        )
        assert len(places) == rows, "every row has its own blocks"
        self._state.apply(places)
        step()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
        events[0].record()
        for event in events[1:]:
            step()
            event.record()
        torch.cuda.synchronize()
        return float(statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events)))


def with_choice(params: Params, choice: Choice) -> Params:
    """The same weights, with these kernels for any number of rows."""

    def chosen(weight: LinearWeight, name: str) -> LinearWeight:
        return replace(weight, tiles=(choice[name],) * len(M_BUCKETS))

    layers = tuple(
        replace(
            layer,
            qkv=chosen(layer.qkv, "qkv"),
            o=chosen(layer.o, "o"),
            gate_up=chosen(layer.gate_up, "gate_up"),
            down=chosen(layer.down, "down"),
        )
        for layer in params.layers
    )
    return replace(params, layers=layers, head=chosen(params.head, "head"))
