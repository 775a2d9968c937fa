"""A drafted table: exact where shipped rows suffice, and honest about what they do not place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from converters.errors import CoverageError, UnsupportedError
from converters.rows.parse import parse_table
from mbx.catalogue.draft import draft, templates
from mbx.formats.registry import open_hf
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run


def renamed(source: Path, target: Path) -> Path:
    """A copy of a checkpoint whose architecture no table knows."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    config |= {"model_type": "novel", "architectures": ["NovelForCausalLM"]}
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_draft_of_a_familiar_shape_converts_both_ways(tiny: Path, tmp_path: Path, name: str) -> None:
    source = renamed(tiny / name, tmp_path / "novel")
    with pytest.raises(UnsupportedError):
        plan_hf_to_mcore(source, tmp_path / "m", Options())
    folder = open_hf(source)
    drafted = draft(folder.config, folder.tensors)
    assert (drafted.unplaced_tensors, drafted.unplaced_keys) == ((), ())
    table = tmp_path / "novel.toml"
    table.write_text(drafted.text)
    options = Options(mapping=str(table))
    run(plan_hf_to_mcore(source, tmp_path / "m", options))
    run(plan_mcore_to_hf(tmp_path / "m", tmp_path / "h", options))
    for file in source.iterdir():
        assert (tmp_path / "h" / file.name).read_bytes() == file.read_bytes()


def test_what_no_row_places_is_listed_and_refused(tiny: Path) -> None:
    folder = open_hf(tiny / "llama")
    names = [*folder.tensors, "model.layers.0.novel.gate.weight", "model.layers.2.novel.gate.weight"]
    drafted = draft({**folder.config, "novel_scale": 3.0}, names)
    assert drafted.unplaced_tensors == ("model.layers.{L}.novel.gate.weight",)
    assert drafted.unplaced_keys == ("novel_scale = 3.0",)
    assert "#   model.layers.{L}.novel.gate.weight   e.g. model.layers.0.novel.gate.weight" in drafted.text
    with pytest.raises(CoverageError, match="novel_scale"):
        parse_table("novel", drafted.text).config.to_mcore({**folder.config, "novel_scale": 3.0})


def test_a_name_with_line_breaks_stays_a_comment(tiny: Path) -> None:
    folder = open_hf(tiny / "llama")
    names = [*folder.tensors, 'model.layers.0.x\n[rows.stolen]\n"mlp.weight" = "y"\0']
    drafted = draft({**folder.config, "k\r[sites]\n": 1}, names)
    assert parse_table("novel", drafted.text)
    assert "stolen" in drafted.text and not any(line.startswith("[rows.stolen") for line in drafted.text.split("\n"))


def test_nothing_in_common_is_said(tiny: Path) -> None:
    with pytest.raises(UnsupportedError, match="no shipped table has a tensor name in common"):
        draft({"model_type": "x"}, ["conv.0.kernel", "conv.1.kernel"])


def test_templates_mark_layer_and_expert() -> None:
    found = templates(["a.layers.0.experts.3.w1", "a.layers.1.experts.0.w1", "norm.weight"])
    assert set(found) == {"a.layers.{L}.experts.{E}.w1", "norm.weight"}
    assert found["a.layers.{L}.experts.{E}.w1"].layers == {0, 1}
