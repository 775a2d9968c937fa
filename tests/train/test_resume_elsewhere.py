"""A run that continues on other processes, in another layout, or with its data elsewhere is the same run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from _trainings import QWEN3, Raw, raw, run_here, run_world

from converters.errors import UsageError
from fixtures.make_tiny import make
from mbx.train.recipe.parse import parse_recipe
from mbx.train.run.prepare import prepare

TOLERANCE = 1e-5
LORA = {"rank": 4, "alpha": 8.0}
#: What is trained, and in which layouts two processes continue it.
RUNS: dict[str, tuple[dict[str, dict[str, object]], tuple[str, ...]]] = {
    "dense": ({}, ("dp", "tp", "pp")),
    "lora": ({"lora": LORA}, ("dp", "tp")),
    "experts": ({}, ("ep",)),
}
AXES: dict[str, dict[str, object]] = {"dp": {}, "tp": {"tp": 2}, "pp": {"pp": 2}, "ep": {"ep": 2}}


def recipe(run_dir: Path, hf: Path, steps: int, **sections: dict[str, object]) -> Raw:
    base = {
        "model": {"path": str(hf), "vocab_divisor": 64},
        "train": {"steps": steps, "micro_batch": 2, "global_batch": 4},
        "optim": {"lr": 3e-3, "schedule": "constant"},
    }
    return raw(run_dir, **{**base, **sections})


@pytest.mark.slow
def test_other_processes_and_layouts_continue_the_curve(tmp_path: Path) -> None:
    """Two steps on one process, two on two, two on one again: the six of a run that nothing interrupted."""
    models = {"dense": QWEN3, "lora": QWEN3, "experts": make("qwen3_moe", tmp_path / "moe")}
    whole, first, there = {}, {}, []
    for name, (sections, layouts) in RUNS.items():
        whole[name] = run_here(recipe(tmp_path / f"{name}-whole", models[name], 6, **sections))
        first[name] = run_here(recipe(tmp_path / name, models[name], 2, **sections))
        for layout in layouts:
            shutil.copytree(tmp_path / name, tmp_path / f"{name}-{layout}")
            there.append((name, layout))
    jobs: list[dict[str, object]] = [
        {
            "recipe": recipe(tmp_path / f"{name}-{layout}", models[name], 4, **RUNS[name][0], parallel=AXES[layout]),
            "resume": True,
        }
        for name, layout in there
    ]
    second = run_world(2, jobs, tmp_path / "losses.json")
    off = {}
    for (name, layout), losses in zip(there, second, strict=True):
        again = recipe(tmp_path / f"{name}-{layout}", models[name], 6, **RUNS[name][0])
        curve = first[name] + losses + run_here(again, resume=True)
        assert len(curve) == 6
        off[name, layout] = max(abs(a - b) for a, b in zip(curve, whole[name], strict=True))
    assert max(off.values()) < TOLERANCE, off
    for curve in whole.values():  # a state that starts anew would be seen: it moves the next losses
        assert abs(curve[2] - curve[5]) > 100 * TOLERANCE


def test_a_resharded_run_continues(tmp_path: Path) -> None:
    """`mbx convert reshard ‹with-optimizer›` takes a run along, moments, step and recipe included."""
    from converters.mcore.layout import Layout
    from mbx.run.job import Options, run
    from mbx.run.reshard import plan_mcore_to_mcore

    whole = run_here(recipe(tmp_path / "whole", QWEN3, 4))
    run_here(recipe(tmp_path / "run", QWEN3, 2))
    options = Options(sync=False, layout=Layout(tp=2))
    run(plan_mcore_to_mcore(tmp_path / "run", tmp_path / "tp2", options, with_optimizer=True))
    again = run_here(recipe(tmp_path / "tp2", QWEN3, 4), resume=True)
    assert max(abs(a - b) for a, b in zip(again, whole[2:], strict=True)) < TOLERANCE


def test_data_is_the_same_wherever_it_lies_and_other_data_is_not(tmp_path: Path) -> None:
    lines = [{"prompt": f"q{n}", "completion": f"a {n}"} for n in range(6)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "b.jsonl").write_text(text.replace(": ", ":  "))  # the same rows, other bytes
    (tmp_path / "c.jsonl").write_text(text.replace("a 3", "a 4"))

    def job(file: str, steps: int) -> Raw:
        data = {"kind": "completion", "path": str(tmp_path / file)}
        return recipe(tmp_path / "run", QWEN3, steps, data=data)

    run_here(job("a.jsonl", 1))
    assert len(run_here(job("b.jsonl", 2), resume=True)) == 1
    with pytest.raises(UsageError, match="the rows are not those"):
        run_here(job("c.jsonl", 3), resume=True)


def test_another_number_of_embedding_rows_is_refused_with_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """251 rows do not divide by two, and the row that would pad them takes part in the softmax."""
    run = recipe(tmp_path / "run", QWEN3, 1, model={"path": str(QWEN3)})
    run_here(run)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="had 251 rows, now it would have 252") as caught:
        prepare(parse_recipe({**run, "parallel": {"tp": 2}}), resume=True)
    assert caught.value.hint == "a parallel.tp that divides 251 keeps them"
