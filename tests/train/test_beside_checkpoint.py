"""A run that starts from a Megatron checkpoint of a model that sees has the tower and prediction layers of that."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from _trainings import Raw, raw, run_here
from safetensors.torch import load_file, save_file

from converters.errors import UnsupportedError
from fixtures.seeing import image_chats, make_seeing
from mbx.run.job import Options, plan_hf_to_mcore, run
from mbx.train.checkpoints.export import export_run
from mbx.train.recipe.parse import parse_recipe
from mbx.train.run.prepare import prepare
from tests.delta_on_cpu import delta_on_cpu


def asked(folder: Path, run_dir: Path, steps: int = 1, **sections: dict[str, object]) -> Raw:
    model = {"path": str(folder), "config": {"mtp_num_layers": 0}}
    train = {"steps": steps, "global_batch": 2, "micro_batch": 2, "deterministic": True}
    return raw(run_dir, model=model, train=train, **sections)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The model's folder, and another with other values throughout, which is `imported` too."""
    work = tmp_path_factory.mktemp("beside")
    model = make_seeing("qwen3_5", work / "model")
    other = shutil.copytree(model, work / "other")
    file = other / "model.safetensors"
    values = {name: (one.float() * 2).to(one.dtype) for name, one in load_file(file).items()}
    save_file(values, file, metadata={"format": "pt"})
    imported(other, work / "imported")
    return model, other


def imported(folder: Path, target: Path) -> Path:
    return run(plan_hf_to_mcore(folder, target, replace(Options(), flavour="text"))).target


def beside_equals(exported: Path, folder: Path) -> bool:
    after, before = (load_file(place / "model.safetensors") for place in (exported, folder))
    assert after.keys() == before.keys()
    names = [name for name in before if "visual" in name or "mtp" in name]
    assert any("visual" in name for name in names) and any("mtp" in name for name in names)
    return all(after[name].equal(before[name]) for name in names)


def test_what_a_checkpoint_carries_is_kept(places: tuple[Path, Path], tmp_path: Path) -> None:
    """Not what the model's folder has; a run that goes on when the checkpoint is gone keeps it too."""
    model, other = places
    start = shutil.copytree(other.parent / "imported", tmp_path / "start")
    with delta_on_cpu():
        run_here(asked(model, tmp_path / "run", run={"export_every": 1}), init_from=str(start))
        assert beside_equals(tmp_path / "run" / "export" / "step_0000001", other)
        shutil.rmtree(start)
        run_here(asked(model, tmp_path / "run", steps=2, run={"export_every": 1}), resume=True)
    assert beside_equals(tmp_path / "run" / "export" / "step_0000002", other)
    assert beside_equals(export_run(tmp_path / "run", tmp_path / "out")[0], other)


def test_a_checkpoint_without_a_tower(places: tuple[Path, Path], tmp_path: Path) -> None:
    """Its prediction layers would be those of a folder, so they are not left out."""
    model, other = places
    start = shutil.copytree(other.parent / "imported", tmp_path / "start")
    (kept,) = start.rglob("mbx_kept.safetensors")
    kept.unlink()
    with pytest.raises(UnsupportedError, match="prediction layers, which the run leaves out, and no tower") as raised:
        prepare(parse_recipe(asked(model, tmp_path / "run")), init_from=str(start), dry=True)
    assert raised.value.hint == "leave model.config.mtp_num_layers as config.json has it"
    with_them = asked(model, tmp_path / "run")
    del with_them["model"]["config"]
    prepare(parse_recipe(with_them), init_from=str(start), dry=True)


def test_images_are_not_shown_to_another_tower(places: tuple[Path, Path], tmp_path: Path) -> None:
    model, other = places
    data = {"kind": "auto", "path": str(image_chats(tmp_path / "chats", 4)), "length": 112, "pack": False}
    recipe = parse_recipe(asked(model, tmp_path / "run", data=data))
    with pytest.raises(UnsupportedError, match="carries another tower than .*look at the images") as raised:
        prepare(recipe, init_from=str(other.parent / "imported"), dry=True)
    assert raised.value.hint and "mbx convert mcore-to-hf" in raised.value.hint
    assert prepare(recipe, init_from=str(imported(model, tmp_path / "own")), dry=True).data.eyes is not None
