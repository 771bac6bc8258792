"""From a folder to weights: every layout that is read, every broken one refused with the reason."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mini_infer.exceptions import ModelNotFoundError, UnsupportedModelError
from mini_infer.graphs.params import LayerParams, Params
from mini_infer.kernels.linear import LinearWeight
from mini_infer.loader import find_model, load_params, read_model_files
from tests.tiny_models import make_tiny_model

CPU = torch.device("cpu")
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model by variant, made once."""
    made: dict[str, Path] = {}

    def get(variant: str) -> Path:
        if variant not in made:
            made[variant] = tmp_path_factory.mktemp(variant)
            make_tiny_model(variant, made[variant])
        return made[variant]

    return get


@pytest.fixture
def folder(models: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a tiny model, to be broken."""
    shutil.copytree(models("llama3-gqa"), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def plain_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights stay as matrices, so that they can be compared: oneDNN's layout is opaque."""
    monkeypatch.setattr("mini_infer.loader.pack_linear", lambda weight: weight)


def load(folder: Path, **options: Any) -> Params:
    files = read_model_files(folder)
    return load_params(files, **{"dtype": torch.float32, "device": CPU, "max_positions": 32, **options})


def leaves(value: object) -> Iterator[Tensor]:
    """Every tensor of the parameters, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, (Params, LayerParams, LinearWeight)):
        for item in fields(value):
            yield from leaves(getattr(value, item.name))


def assert_equal(ours: Params, expected: Params) -> None:
    for a, b in zip(leaves(ours), leaves(expected), strict=True):
        assert torch.equal(a, b)


def shard(folder: Path, num_shards: int) -> None:
    """Spread the one file of a model over several, with an index, as large models come."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for index in range(num_shards):
        name = f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[index::num_shards]}
        weight_map |= dict.fromkeys(part, name)
        save_file(part, folder / name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# Weights


@pytest.mark.parametrize("variant", ["llama3-gqa", "llama-biases", "qwen2", "qwen3", "llama-mqa-tied"])
def test_fused_matrices_are_their_parts(models: Callable[[str], Path], variant: str) -> None:
    """Every tensor of the file is in its place, stacked with its neighbours where they are used together."""
    params = load(models(variant))
    tensors = load_file(models(variant) / "model.safetensors")
    used = {"model.embed_tokens.weight", "model.norm.weight"}

    def check(ours: LinearWeight, *names: str, norm: str | None = None) -> None:
        for kind, value in (("weight", ours.weight), ("bias", ours.bias)):
            parts = [f"{name}.{kind}" for name in names]
            if value is None:
                assert not set(parts) & set(tensors)
                continue
            expected = torch.cat([tensors[part] for part in parts])
            if norm is not None and kind == "weight":  # the norm's weight is in the columns
                expected = expected * tensors[norm]
                used.add(norm)
            assert torch.equal(value, expected)
            used.update(parts)
        assert ours.weight is not None
        assert (ours.out_features, ours.in_features) == ours.weight.shape

    assert torch.equal(params.embedding, tensors["model.embed_tokens.weight"])
    assert torch.equal(params.norm, tensors["model.norm.weight"])
    for index, layer in enumerate(params.layers):
        prefix = f"model.layers.{index}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        projections = [f"{attention}.{name}_proj" for name in "qkv"]
        check(layer.qkv, *projections, norm=f"{prefix}.input_layernorm.weight")
        check(layer.o, f"{attention}.o_proj")
        norm = f"{prefix}.post_attention_layernorm.weight"
        check(layer.gate_up, f"{mlp}.gate_proj", f"{mlp}.up_proj", norm=norm)
        check(layer.down, f"{mlp}.down_proj")
        for ours, name in (
            (layer.q_norm, f"{attention}.q_norm.weight"),
            (layer.k_norm, f"{attention}.k_norm.weight"),
        ):
            assert (ours is None) == (name not in tensors)
            if ours is not None:
                assert torch.equal(ours, tensors[name])
                used.add(name)
    if "lm_head.weight" in tensors:
        check(params.head, "lm_head")
    assert used == set(tensors)


def test_a_tied_head_is_the_embedding(models: Callable[[str], Path]) -> None:
    """The same memory when tied; its own when not."""
    tied, untied = load(models("llama-mqa-tied")), load(models("llama3-gqa"))
    assert tied.head.weight is tied.embedding
    assert untied.head.weight is not None
    assert not torch.equal(untied.head.weight, untied.embedding)


def test_a_tied_head_ignores_a_stored_one(models: Callable[[str], Path], tmp_path: Path) -> None:
    """Some checkpoints store the tied head too; the config decides, as it does in the library."""
    shutil.copytree(models("llama-mqa-tied"), tmp_path / "model")
    change_tensors(tmp_path / "model", lambda t: t.update({"lm_head.weight": torch.zeros(320, 64)}))
    params = load(tmp_path / "model")
    assert params.head.weight is params.embedding


@pytest.mark.parametrize("num_shards", [2, 5])
def test_shards(folder: Path, num_shards: int) -> None:
    """Many files with an index give what one file gives."""
    expected = load(folder)
    shard(folder, num_shards)
    assert_equal(load(folder), expected)


def test_an_index_rules_out_other_files(folder: Path) -> None:
    """Only the files of the index are read: repositories also hold other formats' copies (consolidated.safetensors)."""
    expected = load(folder)
    shard(folder, 2)
    save_file({"model.norm.weight": torch.zeros(64)}, folder / "zzz-consolidated.safetensors")
    assert_equal(load(folder), expected)


def test_an_index_says_which_of_two_is_meant(folder: Path) -> None:
    """A tensor that two of its files hold, as some repositories have it."""
    expected = load(folder)
    shard(folder, 2)
    first, second = sorted(folder.glob("model-*.safetensors"))
    name = next(iter(load_file(first)))
    save_file({**load_file(second), name: load_file(first)[name] + 1}, second)
    assert_equal(load(folder), expected)


def test_one_file_rules_out_all_others(folder: Path) -> None:
    """A copy of the weights beside them, or an index of shards that are gone, as the Transformers library has it."""
    expected = load(folder)
    save_file(
        {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()},
        folder / "old_weights.safetensors",
    )
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "gone.safetensors"}}))
    assert_equal(load(folder), expected)


