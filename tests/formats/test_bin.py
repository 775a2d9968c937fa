"""`pytorch_model.bin`: read in place, never run, and exported as safetensors of the same tensors."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from converters.errors import StorageError
from converters.mcore.layout import Layout
from mbx.formats import hf
from mbx.formats.bin_weights import read_bin_folder
from mbx.proof.parity import parity
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run

PLAIN = Options(sync=False)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture(params=[1, 3], ids=["one file", "three shards"])
def source(tiny: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The tiny Llama as Transformers 4.30 would have saved it."""
    folder = tmp_path / "bin"
    shutil.copytree(tiny / "llama", folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    weights = weights_of(tiny / "llama")
    names, shards = sorted(weights), request.param
    files = {
        name: f"pytorch_model-{1 + i * shards // len(names):05d}-of-{shards:05d}.bin" for i, name in enumerate(names)
    }
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin")
        return folder
    for file in set(files.values()):
        torch.save({name: weights[name] for name in names if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def test_it_converts_there_and_back(source: Path, tiny: Path, tmp_path: Path) -> None:
    run(plan_hf_to_mcore(source, tmp_path / "mcore", Options(sync=False, layout=Layout(tp=2))))
    report = parity(tiny / "llama", tmp_path / "mcore")
    assert [leg.status for leg in report.legs] == ["passed"] * 3, report.legs
    run(plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "hf", PLAIN))
    wanted, got = weights_of(tiny / "llama"), weights_of(tmp_path / "hf")
    assert wanted.keys() == got.keys() and all(torch.equal(wanted[name], got[name]) for name in wanted)
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors*"))
    shards = [path.name for path in source.glob("*.bin")]
    assert len([name for name in files if name.endswith(".safetensors")]) == len(shards)
    if len(shards) > 1:
        index = json.loads((tmp_path / "hf" / hf.INDEX).read_text())["weight_map"]
        assert index.keys() == wanted.keys() and set(index.values()) < set(files)
    assert not list((tmp_path / "hf").glob("*.bin*"))


def test_views_of_one_storage_are_found_where_they_lie(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(6, 4)
    torch.save({"whole": base, "part": base[2:4]}, tmp_path / "pytorch_model.bin")
    tensors, files = read_bin_folder(tmp_path)
    whole, part = tensors["whole"].chunks[0], tensors["part"].chunks[0]
    assert part.start - whole.start == 8 * 4 and part.sizes == (2, 4) and files == ("pytorch_model.bin",)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("value", ["trap", "number", "strided"])
def test_anything_but_plain_tensors_is_refused(tmp_path: Path, value: str) -> None:
    content = {"trap": Trap(tmp_path / "sprung"), "number": 3, "strided": torch.ones(2, 3).T}[value]
    torch.save({"a": torch.ones(2), "b": content}, tmp_path / "pytorch_model.bin")
    with pytest.raises(StorageError):
        read_bin_folder(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_shards_and_index_must_agree(source: Path) -> None:
    files = sorted(source.glob("pytorch_model-*.bin"))
    if not files:
        pytest.skip("one file has no index")
    files[1].rename(source / "elsewhere")
    with pytest.raises(StorageError, match="is missing"):
        read_bin_folder(source)
    shutil.copy(files[0], files[1])
    with pytest.raises(StorageError, match="is in"):
        read_bin_folder(source)
    index = source / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../outside.bin"}}))
    with pytest.raises(StorageError, match="not in its folder"):
        read_bin_folder(source)


def test_safetensors_go_first(source: Path, tiny: Path) -> None:
    for path in (tiny / "llama").glob("*.safetensors*"):
        shutil.copy(path, source)
    assert all(name.endswith(".safetensors") for name in hf.open_hf(source).weight_files)
