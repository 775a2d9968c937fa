"""docs/models.md says what the tables and the measured figures say, and claims nothing that was not measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from converters.errors import StorageError
from mappings import table_names
from mbx.catalogue.models_page import MEASURED, NOT_MEASURED, is_stale, page, rows
from mbx.tables import shipped
from tests.gpu import run_forward
from tests.gpu.run_forward import scripts

DOCS = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def run(status: str, max_abs: float = 2e-6, **more: object) -> dict[str, object]:
    found = {
        "table": "llama",
        "sha256": shipped("llama").digest,
        "status": status,
        "cover": {"status": "passed"},
        "weights": {"status": "passed"},
        "against_transformers_on_cpu": {"max_abs": max_abs, "limit": 1e-4},
        **more,
    }
    return {"device": "cpu", "date": "2026-01-01", "versions": {"torch": "2"}, "families": {"llama": found}}


def write(folder: Path, runs: object) -> Path:
    path = folder / "forward.json"
    path.write_text(json.dumps(runs), encoding="utf-8")
    return path


def test_the_page_is_up_to_date() -> None:
    assert DOCS.read_text(encoding="utf-8") == page(), "the page is stale: run `make docs`"


def test_every_table_has_one_row() -> None:
    assert [row.table for row in rows()] == list(table_names())


def test_the_figure_is_the_measured_one(tmp_path: Path) -> None:
    row = next(row for row in rows(write(tmp_path, {"cpu": run("passed", 3.14e-5)})) if row.table == "llama")
    assert (row.cover, row.weights, row.forward_cpu, row.forward_gpu) == ("passed", "passed", "3.1e-05", NOT_MEASURED)


@pytest.mark.parametrize("status", ["failed", "not run"])
def test_what_did_not_pass_shows_no_figure(tmp_path: Path, status: str) -> None:
    row = next(row for row in rows(write(tmp_path, {"cpu": run(status, reason="why")})) if row.table == "llama")
    assert row.forward_cpu == status
    assert "why." in row.notes


def test_the_worst_family_of_a_table_counts(tmp_path: Path) -> None:
    both = run("passed", 1e-6)
    both["families"]["other"] = run("passed", 9e-6)["families"]["llama"]  # type: ignore[index]
    row = next(row for row in rows(write(tmp_path, {"cpu": both})) if row.table == "llama")
    assert row.forward_cpu == "9.0e-06"


def test_a_family_that_failed_is_named_beside_those_that_passed(tmp_path: Path) -> None:
    both = run("passed", 1e-6)
    both["families"]["other"] = run("failed", 1.0, reason="why")["families"]["llama"]  # type: ignore[index]
    row = next(row for row in rows(write(tmp_path, {"cpu": both})) if row.table == "llama")
    assert row.forward_cpu == "1.0e-06; failed: other"
    assert "other: why." in row.notes


def test_a_table_that_changed_since_is_said(tmp_path: Path) -> None:
    row = next(row for row in rows(write(tmp_path, {"cpu": run("passed", sha256="0")})) if row.table == "llama")
    assert "changed since it was measured on a CPU" in row.notes and "on a GPU" not in row.notes


def test_what_another_release_alone_runs_is_recorded_beside_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "measured.json"
    monkeypatch.setattr(run_forward, "MEASURED", path)
    usual = {**run("not run", reason="old"), "versions": {"torch": "2", "megatron-core": "0.16.1"}}
    newer = {**run("passed", 3e-6, control={"max_abs": 4.0}), "date": "2026-02-02"}
    newer["versions"] = {"torch": "2", "megatron-core": "0.19.2"}
    run_forward.record(usual)
    run_forward.record(newer, beside=True)
    for _ in range(2):  # the second time, of a run whose release does not run it
        row = next(row for row in rows(path) if row.table == "llama")
        assert row.forward_cpu == "3.0e-06" and "Measured with megatron-core 0.19.2." in row.notes and not row.reasons
        assert "- cpu, 2026-02-02, llama: megatron-core 0.19.2, the rest the same" in page(path)
        assert json.loads(path.read_text())["cpu"]["versions"] == usual["versions"]
        run_forward.record(usual)


def test_without_figures_nothing_is_claimed(tmp_path: Path) -> None:
    for row in rows(tmp_path / "absent.json"):
        assert {row.cover, row.weights, row.forward_cpu, row.forward_gpu} == {NOT_MEASURED}


def test_broken_figures_are_an_error(tmp_path: Path) -> None:
    broken = tmp_path / "forward.json"
    broken.write_text("[]", encoding="utf-8")
    with pytest.raises(StorageError):
        rows(broken)


def test_a_table_does_not_change_without_its_figures() -> None:
    families = json.loads(MEASURED.read_text(encoding="utf-8"))["cpu"]["families"]
    stale = [name for name, found in families.items() if is_stale(found, shipped(found["table"]))]
    assert [*stale, *(set(scripts()) - set(families))] == [], "run `make measure`, then `make docs`"


def test_figures_are_committed_for_the_cpu() -> None:
    families = json.loads(MEASURED.read_text(encoding="utf-8"))["cpu"]["families"]
    assert {"llama", "qwen3", "deepseek_v3", "gpt_oss"} <= set(families)
    for name, found in families.items():
        if found["status"] == "passed":
            assert found["control"]["max_abs"] > found["control"]["limit"], f"{name}: the control was not seen"