def test_a_tensor_in_two_files(folder: Path) -> None:
    """Which of them is meant nobody can know."""
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    save_file({"model.norm.weight": torch.zeros(64)}, folder / "other.safetensors")
    with pytest.raises(ModelNotFoundError, match=r"'model\.norm\.weight' in more than one file, weights\.safetensors"):
        load(folder)


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.down_proj.bias", "model.layers.1.self_attn.q_norm.weight", "model.layers.9.x"]
)
def test_tensors_without_a_place_are_refused(folder: Path, name: str) -> None:
    """A model that has them computes something else without them."""
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: torch.ones(64)}, folder / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=rf"1 tensors that a \w+ of its config\.json does not, '{name}'"):
        load(folder)


def test_tensors_that_are_no_loss(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Frequencies and scales of a quantized cache go without saying, what is outside of the decoder is named."""
    expected = load(folder)
    tensors = load_file(folder / "model.safetensors")
    extra = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.attn.k_scale"]
    save_file({**tensors, **{name: torch.ones(8) for name in extra}}, folder / "model.safetensors")
    assert_equal(load(folder), expected)
    assert not caplog.records
    save_file({**tensors, "score.weight": torch.ones(8)}, folder / "model.safetensors")
    assert_equal(load(folder), expected)
    assert "'score.weight'" in caplog.text


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.int8])
def test_quantized_tensors_are_refused(folder: Path, stored: torch.dtype) -> None:
    """Whether or not the config says that they are: without their scales their numbers mean nothing."""
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(stored)}, folder / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=rf"{name}' is {stored}: quantized"):
        load(folder)


def test_a_quantized_model_that_says_so_elsewhere(folder: Path) -> None:
    (folder / "hf_quant_config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match=r"has hf_quant_config\.json: its weights are quantized"):
        load(folder)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_the_stored_type_is_converted(folder: Path, stored: torch.dtype) -> None:
    """Checkpoints in half precision are computed in float32 on a CPU, from their own rounded values."""
    change_tensors(folder, lambda t: t.update({name: value.to(stored) for name, value in t.items()}))
    params = load(folder)
    expected = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert params.embedding.dtype == torch.float32
    assert torch.equal(params.embedding, expected.float())
    assert all(tensor.dtype == torch.float32 for tensor in leaves(params.layers))


def test_rope_tables_reach_as_far_as_asked(models: Callable[[str], Path]) -> None:
    """One row for each position, position 0 unrotated."""
    params = load(models("llama3-gqa"), max_positions=77)
    assert params.cos.shape == params.sin.shape == (77, 4)
    assert params.cos[0].tolist() == [1.0] * 4
    assert params.sin[0].tolist() == [0.0] * 4


# Random weights


def test_dummy_weights_by_seed(models: Callable[[str], Path], tmp_path: Path) -> None:
    """The same seed gives the same weights, another one others; no safetensors is needed."""
    shutil.copy(models("qwen3") / "config.json", tmp_path)
    first, again, other = (load(tmp_path, dummy_seed=seed) for seed in (5, 5, 6))
    assert_equal(first, again)
    assert not torch.equal(first.embedding, other.embedding)
    assert all(torch.isfinite(tensor).all() for tensor in leaves(first))


def test_dummy_weights_differ_between_tensors(models: Callable[[str], Path]) -> None:
    """No two layers alike: a mix-up of layers would go unnoticed. Norms are near 1."""
    params = load(models("qwen3"), dummy_seed=0)
    first, second = (layer.qkv.weight for layer in params.layers[:2])
    assert first is not None and second is not None and not torch.equal(first, second)
    for norm in (params.norm, params.layers[0].q_norm, params.layers[0].k_norm):
        assert norm is not None
        assert norm.mean().item() == pytest.approx(1.0, abs=0.05)
    assert params.embedding.std().item() == pytest.approx(0.02, rel=0.1)


def test_dummy_weights_leave_the_global_generator_alone(models: Callable[[str], Path]) -> None:
    """Starting an engine does not change what the user's own program draws."""
    folder = models("qwen3")  # made first: that draws
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load(folder, dummy_seed=1)
    assert torch.equal(torch.rand(3), expected)


# What is missing or broken


def test_missing_shard(folder: Path) -> None:
    """An interrupted download: the missing files are named."""
    shard(folder, 3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match=r"not there: model-00002-of-00003\.safetensors"):
        load(folder)


def test_broken_index(folder: Path) -> None:
    """An index that names nothing, or is no JSON."""
    shard(folder, 2)
    for text in ("{}", '{"weight_map": {}}', '{"weight_map": 3}', '{"weight_map": {"a": 1, "b": "c"}}', "{", "[]"):
        (folder / INDEX).write_text(text)
        with pytest.raises(ModelNotFoundError, match=INDEX):
            load(folder)


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.k_proj.weight", "model.embed_tokens.weight", "lm_head.weight"]
)
def test_missing_tensor(folder: Path, name: str) -> None:
    """Named, with the folder."""
    change_tensors(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(ModelNotFoundError, match=name) as raised:
        load(folder)
    assert str(folder) in str(raised.value)


def test_wrong_shape(folder: Path) -> None:
    """Both shapes are in the message. A transposed matrix must not pass as its fused neighbour."""
    change_tensors(folder, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(64, 96)}))
    with pytest.raises(UnsupportedModelError, match=r"up_proj.*\(64, 96\).*\(96, 64\)"):
        load(folder)


