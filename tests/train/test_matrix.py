"""The validation matrix: one variable a cell, a process a cell, results that are kept, a page that stands alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from _trainings import ROOT

from converters.errors import DeviceError
from fixtures.make_tiny import make
from mbx.cli import main
from mbx.train.matrix import baselines, process
from mbx.train.matrix.cells import Cell, cells, default_values
from mbx.train.matrix.page import matrix_page
from mbx.train.matrix.runner import run_matrix
from mbx.train.recipe.catalogue import load_recipe
from mbx.train.run.prepare import prepare

LLAMA = f"model={ROOT / 'fixtures' / 'tiny' / 'llama'}"


def test_cells_change_one_setting_each() -> None:
    recipe = load_recipe("qwen3_8b_lora", ["train.micro_batch=2", "train.global_batch=4"])
    found = cells(recipe, default_values(recipe, 2, ["tensorwise", "blockwise"]), has_folder=True)
    assert [cell.name for cell in found] == [
        *("transformers", "peft", "recipe", "length=2048", "micro_batch=4", "recompute=selective", "recompute=full"),
        *("fp8=tensorwise", "tp=2"),
    ]
    assert all(len(cell.overrides) == 1 for cell in found[3:])
    assert [cell.world_size for cell in found] == [1] * 8 + [2]
    alone = cells(recipe, {"micro_batch": ["3"]}, has_folder=False)
    assert alone[1].overrides == ("train.micro_batch=3", "train.global_batch=3"), "4 rows are no multiple of 3"
    assert len({cell.digest("r", (), 3) for cell in found}) == len(found)
    assert found[0].digest("r", (), 3) != found[0].digest("r", (), 4)


def record(name: str, **more: Any) -> dict[str, Any]:
    figures = {"tokens_per_s": 100.0, "peak_gib": 2.0, "predicted_gib": 1.9, "first_step_s": 1.0, "step_s": 0.5}
    own = {"cell": {"name": name}, "status": "ok", "losses": [2.0, 1.0], "memory_over_time": [(0.0, 0.1), (1.0, 2.0)]}
    return {**figures, **own, **more}


def test_a_page_shows_what_ran_and_why_the_rest_did_not() -> None:
    lost = {"cell": {"name": "length=9"}, "status": "out of memory", "said": ["reached <80> GiB"]}
    page = matrix_page("r: matrix", "`r`", [record("recipe"), record("tp=2", tokens_per_s=150.0), lost])
    assert "1.50" in page and "-5.0%" in page and "reached &lt;80&gt; GiB" in page
    assert page.count("<polyline") == 2 and "http" not in page.replace("http-equiv", "")


def test_running_out_of_memory_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(spec: object) -> dict[str, object]:
        raise DeviceError("out of memory on a GPU of 80 GiB: too large", hint="train.micro_batch=1", details=["parts"])

    monkeypatch.setattr(process, "_measure", out_of_memory)
    found = process.run_cell({})
    assert found["status"] == "out of memory"
    assert found["said"] == ["out of memory on a GPU of 80 GiB: too large", "train.micro_batch=1", "parts"]


def test_a_process_that_dies_is_told(tmp_path: Path) -> None:
    broken = Cell("recipe", "recipe", ("no.such=1",), 1)
    said: list[str] = []
    found = run_matrix(tmp_path, "llama32_1b_lora", [LLAMA], [broken], 2, said.append, 120)
    assert found[0]["status"] == "failed" and "no.such" in " ".join(found[0]["said"])
    late = run_matrix(tmp_path, "llama32_1b_lora", [LLAMA], [broken], 3, said.append, 0.01)
    assert "longer than 0.01 s" in late[0]["said"][0]


@pytest.mark.parametrize(
    ("targets", "modules", "parameters"),
    [
        ("q_proj,v_proj", {"q_proj", "v_proj"}, set()),
        ("linear_fc1", set(), {"gate_up_proj"}),
        (r".*layers\.1\..*\.k_proj", {"k_proj"}, set()),
    ],
)
def test_the_baseline_adapts_what_the_recipe_does(
    tmp_path: Path, targets: str, modules: set[str], parameters: set[str]
) -> None:
    import transformers

    folder = make("qwen3_moe", tmp_path / "hf")
    words = [f"model={folder}", "data.kind=pattern", "data.length=64", "run.device=cpu", f"lora.targets={targets}"]
    prepared = prepare(load_recipe("qwen3_30b_a3b_lora", words), dry=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    found = baselines._targets(model, prepared)
    assert [{name.rpartition(".")[2] for name in names} for names in found] == [modules, parameters]
    layers = {name.split(".")[2] for names in found for name in names}
    assert layers == ({"1"} if "layers" in targets else {"0", "1", "2", "3"})


@pytest.mark.slow
def test_a_matrix_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [LLAMA, "data.kind=pattern", "data.length=64", "train.global_batch=2", "train.precision=fp32"]
    command = ["train", "matrix", "--recipe", "llama32_1b_lora", *words, "run.device=cpu", "--steps", "3"]
    command += ["--to", str(tmp_path / "m"), "--length", "32", "--recompute", "full"]
    assert main(command) == 0
    assert "running" in capsys.readouterr().err
    records = {r["cell"]["name"]: r for r in json.loads((tmp_path / "m" / "matrix.json").read_text())}
    assert list(records) == ["transformers", "peft", "recipe", "length=32", "recompute=full"]
    first = [records[name]["losses"][0] for name in ("transformers", "peft", "recipe", "recompute=full")]
    assert all(math.isclose(loss, first[0], rel_tol=1e-5) for loss in first), "the same rows, the same weights"
    assert records["recipe"]["losses"] == pytest.approx(records["recompute=full"]["losses"], rel=1e-5)
    assert all(r["peak_gib"] > 0 and r["memory_over_time"] for r in records.values())
    page = (tmp_path / "m" / "matrix.html").read_text()
    assert page.count("<polyline") == 5
    assert main(command) == 0
    assert "running" not in capsys.readouterr().err, "results are kept"
