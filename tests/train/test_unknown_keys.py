"""Keys of config.json that no table knows: a recipe waives them once, for the run and for what it exports."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from _trainings import QWEN3, raw, run_here

from converters.errors import CoverageError
from mbx.cli import main
from mbx.proof.parity import parity
from mbx.run.job import Options, plan_mcore_to_hf
from mbx.train.checkpoints.export import export_run
from mbx.train.checkpoints.state import latest
from mbx.train.model.blueprint import blueprint
from mbx.train.recipe.parse import parse_recipe

KEY = "scale_of_something"


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(QWEN3, tmp_path / "odd"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, KEY: 3}))
    return folder


def test_the_hint_is_a_key_that_a_recipe_has(odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = raw(tmp_path / "run", model={"path": str(odd)})
    with pytest.raises(CoverageError, match=KEY) as caught:
        blueprint(parse_recipe(recipe))
    assert f"model.allow_unused_key={KEY}" in str(caught.value.hint)
    assert main(["budget", str(odd)]) == 3
    assert f"model.allow_unused_key={KEY}" in capsys.readouterr().err
    assert main(["budget", str(odd), "data.length=32", f"model.allow_unused_key={KEY}"]) == 0
    assert main(["budget", str(odd), "model.allow_unused_key=another"]) == 3


@pytest.mark.parametrize("rank", [0, 2], ids=["all weights", "lora"])
def test_a_waiver_holds_for_what_the_run_exports(odd: Path, tmp_path: Path, rank: int) -> None:
    model = {"path": str(odd), "allow_unused_key": [KEY]}
    recipe = raw(
        tmp_path / "run",
        model=model,
        train={"steps": 1},
        lora={"rank": rank, "targets": ["linear_qkv", "linear_fc1"]} if rank else {},
        run={"export_every": 1},
    )
    run_here(recipe)
    assert [path.name for path in (tmp_path / "run" / "export").iterdir()] == ["step_0000001"]
    target, _ = export_run(tmp_path / "run", tmp_path / "exported", merged=rank > 0)
    assert json.loads((target / "config.json").read_text())[KEY] == 3
    if rank:
        export_run(tmp_path / "run", tmp_path / "adapter")
        assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    else:
        found = latest(tmp_path / "run")
        assert found is not None and parity(target, found).passed, "the export's manifest says the waiver"
        with pytest.raises(CoverageError, match=KEY):
            plan_mcore_to_hf(found, tmp_path / "again", Options())


def test_a_table_of_ones_own_holds_for_the_export_too(odd: Path, tmp_path: Path) -> None:
    from mappings import table_text

    mine = tmp_path / "mine.toml"
    mine.write_text(re.sub(r"^\[config\.via\]", f'ignore = ["{KEY}"]\n[config.via]', table_text("qwen3"), flags=re.M))
    recipe = raw(tmp_path / "run", model={"path": str(odd), "mapping": str(mine)}, train={"steps": 1})
    run_here(recipe)
    target, _ = export_run(tmp_path / "run", tmp_path / "exported")
    assert json.loads((target / "config.json").read_text())[KEY] == 3