def test_no_safetensors(folder: Path) -> None:
    """Only pickled weights: said, with the way out."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelNotFoundError, match=r"no \*\.safetensors.*load_format='dummy'"):
        load(folder)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\x10\x00\x00\x00\x00\x00\x00\x00{]"])
def test_broken_safetensors(folder: Path, content: bytes) -> None:
    """A truncated or foreign file is named."""
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelNotFoundError, match=r"model\.safetensors cannot be read"):
        load(folder)


def test_truncated_safetensors(folder: Path) -> None:
    """A download that stopped in the middle of the data."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelNotFoundError, match=r"model\.safetensors cannot be read"):
        load(folder)


@pytest.mark.parametrize("content", [b"{", b"", b"[1, 2]", b'"text"', b"\xff\xfe\x00"])
def test_broken_config(folder: Path, content: bytes) -> None:
    """config.json that is no JSON object, or no text."""
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        read_model_files(folder)


@pytest.mark.parametrize("changes", [{"hidden_size": "many"}, {"model_type": None}, {"model_type": "no-such-type"}])
def test_a_config_that_cannot_be(folder: Path, changes: dict[str, Any]) -> None:
    """Our own error, with the file and the reason on one line."""
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=r"config\.json") as raised:
        read_model_files(folder)
    assert "\n" not in str(raised.value)


