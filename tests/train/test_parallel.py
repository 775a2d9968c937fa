"""The same run under further layouts gives the same losses (gloo, two processes).

Tensor, pipeline, expert and data parallelism by themselves, and LoRA under them, are held to one process more tightly
in `test_resume_elsewhere.py`, where a run moves to them and back.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from _trainings import Raw, run_here, run_world
from _trainings import raw as whole

TOLERANCE = 1e-4
#: Steps of a run: layouts that differ do so in the first ones. On GPUs, tests/gpu/run_train_parallel.py takes 20.
SHORT = 6
LORA = {"rank": 4, "alpha": 8.0}
LAYOUTS: dict[str, dict[str, dict[str, object]]] = {
    "dp": {},
    "tp_dora": {"parallel": {"tp": 2}, "lora": {**LORA, "dora": True}},
    "pp_lora_recompute": {"parallel": {"pp": 2}, "lora": LORA, "train": {"recompute": "full"}},
}
#: 251 rows do not divide by two: the embedding is padded, alike in every layout that is compared.
PADDED = {"vocab_divisor": 64}


def raw(run_dir: Path, **sections: dict[str, object]) -> Raw:
    """The recipe of the other suites, shorter."""
    return whole(run_dir, **{**sections, "train": {"steps": SHORT, **sections.get("train", {})}})


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    folder = tmp_path_factory.mktemp("parallel")
    jobs: list[dict[str, object]] = [
        {"recipe": raw(folder / name, **{"model": {"path": raw(folder)["model"]["path"], **PADDED}, **layout})}
        for name, layout in LAYOUTS.items()
    ]
    # the data-parallel run once more, told to stop on the way and continued: its optimizer's state is cut over ranks
    stopped = raw(folder / "stopped", model=PADDED)
    jobs += [{"recipe": stopped, "stop_at": 4}, {"recipe": stopped, "resume": True}]
    # interleaved stages, saved beside the training, stopped and continued: each rank holds two chunks
    chunks = raw(folder / "chunks", model=PADDED, parallel={"pp": 2, "vpp": 2}, run={"save_async": True})
    jobs += [{"recipe": chunks, "stop_at": 4}, {"recipe": chunks, "resume": True}]
    names = [*LAYOUTS, "stopped", "resumed", "vpp_stopped", "vpp_resumed"]
    found = dict(zip(names, run_world(2, jobs, folder / "losses.json"), strict=True))
    for name, lora in (("plain", {}), ("lora", {"lora": LORA}), ("dora", {"lora": {**LORA, "dora": True}})):
        found[name] = run_here(raw(folder / f"one-{name}", model=PADDED, **lora))
    found["vpp"] = found["vpp_stopped"] + found["vpp_resumed"]
    return found


def difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def test_a_sharded_optimizer_resumes(curves: dict[str, list[float]]) -> None:
    assert curves["stopped"] + curves["resumed"] == curves["dp"]


@pytest.mark.parametrize("layout", ["dp", "vpp"])
def test_layouts_agree(curves: dict[str, list[float]], layout: str) -> None:
    assert difference(curves[layout], curves["plain"]) < TOLERANCE


@pytest.mark.parametrize(("layout", "one"), [("tp_dora", "dora"), ("pp_lora_recompute", "lora")])
def test_adapters_agree(curves: dict[str, list[float]], layout: str, one: str) -> None:
    assert difference(curves[layout], curves[one]) < TOLERANCE


def test_the_runs_learn_and_differ(curves: dict[str, list[float]]) -> None:
    """Without this, a loop that trains nothing would pass."""
    assert curves["plain"][-1] < curves["plain"][0] - 0.1
    assert difference(curves["plain"], curves["lora"]) > 100 * TOLERANCE
    assert difference(curves["lora"], curves["dora"]) > 10 * TOLERANCE
