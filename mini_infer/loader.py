"""From a model's name or folder to its spec and its weights on the device."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from mini_infer.exceptions import ModelNotFoundError, UnsupportedModelError
from mini_infer.graphs.params import LayerParams, Params, rope_tables
from mini_infer.graphs.spec import ModelSpec
from mini_infer.kernels.linear import LinearWeight, fold_norm, pack_linear, with_tiles
from mini_infer.kernels.linear_plan import LinearPlan

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
DOWNLOAD_PATTERNS = ("*.safetensors", "*.json", "tokenizer.model", "merges.txt", "*.jinja")
CODE_PATTERNS = ("*.py", "*.tiktoken")
"""A tokenizer's own code, and what such code reads; fetched with ``trust_remote_code`` only."""
IGNORED_PATTERNS = ["consolidated*"]
"""The same weights once more, in another format, that some repositories hold beside the usual ones."""
HARMLESS_TENSORS = ("rotary_emb.inv_freq", ".k_scale", ".v_scale", ".kv_scale")
"""Ends of names of tensors that the engine does without: it works out frequencies itself, and quantizes no cache."""
DUMMY_STD = 0.02
QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""How a checkpoint's weights are quantized, where its config does not say so."""
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Of a checkpoint's tensors. Quantized ones hold numbers that mean nothing without their scales."""

logger = logging.getLogger(__name__)

GetTensor = Callable[[str, tuple[int, ...]], Tensor]
"""(name in the checkpoint, expected shape) -> the tensor, in the engine's dtype on its device."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model's folder and what its JSON files say.

    Attributes:
        folder: Where config, weights and tokenizer are.
        spec: The model's static facts.
        eos_token_ids: Tokens that end a text, of the config and the generation config.
    """

    folder: Path
    spec: ModelSpec
    eos_token_ids: frozenset[int]