def test_a_config_that_brings_code_runs_none(folder: Path) -> None:
    """The model's code is never run, and nobody is asked whether it may."""
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.EvilConfig"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass EvilConfig: pass\n")
    assert read_model_files(folder).spec.num_layers == 3
    assert not (folder / "ran").exists()


def test_eos_of_both_configs(folder: Path) -> None:
    """config.json and generation_config.json may name one token or several; all of them end a text."""

    def write(config_eos: object, generation_eos: object) -> frozenset[int]:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": config_eos}))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_eos}))
        return read_model_files(folder).eos_token_ids

    assert write(1, [5, 6]) == {1, 5, 6}
    assert write([1, 2], 7) == {1, 2, 7}
    assert write(None, None) == frozenset()
    (folder / "generation_config.json").unlink()
    assert read_model_files(folder).eos_token_ids == frozenset()
    assert write([[1]], ["2", True, 3]) == {3}, "what is no id says nothing"


# Finding


def test_a_local_folder_wins(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative and home paths too, and even where the name looks like one of the hub."""
    assert find_model(str(folder)) == folder
    (folder.parent / "owner").mkdir()
    shutil.copytree(folder, folder.parent / "owner" / "name")
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_model("owner/name") == Path("owner/name")
    assert find_model("./model") == Path("model")
    assert find_model("~/model") == folder


def test_no_config(folder: Path) -> None:
    """A folder that is there but holds no model."""
    (folder / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        find_model(str(folder))


@pytest.mark.parametrize("name", ["/no/such/folder", "./no-such-folder", "~/no-such-folder", "a/b/c"])
def test_missing_folder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path is a path: the hub is not asked for it."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ModelNotFoundError, match="no model folder at"):
        find_model(name)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "bad name!", "-", "owner/name."])
def test_unknown_name_offline(name: str, tmp_path: Path) -> None:
    """Says what was tried, on one line, at once: offline the library reads its cache only, and waits for nobody."""
    code = (
        "import sys, time\n"
        "waited = []\n"
        "network = ('socket.connect', 'socket.getaddrinfo')\n"
        "sys.addaudithook(lambda event, _: waited.append(event) if event in network else None)\n"
        "time.sleep = lambda seconds: waited.append('sleep')\n"
        "from mini_infer.loader import find_model\n"
        "from mini_infer.exceptions import ModelNotFoundError\n"
        "try: find_model(sys.argv[1])\n"
        "except ModelNotFoundError as error: print(error)\n"
        "print(waited)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, name],
        env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True,
    )  # fmt: skip
    message, waited = done.stdout.splitlines()
    for part in (repr(name), "no local folder", "Hugging Face hub", "HF_TOKEN"):
        assert part in message
    assert waited == "[]"


def test_the_hub_is_asked_for_what_is_needed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights only when they are wanted, and once: not the pickled ones, nor those in another layout."""
    asked: list[list[str]] = []

    def fake(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert name == "owner/name"
        assert fnmatch("consolidated.00.safetensors", *ignore_patterns)
        assert not fnmatch("model-00001-of-00002.safetensors", *ignore_patterns)
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    assert find_model("owner/name") == folder
    assert find_model("owner/name", weights=False) == folder
    assert find_model("owner/name", code=True) == folder
    assert "*.safetensors" in asked[0]
    assert "*.safetensors" not in asked[1]
    assert {"*.json", "tokenizer.model", "merges.txt"} <= set(asked[1])
    assert not [pattern for pattern in asked[0] if "bin" in pattern or "py" in pattern or pattern == "*"]
    assert "*.py" in asked[2]


def test_a_connection_that_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the libraries beneath raise then."""

    class ProtocolError(Exception):
        pass

    def fake(name: str, **patterns: list[str]) -> str:
        raise ProtocolError("peer closed connection\nwithout a word")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    with pytest.raises(ModelNotFoundError, match=r"ProtocolError: peer closed connection\).*not fetched again"):
        find_model("owner/name")
