"""A model of which layers were left out goes on being trained, from either kind of checkpoint, and resumes."""

from __future__ import annotations

from pathlib import Path

from _trainings import Raw, raw, run_here

from converters.mcore.layout import Layout
from converters.pruning.choosing import Pruning
from mbx.run.job import Options
from mbx.run.prune import plan_prune


def recipe(run: Path, model: Path, steps: int) -> Raw:
    # a schedule that does not see where it ends, so that 4 steps and 4 more are 8
    return raw(
        run,
        model={"path": str(model)},
        train={"steps": steps, "micro_batch": 2, "global_batch": 4},
        optim={"lr": 3e-3, "schedule": "constant"},
        run={"save_every": 4},
    )


def test_trains_on_and_resumes(tmp_path: Path) -> None:
    before = run_here(recipe(tmp_path / "run", Path(raw(tmp_path)["model"]["path"]), 8))
    trained = tmp_path / "run" / "iter_0000008"
    shallow = Pruning(layers=(0, 2))
    plan_prune(trained, tmp_path / "hf", shallow, Options(sync=False), to="hf").run()
    plan_prune(trained, tmp_path / "mcore", shallow, Options(sync=False, layout=Layout(tp=2))).run()
    from_hf = run_here(recipe(tmp_path / "from-hf", tmp_path / "hf", 8))
    begun = recipe(tmp_path / "from-mcore", tmp_path / "hf", 4)
    run_here(begun, init_from=str(tmp_path / "mcore"))
    resumed = run_here(recipe(tmp_path / "from-mcore", tmp_path / "hf", 8), resume=True)
    assert resumed == from_hf[4:]
    assert from_hf[-1] < from_hf[0] < before[0]  # what was learned is not all gone, and more is
