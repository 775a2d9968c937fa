"""Folders as they lie on people's disks: what is said leads whoever does not know the cause to the fix in one step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _cli import Run
from safetensors.torch import load_file, save_file

from fixtures.make_tiny import make

WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"


@pytest.fixture
def base(here: Path) -> Path:
    return make("llama", here / "base")


@pytest.fixture
def lora(base: Path) -> Path:
    """An adapter of rank 2 on the queries."""
    folder = base.parent / "lora"
    folder.mkdir()
    config = json.loads((base / "config.json").read_text())
    width, heads = config["hidden_size"], config["num_attention_heads"]
    rows = heads * config.get("head_dim", width // heads)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        module = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors |= {f"{module}.lora_A.weight": torch.ones(2, width), f"{module}.lora_B.weight": torch.ones(rows, 2)}
    save_file(tensors, folder / ADAPTER)
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def edit(path: Path, **keys: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def pointer(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(POINTER)


def page(folder: Path) -> None:
    (folder / WEIGHTS).write_text("<!DOCTYPE html><html><head><title>Sign in</title></head></html>" * 9)


def dangling(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("../../blobs/abcdef")


def dangling_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("../../blobs/abcdef")


def pickled_pointer(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_text(POINTER)


def broken_off(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / f"{WEIGHTS}.incomplete")


def gguf(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model-q4.gguf")


def mlx(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = torch.zeros(tensors[name].shape[0], 8, dtype=torch.uint32)
    save_file(tensors, folder / WEIGHTS)
    said = {"group_size": 64, "bits": 4}
    edit(folder / "config.json", quantization=said, quantization_config=said)


def one_scale_missing(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    for name in [name for name in tensors if "_proj" in name]:
        tensors |= {name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale": torch.tensor(0.1)}
    del tensors["model.layers.0.self_attn.q_proj.weight_scale"]
    save_file(tensors, folder / WEIGHTS)
    edit(folder / "config.json", quantization_config={"quant_method": "fp8"})


def unknown_rope(folder: Path) -> None:
    edit(folder / "config.json", rope_scaling={"rope_type": "magic", "factor": 2.0})


BASES: dict[str, tuple[Callable[[Path], object], int, tuple[str, ...]]] = {
    "Git LFS pointer": (pointer(WEIGHTS), 4, ("a Git LFS pointer of", "git lfs pull", "hf download")),
    "pointer of a config": (pointer("config.json"), 4, ("config.json: a Git LFS pointer", "git lfs pull")),
    "pointer of a pickle": (pickled_pointer, 4, ("pytorch_model.bin: a Git LFS pointer", "git lfs pull")),
    "page": (page, 4, ("a web page of", "saved under this name", "hf auth login")),
    "empty": (lambda folder: (folder / WEIGHTS).write_bytes(b""), 4, ("an empty file", "hf download")),
    "dangling link": (dangling, 4, ("a link to `../../blobs/abcdef`, which is not there", "cp -rL")),
    "dangling config": (dangling_config, 4, ("a link to `../../blobs/abcdef`, which is not there", "cp -rL")),
    "interrupted download": (broken_off, 4, (f"{WEIGHTS}.incomplete", "a download was broken off", "goes on")),
    "GGUF": (gguf, 4, ("`model-q4.gguf` was made from a model's safetensors",)),
    "MLX": (mlx, 3, ("is MLX's", "mlx_lm.convert --hf-path DIR --mlx-path PLAIN -d")),
    "a scale missing": (one_scale_missing, 3, ("q_proj.weight` is stored as F8_E4M3, and its scales are not beside",)),
    "absent": (unknown_rope, 2, ("'magic' is none that this table takes",)),
}


@pytest.mark.parametrize("name", BASES)
def test_what_lies_in_a_files_place_is_named_with_the_way_out(mbx: Run, base: Path, name: str) -> None:
    spoil, code, words = BASES[name]
    spoil(base)
    said = mbx("convert", "hf-to-mcore", "base", "ckpt")
    assert said.code == code and [word for word in words if word not in said.stderr] == []
    assert "allow-unused" not in said.stderr and not Path("ckpt").exists()


def without_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def without_factor(folder: Path) -> None:
    tensors = load_file(folder / ADAPTER)
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    save_file(tensors, folder / ADAPTER)


def other_kind(folder: Path) -> None:
    edit(folder / "adapter_config.json", peft_type="LOHA")


ADAPTERS: dict[str, tuple[Callable[[Path], object], int, tuple[str, ...]]] = {
    "pointer": (pointer(ADAPTER), 4, ("a Git LFS pointer of", "git lfs pull")),
    "no config": (without_config, 4, (f"has `{ADAPTER}` and no `adapter_config.json`", "copy `adapter_config.json`")),
    "half of a pair": (
        without_factor,
        3,
        ("layers.0.self_attn.q_proj`: lora_A of the adapter is missing", "save the"),
    ),
    "another kind": (other_kind, 3, ("peft_type is 'LOHA'", "merge_and_unload")),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_an_adapter_lacks_is_named_with_the_way_out(mbx: Run, lora: Path, name: str) -> None:
    spoil, code, words = ADAPTERS[name]
    spoil(lora)
    said = mbx("convert", "merge", "base", "lora", "merged")
    assert said.code == code and [word for word in words if word not in said.stderr] == []
    assert not Path("merged").exists()


def test_a_folder_above_says_what_it_holds(mbx: Run, base: Path, lora: Path) -> None:
    actor = Path("global_step_3/actor")
    actor.mkdir(parents=True)
    shutil.move(lora, actor / "lora_adapter")
    said = mbx("convert", "merge", "base", actor, "merged")
    assert said.code == 4 and f"it holds peft adapter `{actor}/lora_adapter`" in said.stderr
    assert mbx("convert", "merge", "base", actor / "lora_adapter", "merged").code == 0
    cache = Path("hub/models--acme--tiny")
    shutil.copytree(base, cache / "snapshots" / ("a" * 40))
    said = mbx("convert", "hf-to-mcore", cache, "ckpt")
    assert said.code == 4 and f"name that: {cache}/snapshots/{'a' * 40}" in said.stderr


def test_an_adapter_of_an_adapted_model_goes_by_its_names(mbx: Run, lora: Path) -> None:
    assert mbx("convert", "merge", "base", "lora", "one").code == 0
    tensors = load_file(lora / ADAPTER)
    save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, lora / ADAPTER)
    assert mbx("convert", "merge", "base", "lora", "two").code == 0
    assert Path("one", WEIGHTS).read_bytes() == Path("two", WEIGHTS).read_bytes()


def test_a_config_may_be_named_as_a_file_and_must_be_there(mbx: Run, base: Path) -> None:
    assert mbx("convert", "hf-to-mcore", "base", "ckpt").code == 0
    assert mbx("verify", "parity", "base", "ckpt", "--hf-config", "base/config.json").code == 0
    said = mbx("verify", "parity", "base", "ckpt", "--hf-config", "ckpt")
    assert said.code == 4 and "`ckpt` has no `config.json`" in said.stderr and "--hf-config names" in said.stderr


def test_the_config_of_another_model_is_asked_for_first(mbx: Run, base: Path) -> None:
    make("qwen3", base.parent / "other")
    assert mbx("convert", "hf-to-mcore", "base", "ckpt").code == 0
    said = mbx("convert", "mcore-to-hf", "ckpt", "back", "--hf-config", "other")
    assert said.code == 3 and "is `other` the config of this very model?" in said.stderr


def test_a_waiver_outlives_a_change_of_layout(mbx: Run, base: Path) -> None:
    edit(base / "config.json", strange_key=3)
    assert mbx("convert", "hf-to-mcore", "base", "ckpt", "--allow-unused-key", "strange_key").code == 0
    assert mbx("convert", "reshard", "ckpt", "cut", "--tp", "2").code == 0
    assert mbx("verify", "parity", "base", "cut").code == 0
    assert mbx("convert", "mcore-to-hf", "cut", "back").code == 0
