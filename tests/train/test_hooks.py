"""A user's own functions in a run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from _trainings import raw, run_here

from converters.errors import StorageError, UsageError
from mbx.train.checkpoints.state import finished
from mbx.train.recipe.parse import parse_recipe
from mbx.train.run.hooks import Hooks, learned, load_hooks
from mbx.train.run.prepare import prepare

FILE = """
import torch

seen = []

def token_losses(losses, batch):
    assert losses.shape == batch["labels"].shape == batch["mask"].shape
    return scaled(losses)

def scaled(losses):
    return losses * FACTOR

def on_step(step):
    seen.append((step.step, step.loss))

def on_save(folder):
    (folder.parent / "saved.txt").open("a").write(folder.name + " ")
"""
SHORT: dict[str, dict[str, object]] = {
    "train": {"steps": 4, "eval_every": 2, "eval_steps": 1},
    "run": {"save_every": 2},
}


def hooks(tmp_path: Path, text: str = FILE, **words: object) -> Path:
    file = tmp_path / "own.py"
    for name, value in words.items():
        text = text.replace(name, repr(value))
    file.write_text(text)
    return file


def test_a_run_calls_them(tmp_path: Path) -> None:
    """A loss of half the size: the first step says half; what is saved is told when it is whole."""
    plain = run_here(raw(tmp_path / "plain", **SHORT))
    mine = run_here(raw(tmp_path / "mine", **SHORT), hooks=load_hooks(hooks(tmp_path, FACTOR=0.5)))
    assert mine[0] == pytest.approx(0.5 * plain[0], rel=1e-6)
    saved = (tmp_path / "mine" / "saved.txt").read_text().split()
    assert saved == [folder.name for folder in finished(tmp_path / "mine")]
    assert list(enumerate(mine, 1)) == sys.modules["mbx_hooks_own"].seen


def test_the_same_loss_is_the_same_run(tmp_path: Path) -> None:
    plain = run_here(raw(tmp_path / "plain", **SHORT))
    assert run_here(raw(tmp_path / "mine", **SHORT), hooks=load_hooks(hooks(tmp_path, FACTOR=1))) == plain


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def on_stop(step): pass", "`on_stop`, which no run calls"),
        ("x = 1", "no function that a run calls"),
        ("def on_step(:", "SyntaxError"),
        ("import nowhere_at_all", "line 1: ModuleNotFoundError"),
    ],
)
def test_a_file_that_holds_none_is_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        load_hooks(hooks(tmp_path, text))


def test_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no file"):
        load_hooks(tmp_path / "nothing.py")


def test_an_error_in_one_names_its_line(tmp_path: Path) -> None:
    found = load_hooks(hooks(tmp_path, "def on_step(step):\n    raise ValueError('mine')"))
    with pytest.raises(UsageError, match="own.py`, line 2: ValueError: mine"):
        run_here(raw(tmp_path / "run", **SHORT), hooks=found)


@pytest.mark.parametrize("wrong", [lambda losses: losses.sum(), lambda losses: losses.detach(), lambda _: None])
def test_what_is_no_loss_of_every_token_is_refused(wrong: object) -> None:
    losses = torch.ones(2, 3, requires_grad=True) * 2
    own = Hooks(token_losses=lambda given, _: wrong(given))  # type: ignore[operator]
    with pytest.raises(UsageError, match=r"differentiable \(2, 3\)"):
        learned(own, losses, {})


def test_no_recipe_names_code(tmp_path: Path) -> None:
    """Only who starts a run can name code; and with a loss of one's own, passes are not recorded."""
    with pytest.raises(UsageError, match="hooks"):
        parse_recipe(raw(tmp_path / "run", run={"hooks": "own.py"}))
    own = prepare(parse_recipe(raw(tmp_path / "run")), hooks=load_hooks(hooks(tmp_path, FACTOR=1)))
    assert own.recipe.train.cuda_graph == "off"
