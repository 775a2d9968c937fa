"""Deleting nothing: what stands around source and target stays as it is, under `--overwrite` and a kill at any moment.

The worlds are random, from seeds that a failure names. A source is foreign too.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from _cli import TINY
from _kills import die_at
from _worlds import COMMANDS, PLACES, Print, World, prints, put, settle, world
from safetensors.torch import load_file, save_file

from mbx.cli import main
from mbx.run import commit
from tests.formats._runs import in_child

#: Worlds of a command, and kills.
FEW, MANY = len(PLACES), 12 * len(PLACES)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of every kind: mbx's (`mcore`, `made`, `lora-mcore`) and other tools' (`hf`, `single`, `lora`)."""
    root = tmp_path_factory.mktemp("stock")
    hf = root / "hf"
    shutil.copytree(TINY / "llama", hf)
    tensors: dict[str, torch.Tensor] = {}
    for file in hf.glob("*.safetensors"):
        tensors |= load_file(file)
    (root / "single").mkdir()
    shutil.copy(hf / "config.json", root / "single")
    save_file(tensors, root / "single" / "model.safetensors", {"format": "pt"})
    (root / "lora").mkdir()
    factors = {}
    for name, weight in tensors.items():
        if name.endswith("q_proj.weight"):
            at = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{at}.lora_A.weight"] = torch.ones(4, weight.shape[1])
            factors[f"{at}.lora_B.weight"] = torch.ones(weight.shape[0], 4)
    save_file(factors, root / "lora" / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (root / "lora" / "adapter_config.json").write_text(json.dumps(config))
    for command, source, target, *options in (
        ("hf-to-mcore", hf, "mcore"),
        ("mcore-to-hf", root / "mcore", "made"),
        ("adapter-to-mcore", root / "lora", "lora-mcore", "--base", str(hf)),
    ):
        assert main(["-qq", "convert", command, str(source), str(root / target), *options]) == 0
    return root


def _run(made: World, monkeypatch: pytest.MonkeyPatch) -> int:
    with monkeypatch.context() as there:
        there.chdir(made.cwd)
        return main(made.words)


def _check_stays(made: World, before: Print, why: object) -> Print:
    """Everything foreign is as it was; returns what there is now."""
    after = prints(made.root)
    changed = {name for name, one in made.foreign(before).items() if after.get(name) != one}
    assert not changed, (made.words, made.told, why, sorted(changed))
    return after


def _check_worlds(stock: Path, root: Path, command: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(count):
        made = world(stock, root / str(seed), command, seed)
        before = prints(made.root)
        code = _run(made, monkeypatch)
        after = _check_stays(made, before, code)
        assert (code == 0) == made.succeeds, (made.words, made.told, code)
        result = str(made.target.relative_to(made.root))
        new = {name for name in set(after) - set(before) if not f"{result}/".startswith(f"{name}/")}
        assert all(made.succeeds and name.startswith(f"{result}/") for name in new), (made.words, made.told, new)
        shutil.rmtree(made.root)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_foreign_stays(stock: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _check_worlds(stock, tmp_path, command, FEW, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_foreign_stays_in_many_worlds(
    stock: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _check_worlds(stock, tmp_path, command, MANY, monkeypatch)


def test_a_loss_is_found(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted faults: without one of its checks, something foreign is gone."""
    for name in ("foreign", "foreign_in_work"):
        with monkeypatch.context() as planted, pytest.raises(AssertionError, match="convert"):
            planted.setattr(commit, name, lambda _: [])
            _check_worlds(stock, tmp_path / name, "hf-to-mcore", FEW, planted)


def _killed_world(stock: Path, root: Path, command: str, kind: str) -> World:
    work = settle(stock, root, command, random.Random(f"{command} {kind}"))
    put(stock, work / "dst", kind)
    sources, options = COMMANDS[command]
    words = ["-qq", "convert", command, *sources, "dst", "--overwrite", "--no-sync", "--workers", "1", *options]
    return World(root, words, work / "dst", True, str((work / "dst").relative_to(root)))


def _check_kills(stock: Path, root: Path, command: str, kills: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = {"mcore-to-hf": "single", "merge": "made"}.get(command, "bare")
    whole = _killed_world(stock, root / "whole", command, kind)
    old = prints(whole.target)
    status, text = in_child(partial(die_at, 0, whole.words, whole.cwd))
    assert status == 0, text
    new, total = _contents(whole.target), int(text)
    last = list(range(max(1, total - 8 - len(old)), total + 1))  # the exchange, and the removal of what was replaced
    points = range(1, total + 1) if kills >= total else random.Random(0).sample(last, min(len(last), kills))
    for at in points:
        made = _killed_world(stock, root / str(at), command, kind)
        before = prints(made.root)
        status, text = in_child(partial(die_at, at, made.words, made.cwd))
        assert status == -signal.SIGKILL, (at, total, text)
        _check_stays(made, before, at)
        aside = made.target.with_name(".dst.mbx-old")
        stands = [prints(folder) for folder in (made.target, aside) if folder.is_dir()]
        done = made.target.is_dir() and _contents(made.target) == new
        assert old in stands or done, (command, at, total)
        if at % 2 and not done:  # without a word about what is to be replaced, the old one comes back or stays
            words, made.words = made.words, [word for word in made.words if word != "--overwrite"]
            assert _run(made, monkeypatch) == 2
            _check_stays(made, before, at)
            assert prints(made.target) == old, (command, at)
            made.words = words
        assert _run(made, monkeypatch) == 0, (command, at, total)
        after = _check_stays(made, before, at)
        assert _contents(made.target) == new
        left = {name for name in set(after) - set(before) if not name.startswith(f"{made.gives}/")}
        assert not left, (command, at, left)
        shutil.rmtree(made.root)


def _contents(folder: Path) -> Print:
    """Fingerprint of a result, but for the manifest, which says where the source lay."""
    found = prints(folder)
    return {name: one for name, one in found.items() if name != "mbx_manifest.json" and "run_config" not in name}


@pytest.mark.parametrize("command", COMMANDS)
def test_killed_it_deletes_nothing(stock: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _check_kills(stock, tmp_path, command, 6, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_anywhere_it_deletes_nothing(
    stock: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _check_kills(stock, tmp_path, command, 10**6, monkeypatch)
