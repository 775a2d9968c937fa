"""Names that a checkpoint gives: none of them leads out of the folder that is written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from converters.errors import MbxError, StorageError, UsageError
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run
from mbx.run.journal import FOLDER
from mbx.untrusted.names import create, inside, is_inside

ROOT = Path(__file__).resolve().parent.parent.parent
LLAMA = ROOT / "fixtures" / "tiny" / "llama"
OUTSIDE = ["../x", "a/../../x", "/etc/x", "", ".", "..", "a//b", "./a", "a/.", "a\\..\\x", "a\0b"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_leave_their_folder(name: str) -> None:
    assert not is_inside(name)
    with pytest.raises(StorageError, match="does not lie in its folder"):
        inside(name, "a layout")


@pytest.mark.parametrize("name", ["x.safetensors", "text_encoder/model.safetensors", "..x", "a..b/c"])
def test_names_that_stay(name: str) -> None:
    assert inside(name, "a layout") == name


@pytest.mark.parametrize("name", [*OUTSIDE, "config.json", "x.py", 7, None, "model.safetensors/../../x.safetensors"])
def test_a_layout_names_safetensors_files_of_its_folder_alone(tmp_path: Path, name: object) -> None:
    run(plan_hf_to_mcore(LLAMA, tmp_path / "ckpt", Options()))
    (layout,) = (tmp_path / "ckpt").rglob("mbx_layout.json")
    stored = json.loads(layout.read_text())
    stored["files"][0]["file"] = name
    layout.write_text(json.dumps(stored))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StorageError):
        run(plan_mcore_to_hf(tmp_path / "ckpt", tmp_path / "hf", Options()))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_layout_names_each_file_once(tmp_path: Path) -> None:
    run(plan_hf_to_mcore(LLAMA, tmp_path / "ckpt", Options()))
    (layout,) = (tmp_path / "ckpt").rglob("mbx_layout.json")
    stored = json.loads(layout.read_text())
    stored["files"] *= 2
    layout.write_text(json.dumps(stored))
    with pytest.raises(StorageError, match="twice"):
        plan_mcore_to_hf(tmp_path / "ckpt", tmp_path / "hf", Options())


@pytest.mark.parametrize("link", ["file", "folder"])
def test_what_is_written_follows_no_link(tmp_path: Path, link: str) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "x").write_text("precious")
    if link == "file":
        (tmp_path / "root" / "x").symlink_to(tmp_path / "precious" / "x")
        name = "x"
    else:
        (tmp_path / "root" / "sub").symlink_to(tmp_path / "precious")
        name = "sub/x"
    with pytest.raises(StorageError, match="link"):
        create(tmp_path / "root", name)
    assert (tmp_path / "precious" / "x").read_text() == "precious"


def test_a_resumed_run_follows_no_link(tmp_path: Path) -> None:
    """A folder of work that somebody prepared, with a link where a weight file will be."""
    job = plan_hf_to_mcore(LLAMA, tmp_path / "ckpt", Options(resume=True))
    work = tmp_path / "ckpt.partial"
    (work / FOLDER).mkdir(parents=True)
    (tmp_path / "precious").write_text("precious")
    (work / "iter_0000000").mkdir()
    (work / "iter_0000000" / ".metadata").symlink_to(tmp_path / "precious")
    with pytest.raises(UsageError, match="is a link"):
        run(job)
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_folder_of_work_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "ckpt.partial").symlink_to(tmp_path / "elsewhere")
    for options in (Options(), Options(overwrite=True), Options(resume=True)):
        with pytest.raises(MbxError, match="is a link"):
            run(plan_hf_to_mcore(LLAMA, tmp_path / "ckpt", options))
    assert not any((tmp_path / "elsewhere").iterdir())


def test_side_files_that_do_not_travel_are_told(tmp_path: Path) -> None:
    model = Path(shutil.copytree(LLAMA, tmp_path / "model"))
    (tmp_path / "secret").write_text("mine")
    (model / "tokenizer.json").unlink()
    os.mkfifo(model / "tokenizer.json")
    (model / "vocab.json").symlink_to(tmp_path / "secret")
    job = plan_hf_to_mcore(model, tmp_path / "ckpt", Options())
    told = [note for note in job.plan.notes if note.startswith("not carried")]
    assert [note.split(", ")[0] for note in told] == ["not carried: `tokenizer.json`", "not carried: `vocab.json`"]
    assert "no regular file" in told[0] and "a link that leads out" in told[1]
    run(job)
    assert not list((tmp_path / "ckpt").rglob("tokenizer.json")) + list((tmp_path / "ckpt").rglob("vocab.json"))
