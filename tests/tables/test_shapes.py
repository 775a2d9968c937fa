"""A config that does not belong to the weights is refused, whatever else fits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from converters.errors import CoverageError, UsageError
from mbx.run.job import Options, plan_hf_to_mcore, run


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("intermediate_size", 80),
        ("hidden_size", 64),
        ("head_dim", 12),
        ("num_key_value_heads", 8),
        ("num_attention_heads", 4),
        ("vocab_size", 250),
        ("num_hidden_layers", 2),
    ],
)
def test_a_wrong_config_value_is_refused(tiny: Path, tmp_path: Path, key: str, value: object) -> None:
    shutil.copytree(tiny / "llama", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config[key] != value
    plan_hf_to_mcore(tmp_path / "hf", tmp_path / "mcore", Options())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(CoverageError):
        plan_hf_to_mcore(tmp_path / "hf", tmp_path / "mcore", Options())


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", 32.5), ("num_hidden_layers", -1), ("intermediate_size", "96"), ("vocab_size", True)],
)
def test_a_count_that_is_no_whole_number_is_refused(tiny: Path, tmp_path: Path, key: str, value: object) -> None:
    shutil.copytree(tiny / "llama", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(UsageError, match=f"`{key}` is .*a whole number was expected"):
        plan_hf_to_mcore(tmp_path / "hf", tmp_path / "mcore", Options())


def test_a_head_that_is_only_said_to_be_tied_is_refused(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "llama", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(CoverageError, match="should repeat"):
        run(plan_hf_to_mcore(tmp_path / "hf", tmp_path / "mcore", Options()))
    assert not list(tmp_path.glob("mcore*"))
