"""What Megatron-Bridge exported of our checkpoints: the page says what was recorded, and every model that is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_bridge_exports_ours import CONVERTED, TOWERS, WITH_CODE

from benchmarks.bridge_figures import ASKED, RECORDED, exports, record, written

PAGE = Path(__file__).resolve().parents[2] / "docs" / "formats.md"


def test_the_page_says_what_was_recorded() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert "<!-- begin: bridge" in text and text == written(text), "run `make docs`"


def test_every_model_that_is_asked_was_recorded() -> None:
    cases = json.loads(RECORDED.read_text(encoding="utf-8"))["cases"]
    asked = dict(zip(ASKED, (CONVERTED, WITH_CODE, TOWERS, TOWERS, ["qwen3_5", "qwen3_5_moe"]), strict=True))
    assert {test: list(models) for test, models in cases.items()} == asked, "run it, and `--record`"
    assert all(count > 0 for models in cases.values() for count in models.values())


def test_a_model_that_did_not_pass_is_not_recorded(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    case = '<testcase name="test_nothing_is_lost[llama]">{}</testcase>'
    whole = '<testsuites><testsuite timestamp="2026-12-01T00:00:00">{}</testsuite></testsuites>'
    before = RECORDED.read_bytes()
    for sign in ("failure", "error", "skipped"):
        report.write_text(whole.format(case.format(f"<{sign}/>")), encoding="utf-8")
        with pytest.raises(ValueError, match="llama"):
            record(report, "0.6.2")
    assert RECORDED.read_bytes() == before
    lines = exports({"release": "1", "date": "d", "cases": {"test_nothing_is_lost": {"llama": 39, "gemma": 2}}})
    assert "| text models | 2 | 41 | llama, gemma |" in lines
