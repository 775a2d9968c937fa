"""Two releases of Megatron Core train alike, and the newer goes on from the older one's checkpoints.

`make smoke-core` runs this under one release and names the interpreter of another.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from _trainings import Raw, raw, run_world

from fixtures.make_tiny import make
from mbx.installed import core_version

OTHER_ENV = "MBX_OTHER_PYTHON"
OTHER = os.environ.get(OTHER_ENV, "")
needs_two = pytest.mark.skipif(not OTHER, reason=f"{OTHER_ENV} names no interpreter with another Megatron Core")
TOLERANCE = 1e-5
#: Experts, two rotary bases with and without YaRN, latent attention with and without a query rank, prediction layers.
#: Hybrid models are not here: 0.16 builds them with Transformer Engine only.
FAMILIES = ("qwen3_moe", "gemma3_text", "olmo3", "deepseek_v2_lite", "deepseek_v3", "glm4_moe")
#: Of these the ones with a prediction layer.
AHEAD = ("deepseek_v3", "glm4_moe")
LENGTH = 32
STEPS = 8
STOP = 5


def recipes(folder: Path, models: Path, *, older: bool) -> dict[str, Raw]:
    """What both releases train, by name.

    Where losses are summed by token, 0.16 weighs a prediction layer's as if it had a label more: of a row of n tokens
    it has n - 1. A factor that makes up for that is what the releases differ by.
    """
    short: dict[str, object] = {"steps": STEPS, "micro_batch": 2, "global_batch": 4}
    found = {"qwen3": raw(folder / "qwen3", train=short)}
    for family in FAMILIES:
        # Up to 0.18 the balancing loss of a sequence weighs a micro-batch-th of what it should where losses are summed
        # by token: with one sequence in each the releases agree.
        rows = {"micro_batch": 1} if family.startswith("deepseek") or family in AHEAD else {}
        model: dict[str, object] = {"path": str(models / family)}
        if older and family in AHEAD:
            model["config"] = {"mtp_loss_scaling_factor": 0.1 * LENGTH / (LENGTH - 1)}
        data = {"kind": "pattern", "length": LENGTH}
        found[family] = raw(folder / family, model=model, data=data, train={**short, **rows})
    found["lora"] = raw(folder / "lora", train=short, lora={"rank": 4, "alpha": 8.0})
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    for family in FAMILIES:
        make(family, root / family)
    return root


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory, models: Path) -> tuple[dict[str, list[float]], ...]:
    """Losses by family, under this release and under the other; the last job was begun under the older one."""
    here, there = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("there")
    begun = raw(there / "begun", train={"steps": STEPS, "micro_batch": 2, "global_batch": 4})
    out = []
    for folder, python, job in (
        (there, {"python": OTHER}, {"recipe": begun, "stop_at": STOP}),
        (here, {}, {"recipe": begun, "resume": True}),
    ):
        named = recipes(folder, models, older=folder == there)
        jobs: list[dict[str, object]] = [{"recipe": one} for one in named.values()]
        losses = run_world(1, [*jobs, job], folder / "losses.json", **python)
        out.append(dict(zip([*named, "continued"], losses, strict=True)))
    return out[1], out[0]


@needs_two
def test_the_other_interpreter_has_another_release() -> None:
    code = "from mbx.installed import core_version; print(core_version())"
    found = subprocess.run([OTHER, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert found not in ("None", core_version())


@needs_two
@pytest.mark.parametrize("family", ["qwen3", *FAMILIES, "lora"])
def test_losses_agree(curves: tuple[dict[str, list[float]], ...], family: str) -> None:
    mine, others = (side[family] for side in curves)
    assert len(mine) == STEPS and mine[0] != mine[-1]
    assert mine == pytest.approx(others, rel=0, abs=TOLERANCE)


@needs_two
def test_a_run_of_the_older_release_goes_on_under_the_newer(curves: tuple[dict[str, list[float]], ...]) -> None:
    mine, others = (side["continued"] for side in curves)
    assert len(others) == STOP
    assert mine == pytest.approx(curves[1]["qwen3"][STOP:], rel=0, abs=TOLERANCE)
