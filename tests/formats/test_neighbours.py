"""What a run leaves alone: folders beside the target, and targets that are no checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from converters.errors import UsageError
from mbx.run.commit import PartialFolder, partial_path
from tests.formats._runs import convert, tree


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A folder to make, with the neighbours that people give it."""
    for name in ("ckpt.old", "ckpt.dead", "ckpt.bak"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "backup").write_text(name)
    (tmp_path / "ckpt.lock").write_text("mine")
    return tmp_path / "ckpt"


@pytest.mark.parametrize("overwrite", [False, True])
def test_folders_beside_the_target_stay(tiny: Path, target: Path, overwrite: bool) -> None:
    """`mv ckpt ckpt.old`, then convert to ckpt again: the old one is a user's backup."""
    before = tree(target.parent)
    for _ in range(2 if overwrite else 1):
        convert("hf-to-mcore", tiny / "llama", target, overwrite=overwrite)
    after = tree(target.parent)
    assert {name: after.get(name) for name in before} == before
    assert {name.split("/")[0] for name in set(after) - set(before)} == {"ckpt"}


@pytest.mark.parametrize("option", ["overwrite", "resume", None])
def test_a_folder_of_work_that_no_run_left_stays(tiny: Path, tmp_path: Path, option: str | None) -> None:
    target = tmp_path / "ckpt"
    mine = partial_path(target) / "deep" / "mine"
    mine.parent.mkdir(parents=True)
    mine.write_text("x")
    with pytest.raises(UsageError, match="no run of mbx left"):
        convert("hf-to-mcore", tiny / "llama", target, **({option: True} if option else {}))
    assert mine.read_text() == "x" and not target.exists()
    mine.unlink()
    with pytest.raises(UsageError, match="no run of mbx left"):  # an empty folder of the user's
        convert("hf-to-mcore", tiny / "llama", target)
    mine.parent.rmdir()  # the folder itself is what a run leaves that is killed as it begins
    convert("hf-to-mcore", tiny / "llama", target)
    assert target.is_dir() and not partial_path(target).exists()


def test_overwrite_replaces_checkpoints_alone(tiny: Path, tmp_path: Path) -> None:
    target = tmp_path / "home"
    target.mkdir()
    (target / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match=r"holds no checkpoint: `overwrite` would remove `thesis\.tex`"):
        convert("hf-to-mcore", tiny / "llama", target, overwrite=True)
    assert tree(target)
    convert("hf-to-mcore", tiny / "llama", tmp_path / "ckpt")
    (tmp_path / "ckpt" / "thesis.tex").write_text("x")  # beside a checkpoint it is nobody's but the user's
    with pytest.raises(UsageError, match=r"holds more than a checkpoint: `overwrite` would remove `thesis\.tex`"):
        convert("hf-to-mcore", tiny / "llama", tmp_path / "ckpt", overwrite=True)
    (tmp_path / "ckpt" / "thesis.tex").unlink()
    convert("hf-to-mcore", tiny / "llama", tmp_path / "ckpt", overwrite=True)
    assert (tmp_path / "ckpt" / "mbx_manifest.json").exists()


def test_a_target_that_appears_during_the_run_stays(tmp_path: Path) -> None:
    """The finished work stays as well."""
    target = tmp_path / "ckpt"
    with pytest.raises(UsageError, match="is not empty"), PartialFolder(target) as folder:
        (folder.path / "made").write_text("x")
        target.mkdir()
        (target / "config.json").write_text("{}")
        folder.commit()
    assert tree(target).keys() == {"config.json"} and tree(partial_path(target)).keys() == {"made"}
