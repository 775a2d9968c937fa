"""The same run under tensor, pipeline and data parallelism gives the same losses (gloo, two processes)."""

from __future__ import annotations

import pytest
from _trainings import raw, run_here, run_world

TOLERANCE = 1e-4
LORA = {"rank": 4, "alpha": 8.0}
LAYOUTS: dict[str, dict[str, dict[str, object]]] = {
    "tp": {"parallel": {"tp": 2}},
    "pp": {"parallel": {"pp": 2}},
    "dp": {},
    "tp_lora": {"parallel": {"tp": 2}, "lora": LORA},
    "tp_dora": {"parallel": {"tp": 2}, "lora": {**LORA, "dora": True}},
    "pp_lora_recompute": {"parallel": {"pp": 2}, "lora": LORA, "train": {"recompute": "full"}},
}
#: 251 rows do not divide by two: the embedding is padded, alike in every layout that is compared.
PADDED = {"vocab_divisor": 64}


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    folder = tmp_path_factory.mktemp("parallel")
    jobs: list[dict[str, object]] = [
        {"recipe": raw(folder / name, **{"model": {"path": raw(folder)["model"]["path"], **PADDED}, **layout})}
        for name, layout in LAYOUTS.items()
    ]
    # the data-parallel run once more, told to stop on the way and continued: its optimizer's state is cut over ranks
    stopped = raw(folder / "stopped", model=PADDED)
    jobs += [{"recipe": stopped, "stop_at": 12}, {"recipe": stopped, "resume": True}]
    found = dict(zip([*LAYOUTS, "stopped", "resumed"], run_world(2, jobs, folder / "losses.json"), strict=True))
    for name, lora in (("plain", {}), ("lora", {"lora": LORA}), ("dora", {"lora": {**LORA, "dora": True}})):
        found[name] = run_here(raw(folder / f"one-{name}", model=PADDED, **lora))
    return found


def difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def test_a_sharded_optimizer_resumes(curves: dict[str, list[float]]) -> None:
    assert curves["stopped"] + curves["resumed"] == curves["dp"]


@pytest.mark.parametrize("layout", ["tp", "pp", "dp"])
def test_layouts_agree(curves: dict[str, list[float]], layout: str) -> None:
    assert difference(curves[layout], curves["plain"]) < TOLERANCE


@pytest.mark.parametrize(("layout", "one"), [("tp_lora", "lora"), ("tp_dora", "dora"), ("pp_lora_recompute", "lora")])
def test_adapters_agree(curves: dict[str, list[float]], layout: str, one: str) -> None:
    assert difference(curves[layout], curves[one]) < TOLERANCE


def test_the_runs_learn_and_differ(curves: dict[str, list[float]]) -> None:
    """Without this, a loop that trains nothing would pass."""
    assert curves["plain"][-1] < curves["plain"][0] - 0.3
    assert difference(curves["plain"], curves["lora"]) > 100 * TOLERANCE
    assert difference(curves["lora"], curves["dora"]) > 10 * TOLERANCE