def find_model(name_or_path: str, *, weights: bool = True, code: bool = False) -> Path:
    """Folder of a model: a local one as it is, a Hugging Face name from the hub or its cache.

    Args:
        name_or_path: Local folder, or ``owner/name`` on the Hugging Face hub.
        weights: False leaves the weights where they are and fetches only the small files.
        code: Fetch the tokenizer's own code, too, if there is any.

    Raises:
        ModelNotFoundError: there is no such folder, and the hub does not have it or cannot be reached.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelNotFoundError(f"{folder} has no config.json; give a folder in the Hugging Face format")
        return folder
    if folder.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1:
        raise ModelNotFoundError(f"no model folder at {folder}")
    from huggingface_hub import snapshot_download

    patterns = [pattern for pattern in DOWNLOAD_PATTERNS if weights or pattern != "*.safetensors"]
    patterns += CODE_PATTERNS if code else ()
    try:
        return Path(snapshot_download(name_or_path, allow_patterns=patterns, ignore_patterns=IGNORED_PATTERNS))
    except Exception as error:  # the hub's own, and whatever the libraries beneath it raise when a connection breaks
        raise ModelNotFoundError(
            f"no model {name_or_path!r}: there is no local folder of that name, and the Hugging Face hub did not "
            f"give it ({type(error).__name__}: {_first_line(error)}). Check the name, the network and, for gated "
            "models, the access token (HF_TOKEN); or give a local folder. What was fetched already is not fetched again"
        ) from error


def read_model_files(folder: Path) -> ModelFiles:
    """Read the JSON files of a model's folder.

    Raises:
        ModelNotFoundError: config.json is missing or is no JSON.
        UnsupportedModelError: an architecture or option that the engine does not run.
    """
    path = folder / "config.json"
    config = _read_json(path)
    try:
        spec = ModelSpec.from_config(config)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{path}: {error}") from error
    for name in QUANTIZATION_FILES:
        if (folder / name).exists():
            raise UnsupportedModelError(f"{folder} has {name}: its weights are quantized, and the engine runs none")
    generation = folder / "generation_config.json"
    eos = _as_ids(config.get("eos_token_id"))
    if generation.is_file():
        eos |= _as_ids(_read_json(generation).get("eos_token_id"))
    return ModelFiles(folder, spec, eos)


def load_params(
    files: ModelFiles,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_positions: int,
    dummy_seed: int | None = None,
    progress: bool = False,
) -> Params:
    """Load the weights, fused and packed for the device.

    Args:
        files: The model.
        dtype: Type of the weights.
        device: Where they go.
        max_positions: Rows of the RoPE tables.
        dummy_seed: Make random weights of this seed, and read no file; None reads the safetensors.
        progress: Show a progress bar when the output is a terminal.

    Raises:
        ModelNotFoundError: no safetensors, or a tensor is missing from them.
        UnsupportedModelError: a tensor has another shape than the config says, is quantized, or has no place in the
            architecture.
    """
    spec = files.spec
    bar = tqdm(total=spec.num_layers + 2, desc="weights", unit="layer", disable=None if progress else True)
    with bar:
        if dummy_seed is not None:
            return _planned(_assemble(spec, _dummy_tensors(dummy_seed, dtype, device), device, max_positions, bar))
        with _Checkpoint(files.folder) as checkpoint:

            def get(name: str, shape: tuple[int, ...]) -> Tensor:
                return checkpoint.get(name, shape).to(device=device, dtype=dtype)

            params = _planned(_assemble(spec, get, device, max_positions, bar))
            checkpoint.check_all_used(spec)
            return params


def _assemble(spec: ModelSpec, get: GetTensor, device: torch.device, max_positions: int, bar: tqdm[Any]) -> Params:
    """Ask for every tensor by its Hugging Face name and fuse what is used together."""
    embedding = get("model.embed_tokens.weight", (spec.vocab_size, spec.hidden_size))
    bar.update()
    layers = []
    for index in range(spec.num_layers):
        layers.append(_layer(spec, get, f"model.layers.{index}"))
        bar.update()
    head = embedding
    if not spec.tie_word_embeddings:
        head = get("lm_head.weight", (spec.vocab_size, spec.hidden_size))
    cos, sin = rope_tables(spec, max_positions, device)
    params = Params(
        embedding=embedding,
        layers=tuple(layers),
        norm=get("model.norm.weight", (spec.hidden_size,)),
        head=_linear_weight(head, None),
        cos=cos,
        sin=sin,
    )
    bar.update()
    return params


def _planned(params: Params) -> Params:
    """Attach the kernels that were measured for each product on this GPU; without measurements cuBLAS does them all."""
    if not params.embedding.is_cuda:
        return params
    plan = LinearPlan.for_gpu(torch.cuda.get_device_name(params.embedding.device))
    if not plan.measured:
        return params
    layers = tuple(
        replace(
            layer,
            qkv=with_tiles(layer.qkv, plan, "norm"),
            o=with_tiles(layer.o, plan, "add"),
            gate_up=with_tiles(layer.gate_up, plan, "norm_gate"),
            down=with_tiles(layer.down, plan, "add"),
        )
        for layer in params.layers
    )
    return replace(params, layers=layers, head=with_tiles(params.head, plan, "plain"))


def _layer(spec: ModelSpec, get: GetTensor, prefix: str) -> LayerParams:
    hidden, inner = spec.hidden_size, spec.intermediate_size
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"

    def normed(norm: str, parts: list[tuple[str, int]], bias: bool) -> LinearWeight:
        """Projections of the normed residual stream, stacked."""
        weights = torch.cat([get(f"{name}.weight", (rows, hidden)) for name, rows in parts])
        biases = [get(f"{name}.bias", (rows,)) for name, rows in parts] if bias else None
        fold_norm(weights, get(f"{prefix}.{norm}.weight", (hidden,)))
        return _linear_weight(weights, torch.cat(biases) if biases else None)

    def alone(name: str, width: int, bias: bool) -> LinearWeight:
        return _linear_weight(get(f"{name}.weight", (hidden, width)), get(f"{name}.bias", (hidden,)) if bias else None)

    qkv = [
        (f"{attention}.q_proj", spec.q_size),
        (f"{attention}.k_proj", spec.kv_size),
        (f"{attention}.v_proj", spec.kv_size),
    ]
    gate_up = [(f"{mlp}.gate_proj", inner), (f"{mlp}.up_proj", inner)]
    return LayerParams(
        qkv=normed("input_layernorm", qkv, spec.qkv_bias),
        q_norm=get(f"{attention}.q_norm.weight", (spec.head_dim,)) if spec.qk_norm else None,
        k_norm=get(f"{attention}.k_norm.weight", (spec.head_dim,)) if spec.qk_norm else None,
        o=alone(f"{attention}.o_proj", spec.q_size, spec.o_bias),
        gate_up=normed("post_attention_layernorm", gate_up, spec.mlp_bias),
        down=alone(f"{mlp}.down_proj", inner, spec.mlp_bias),
    )


def _linear_weight(weight: Tensor, bias: Tensor | None) -> LinearWeight:
    plain = LinearWeight(
        weight=weight, bias=bias, packed=None, out_features=weight.shape[0], in_features=weight.shape[1]
    )
    return pack_linear(plain) if weight.device.type == "cpu" else plain


def _dummy_tensors(seed: int, dtype: torch.dtype, device: torch.device) -> GetTensor:
    """Random weights: norms near 1, the rest normal with a standard deviation of 0.02."""
    generator = torch.Generator(device).manual_seed(seed)

    def get(name: str, shape: tuple[int, ...]) -> Tensor:
        values = torch.empty(shape, dtype=dtype, device=device).normal_(0.0, DUMMY_STD, generator=generator)
        return values.add_(1.0) if name.endswith("norm.weight") else values

    return get


class _Checkpoint:
    """Tensors of one or many safetensors files by name. A context manager: the files stay mapped inside it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: list[Any] = []
        self._file_of: dict[str, Any] = {}
        self._used: set[str] = set()

    def __enter__(self) -> _Checkpoint:
        for path, listed in self._sources():
            try:
                file = safe_open(path, framework="pt").__enter__()
            except (SafetensorError, OSError) as error:
                self.__exit__()
                raise ModelNotFoundError(f"{path} cannot be read as safetensors: {error}") from error
            self._files.append(file)
            held = file.keys()
            names = [name for name in held if listed is None or name in listed]
            twice = [name for name in names if name in self._file_of]
            if twice:
                self.__exit__()
                raise ModelNotFoundError(
                    f"{self._folder} holds tensor {twice[0]!r} in more than one file, {path.name} among them; leave "
                    f"only the files of one model, or name them in {INDEX_NAME}"
                )
            self._file_of.update(dict.fromkeys(names, file))
        return self

    def __exit__(self, *exc: object) -> None:
        for file in self._files:
            file.__exit__(None, None, None)

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        self._used.add(name)
        file = self._file_of.get(name)
        if file is None:
            raise ModelNotFoundError(
                f"{self._folder} has no tensor {name!r} in its {len(self._files)} safetensors files; the checkpoint "
                "is incomplete, or of another model than its config.json says"
            )
        tensor: Tensor = file.get_tensor(name)
        if tensor.dtype not in WEIGHT_DTYPES:
            raise UnsupportedModelError(
                f"tensor {name!r} is {tensor.dtype}: quantized weights are not supported, only floating point of at "
                "least 16 bits"
            )
        if tuple(tensor.shape) != shape:
            raise UnsupportedModelError(
                f"tensor {name!r} has shape {tuple(tensor.shape)}, but the config asks for {shape}"
            )
        return tensor

    def check_all_used(self, spec: ModelSpec) -> None:
        """See that no tensor of the decoder was left over: the model would compute something else with it.

        Raises:
            UnsupportedModelError: there are such tensors.
        """
        unused = [name for name in self._file_of if name not in self._used and not name.endswith(HARMLESS_TENSORS)]
        decoder = [name for name in unused if name.startswith("model.")]
        if decoder:
            raise UnsupportedModelError(
                f"{self._folder} has {len(decoder)} tensors that a {spec.architecture} of its config.json does not, "
                f"{decoder[0]!r} among them: the model is another one, and would be run wrongly"
            )
        others = [name for name in unused if name != "lm_head.weight"]  # a copy of the embedding, where they are tied
        if others:
            logger.warning("%s has tensors that are not used, %r among them", self._folder, others[0])

    def _sources(self) -> Iterator[tuple[Path, set[str] | None]]:
        """The files of the weights, as the Transformers library chooses them; other files may hold other weights.

        Yields:
            (file, which of its tensors count; None for all)
        """
        if (self._folder / WEIGHTS_NAME).is_file():
            yield self._folder / WEIGHTS_NAME, None
            return
        index = self._folder / INDEX_NAME
        if index.is_file():
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ModelNotFoundError(f"{index} has no 'weight_map': it names no files")
            if not all(isinstance(name, str) for name in weight_map.values()):
                raise ModelNotFoundError(f"{index} names something that is no file in its 'weight_map'")
            names = sorted(set(weight_map.values()))
            missing = [name for name in names if not (self._folder / name).is_file()]
            if missing:
                raise ModelNotFoundError(f"{index} names files that are not there: {', '.join(missing)}")
            for name in names:
                yield self._folder / name, {tensor for tensor, file in weight_map.items() if file == name}
            return
        paths = sorted(self._folder.glob("*.safetensors"))
        if not paths:
            raise ModelNotFoundError(
                f"{self._folder} has no *.safetensors; only the safetensors format is read (load_format='dummy' runs "
                "random weights of the model's shape)"
            )
        for path in paths:
            yield path, None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: no JSON, or no text at all
        raise ModelNotFoundError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelNotFoundError(f"{path} holds no JSON object")
    return value


def _as_ids(value: object) -> frozenset[int]:
    values = value if isinstance(value, list) else [value]
    return frozenset(each for each in values if isinstance(each, int) and not isinstance(each, bool))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no details")
