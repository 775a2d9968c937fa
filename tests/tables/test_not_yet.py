"""Architectures that are known and not converted: what is said of them is true of the installed Megatron Core."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from converters.errors import UnsupportedError
from mbx.cli import main
from mbx.tables import NOT_YET, table_for

#: Words of which the parameters of each are made, in the repository's names or in Megatron-Bridge's.
MARKS = {"deepseek_v4": ("tid2eid", "hyper_connection", "hc_head")}


@pytest.mark.parametrize("model_type", NOT_YET)
def test_the_reason_is_said(model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model_type": model_type, "architectures": ["AnyForCausalLM"]}
    with pytest.raises(UnsupportedError, match="not converted yet.*Megatron Core") as error:
        table_for(config)
    assert "models new" in str(error.value.hint)
    assert table_for(config, "deepseek_v3").name == "deepseek_v3", "a table that somebody names is taken"
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert main(["convert", "hf-to-mcore", str(tmp_path), str(tmp_path / "out"), "--dry-run"]) != 0
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("model_type", NOT_YET)
def test_megatron_core_has_no_modules_for_it(model_type: str) -> None:
    """Where a release has them, the reason is stale and a table is due."""
    found = find_spec("megatron.core")
    assert found is not None and found.submodule_search_locations is not None
    texts = [file.read_text("utf-8") for at in found.submodule_search_locations for file in Path(at).rglob("*.py")]
    assert len(texts) > 200
    assert [mark for mark in MARKS[model_type] if any(mark in text for text in texts)] == []
