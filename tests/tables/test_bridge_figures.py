"""What other tools exported of our checkpoints: the page says what was recorded, and every model that is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import test_bridge_exports_ours as bridge
import test_mcore_bridge_exports_ours as mcore_bridge

from benchmarks.bridge_figures import ASKED, RECORDED, exports, record, recorded, written

PREDICTING = ["qwen3_5", "qwen3_5_moe"]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "formats.md"


def test_the_page_says_what_was_recorded() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert "<!-- begin: bridge" in text and text == written(text), "run `make docs`"


@pytest.mark.parametrize(
    ("tool", "models"),
    [
        ("Megatron-Bridge", (bridge.CONVERTED, bridge.WITH_CODE, bridge.TOWERS, bridge.TOWERS, PREDICTING)),
        ("mcore-bridge", (mcore_bridge.CONVERTED, mcore_bridge.TOWERS)),
    ],
)
def test_every_model_that_is_asked_was_recorded(tool: str, models: tuple[list[str], ...]) -> None:
    (cases,) = (run["cases"] for run in recorded() if run["tool"].startswith(f"{tool} "))
    asked = dict(zip(ASKED[tool], models, strict=True))
    assert {test: list(found) for test, found in cases.items()} == asked, "run it, and `--record`"
    assert all(count > 0 for found in cases.values() for count in found.values())


def test_a_model_that_did_not_pass_is_not_recorded(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    case = '<testcase name="test_nothing_is_lost[llama]">{}</testcase>'
    whole = '<testsuites><testsuite timestamp="2026-12-01T00:00:00">{}</testsuite></testsuites>'
    before = RECORDED.read_bytes()
    for sign in ("failure", "error", "skipped"):
        report.write_text(whole.format(case.format(f"<{sign}/>")), encoding="utf-8")
        with pytest.raises(ValueError, match="llama"):
            record(report, "Megatron-Bridge 0.6.2")
    assert RECORDED.read_bytes() == before
    run = {"tool": "Megatron-Bridge 1", "date": "d", "cases": {"test_nothing_is_lost": {"llama": 39, "gemma": 2}}}
    assert "| text models | 2 | 41 | llama, gemma |" in exports(run)
