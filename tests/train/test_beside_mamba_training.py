"""Attention beside Mamba-2 in training, against Transformers and PEFT on a CPU: gradients, adapters, layouts."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
from _trainings import Raw, run_world
from test_proof_families import of_family

from converters.errors import UnsupportedError, UsageError
from mbx.train.budget.shape import shape_of
from mbx.train.model import adapted as targets
from mbx.train.model.adapted import adapted
from mbx.train.model.blueprint import blueprint
from mbx.train.proof.training import verify_training
from mbx.train.recipe.parse import parse_recipe
from mbx.train.run.loop import train
from mbx.train.run.prepare import prepare
from tests.mamba_on_cpu import mamba_on_cpu

FAMILY = "falcon_h1_0_5b"
#: No example is packed with another: a mixer carries its state along the row.
NOT_RUN = [("packing", "not run")]


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True])
def test_every_leg_passes(adapters: bool, tmp_path: Path) -> None:
    """PEFT loads the adapter of `all-linear`, and its gradients pass every multiplier."""
    with mamba_on_cpu():
        report = verify_training(parse_recipe(of_family(tmp_path, FAMILY, adapters)))
    assert report is not None and len(report.legs) == 12
    assert [(leg.name, leg.status) for leg in report.legs if leg.status != "passed"] == NOT_RUN


@pytest.mark.slow
def test_two_processes_pass(tmp_path: Path) -> None:
    layouts: list[Raw] = [
        of_family(tmp_path, FAMILY, adapters, parallel={axis: 2})
        for axis in ("tp", "pp")
        for adapters in (False, True)
    ]
    jobs: list[dict[str, object]] = [{"recipe": one, "verify": True, "mamba": True} for one in layouts]
    for legs in run_world(2, jobs, tmp_path / "legs.json"):
        assert [tuple(leg) for leg in legs if leg[1] != "passed"] == NOT_RUN  # type: ignore[arg-type,index]


def test_its_memory_is_not_guessed(tmp_path: Path) -> None:
    plan = blueprint(parse_recipe(of_family(tmp_path, FAMILY, False)))
    with pytest.raises(UnsupportedError, match="the budget does not cover attention beside Mamba-2"):
        shape_of(plan.config)


def test_all_linear_is_without_what_peft_refuses(tmp_path: Path) -> None:
    recipe = parse_recipe(of_family(tmp_path, FAMILY, True))
    found = {name.removesuffix(".weight").rpartition(".")[2] for name in adapted(recipe.lora, blueprint(recipe))}
    assert found == {"linear_qkv", "linear_proj", "in_proj", "linear_fc1", "linear_fc2"}


def test_a_linear_that_peft_refuses_is_said_where_it_is_named(tmp_path: Path) -> None:
    raw = of_family(tmp_path, FAMILY, True)
    raw["lora"] = {**raw["lora"], "targets": ["linear_qkv", "out_proj"]}  # type: ignore[dict-item]
    said = prepare(parse_recipe(raw), dry=True).start.why
    assert "PEFT loads no adapter on `decoder.layers.0.mamba_mixer.out_proj` and 3 more" in said


def test_a_run_whose_targets_meant_more_is_not_resumed_without_them(tmp_path: Path) -> None:
    raw = of_family(tmp_path, FAMILY, True, train={"steps": 1, "global_batch": 2, "micro_batch": 1})
    raw["run"] = {**raw["run"], "save": True}
    with mamba_on_cpu():
        with patch.object(targets, "FUSED", "as it was before"):
            train(prepare(parse_recipe(raw)), live=False)
        with pytest.raises(UsageError, match="adapter on `decoder.layers.0.mamba_mixer.out_proj`"):
            prepare(parse_recipe(raw), resume=True)


def test_a_cpu_without_kernels_says_so(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="Transformer Engine only"):
        prepare(parse_recipe(of_family(tmp_path, FAMILY, False)))
