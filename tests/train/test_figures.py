"""The measured figures of the trainer: their pages, and that today's budget still predicts them."""

from __future__ import annotations

import json
from typing import Any

from _trainings import ROOT

from benchmarks import figures
from benchmarks.train_gpu import budget_cases, lora_overrides, throughput_overrides
from mbx.train.budget.predict import GIB, predict
from mbx.train.model.blueprint import blueprint
from mbx.train.recipe.catalogue import load_recipe

#: What a budget may be off, of `max_memory_allocated`.
TOLERANCE = 0.05


def measured() -> list[dict[str, Any]]:
    return figures.records()


def predicted_gib(name: str, overrides: list[str]) -> float:
    recipe = load_recipe(name, ["model.init=random", *overrides])
    return predict(recipe, blueprint(recipe), 1).total / GIB


def runs() -> list[tuple[str, float, float]]:
    """Label, prediction of today's code, measured peak of every run on a GPU that has a budget."""
    cases = {
        json.dumps([tp, labels], sort_keys=True): (name, overrides)
        for tp in (1, 2)
        for name, labels, overrides in budget_cases(tp)
    }
    found = []
    for row in measured():
        if row["part"] == "budget":
            labels = {key: row[key] for key in ("model", "method", "fp8", "recompute", "length", "other")}
            name, overrides = cases[json.dumps([row["tp"], labels], sort_keys=True)]
        elif row["part"] == "lora" and row["side"] == "mbx":
            name = "llama3_8b_lora"
            overrides = lora_overrides(row["micro"], row["length"], row["recompute"], row["tp"])
        elif row["part"] == "throughput" and row["side"] == "mbx":
            name, overrides = row["model"], throughput_overrides(row["model"], row["fp8"])
        else:
            continue
        found.append((f"{name} {' '.join(overrides)}", predicted_gib(name, overrides), row["peak_gib"]))
    for row in figures.recipe_runs():
        found.append((f"{row['recipe']} {' '.join(row['overrides'])}", figures.predicted_gib(row), row["peak_gib"]))
    return found


def test_the_budget_predicts_every_measured_run() -> None:
    found = runs()
    assert len(found) >= 70
    wrong = [f"{label}: {p:.2f} for {m:.2f}" for label, p, m in found if abs(p / m - 1) > TOLERANCE]
    assert not wrong, "\n".join(wrong)


def test_the_tolerance_can_tell_runs_apart() -> None:
    """A budget blind to recomputation, length or FP8 would not pass."""
    grid = [(p, m) for label, p, m in runs() if "llama32_1b" in label]
    median = sorted(m for _, m in grid)[len(grid) // 2]
    assert sum(abs(median / m - 1) > TOLERANCE for _, m in grid) > len(grid) / 2


def test_losses_equal_megatron_lms() -> None:
    """Ten steps in both settings: one GPU, and two with tensor and sequence parallelism."""
    rows = [row for row in measured() if row["part"] == "megatron_lm"]
    assert {row["setting"][0] for row in rows} == {"a", "b"}
    for row in rows:
        assert len(row["ours"]) == len(row["theirs"]) == 10
        gaps = [abs(a - b) for a, b in zip(row["ours"], row["theirs"], strict=True)]
        assert max(gaps) < row["bf16_spacing"] / 100, row["setting"]
        assert row["theirs"][0] - row["theirs"][-1] > 3 * row["bf16_spacing"], "the losses fall"


def test_medians_over_rounds() -> None:
    rows = [{"m": 1, "tokens_per_s": speed, "peak_gib": peak} for speed, peak in ((1.0, 5.0), (3.0, 4.0), (2.0, 4.5))]
    found = figures.medians([*rows, {"m": 2, "tokens_per_s": 9.0, "peak_gib": 1.0}], ["m"])
    assert found[(1,)]["tokens_per_s"] == 2.0 and found[(1,)]["peak_gib"] == 5.0 and found[(2,)]["rounds"] == 1


def test_a_block_is_written_into_a_page() -> None:
    text = "before\n<!-- begin: budget (x) -->\nold\n<!-- end: budget -->\nafter\n"
    done = figures.insert(text, measured())
    assert done.startswith("before\n<!-- begin: budget (x) -->\n") and done.endswith("<!-- end: budget -->\nafter\n")
    assert "old" not in done and "llama32_1b" in done
    assert figures.insert(done, measured()) == done
    foreign = text.replace("budget", "layouts")
    assert figures.insert(foreign, measured()) == foreign, "another module's block"


def test_the_pages_say_what_was_measured() -> None:
    rows = measured()
    assert (ROOT / "docs" / "performance.md").read_text(encoding="utf-8") == figures.page(rows), "run `make docs`"
    training = (ROOT / "docs" / "training-figures.md").read_text(encoding="utf-8")
    assert training == figures.insert(training, rows), "run `make docs`"
