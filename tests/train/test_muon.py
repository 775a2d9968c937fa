"""Muon through Megatron Core's own class: matrices as PyTorch's Muon steps them, all else as AdamW does."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from _trainings import Raw, raw, run_here, run_world

from converters.errors import DeviceError, MbxError, UnsupportedError
from fixtures.make_tiny import make
from mbx.installed import core_release
from mbx.train.budget.counts import count
from mbx.train.budget.predict import predict
from mbx.train.model import build as models
from mbx.train.model import muon
from mbx.train.model.blueprint import Blueprint, blueprint
from mbx.train.model.parallel import Ranks, session
from mbx.train.proof.training import verify_training
from mbx.train.recipe.parse import parse_recipe
from mbx.train.run.prepare import prepare
from mbx.train.run.stepping import Stepper

there = pytest.mark.skipif(
    not core_release().muon or not muon._installed(),
    reason="this Megatron Core has no Muon, or its package is not there",
)
#: PyTorch's polynomial, as Megatron Core calls it.
PLAIN = {"optimizer": "muon", "lr": 1e-2, "weight_decay": 0.1, "clip": 0.0, "muon_coefficients": "simple"}
PLAIN |= {"muon_precision": "highest"}


def asked(run_dir: Path, optim: dict[str, object], **sections: dict[str, object]) -> Raw:
    return raw(run_dir, optim=optim, **sections)


def parts_of(name: str, shape: torch.Size, plan: Blueprint, *, split: bool) -> list[torch.Tensor]:
    """Rows of the matrices that one weight is: of queries, keys and values where they are apart."""
    rows = torch.arange(shape[0])
    if not (split and name.endswith("linear_qkv.weight")):
        return [rows]
    heads, groups, width = (
        int(str(plan.config[k])) for k in ("num_attention_heads", "num_query_groups", "kv_channels")
    )
    by_group = rows.view(groups, -1)
    query = heads // groups * width
    return [part.flatten() for part in by_group.split([query, width, width], dim=1)]


def oracle(
    weights: dict[str, torch.Tensor],
    gradients: list[dict[str, torch.Tensor]],
    plan: Blueprint,
    optim: dict[str, object],
) -> dict[str, torch.Tensor]:
    """Weights behind a step for each of `gradients`, by PyTorch's optimizers."""
    out = {name: tensor.clone() for name, tensor in weights.items()}
    for name, tensor in out.items():
        matrix = tensor.dim() == 2 and "embedding" not in name and "output_layer" not in name
        for rows in parts_of(name, tensor.shape, plan, split=bool(optim.get("muon_split_qkv", True))):
            own = torch.nn.Parameter(tensor[rows].clone())
            stepper: torch.optim.Optimizer
            if matrix:
                adjust = "match_rms_adamw" if optim["muon_scale"] == "spectral" else "original"
                nesterov = bool(optim.get("muon_nesterov", False))
                stepper = torch.optim.Muon([own], lr=1e-2, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=adjust)
            else:
                decay = 0.1 if tensor.dim() > 1 else 0.0
                stepper = torch.optim.AdamW([own], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay)
            for given in gradients:
                own.grad = given[name][rows]
                stepper.step()
            tensor[rows] = own.detach()
    return out


@there
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("qwen3", {"muon_scale": "shape_scaling"}),
        ("qwen3", {"muon_scale": "spectral", "muon_extra_scale": 0.2, "muon_nesterov": True}),
        ("qwen3", {"muon_scale": "shape_scaling", "muon_split_qkv": False}),
        ("qwen3_moe", {"muon_scale": "spectral", "muon_extra_scale": 0.2}),
    ],
)
def test_steps_are_those_of_pytorch(
    family: str, own: dict[str, object], precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optim = {**PLAIN, **own}
    folder = str(make(family, tmp_path / "model"))
    recipe = parse_recipe(asked(tmp_path / "run", optim, model={"path": folder}, train={"precision": precision}))
    plan, ranks = blueprint(recipe), Ranks(0, 1, 0, 1, "cpu", te=False)
    torch.manual_seed(0)
    with session(recipe, ranks):
        chunks = [models.wrap(recipe, network, ranks) for network in models.build(recipe, plan, ranks)]
        stepper = Stepper(models.optimizer(recipe, chunks, ranks))
        named = {name: p for name, p in models.unwrap(chunks[0]).named_parameters()}
        before = {name: p.detach().float().clone() for name, p in named.items()}
        gradients = []
        for group in stepper.optimizer.param_groups:
            group["weight_decay"] = 0.1 * group.get("wd_mult", 1.0)
        for _ in range(2):
            gradients.append({name: torch.randn(p.shape) for name, p in named.items()})
            for name, p in named.items():
                p.main_grad.copy_(gradients[-1][name])
            stepper(torch.zeros(()))
        after = {name: p.detach().float().clone() for name, p in named.items()}
    # PyTorch iterates in bf16, where two right answers lie two percent apart
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.float().clone())
    wanted = oracle(before, gradients, plan, optim)
    assert any(name.endswith("linear_qkv.weight") for name in wanted)
    for name, tensor in after.items():
        moved = (wanted[name] - before[name]).norm()
        rounding = 2**-8 * before[name].norm() if precision == "bf16" else 0.0
        assert (tensor - wanted[name]).norm() <= 1e-4 * moved + rounding, name


@there
@pytest.mark.slow
def test_ranks_step_the_whole_matrix(tmp_path: Path) -> None:
    """Gathered, each rank has what one alone would, from a checkpoint of another layout as well, as data-parallel ones
    have; a rank that takes its own block for a matrix has not."""

    def recipe(name: str, **parallel: object) -> Raw:
        optim = {"optimizer": "muon", "lr": 1e-2, "muon_extra_scale": 0.2, "muon_precision": "highest"}
        optim |= {"muon_tp": "blockwise"} if name == "blocks" else {}
        model = {"vocab_divisor": 2 // int(str(parallel.get("tp", 1)))}
        return asked(tmp_path / name, optim, train={"steps": 4}, parallel=parallel, model=model, run={"save_every": 2})

    alone = run_here(recipe("alone"))
    shutil.copytree(tmp_path / "alone", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "iter_0000004")
    (tmp_path / "resumed" / "latest_checkpointed_iteration.txt").write_text("2")
    jobs: list[dict[str, object]] = [{"recipe": recipe(name, tp=2)} for name in ("gathered", "blocks")]
    jobs += [{"recipe": recipe("resumed", tp=2), "resume": True}]
    jobs += [{"recipe": recipe("spread", distributed_optimizer=False)}]
    gathered, blocks, resumed, spread = run_world(2, jobs, tmp_path / "out.json")
    assert gathered == pytest.approx(alone, rel=1e-5) and spread == pytest.approx(alone, rel=1e-5)
    assert resumed == pytest.approx(alone[2:], rel=1e-5)
    assert blocks[0] == pytest.approx(alone[0], rel=1e-5) and blocks != pytest.approx(alone, rel=1e-4)


@there
@pytest.mark.slow
def test_experts_are_stepped_where_they_are(tmp_path: Path) -> None:
    """Shared out over ranks, whole or cut like the rest, as on one alone."""
    folder = str(make("qwen3_moe", tmp_path / "model"))

    def recipe(name: str, divisor: int = 2, **parallel: object) -> Raw:
        optim = {"optimizer": "muon", "lr": 1e-2, "muon_extra_scale": 0.2, "muon_precision": "highest"}
        train: dict[str, object] = {"steps": 4, "global_batch": 4}
        model: dict[str, object] = {"path": folder, "vocab_divisor": divisor, "config": {"moe_aux_loss_coeff": 0.0}}
        return asked(tmp_path / name, optim, train=train, model=model, parallel=parallel)

    alone = run_here(recipe("alone"))
    jobs: list[dict[str, object]] = [{"recipe": recipe("shared", ep=2, distributed_optimizer=False)}]
    jobs += [
        {"recipe": recipe("cut", divisor=1, tp=2, etp=2)},
        {"recipe": recipe("both", divisor=1, tp=2, ep=2, etp=1)},
    ]
    for found in run_world(2, jobs, tmp_path / "out.json"):
        assert found == pytest.approx(alone, rel=1e-5)


@there
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_is_the_same_run(precision: str, tmp_path: Path) -> None:
    def recipe(name: str, steps: int) -> Raw:
        train = {"steps": steps, "precision": precision, "deterministic": True}
        optim = {"optimizer": "muon", "schedule": "constant", "lr": 3e-3}
        return asked(tmp_path / name, optim, train=train, run={"save_every": 2})

    whole = run_here(recipe("whole", 4))
    run_here(recipe("run", 2))
    assert run_here(recipe("run", 4), resume=True) == whole[2:]
    for at in ("whole", "run"):
        state = (tmp_path / at / "iter_0000004" / ".metadata").read_bytes()
        assert b"optimizer.state.momentum_buffer.decoder" in state
        assert (
            b"optimizer.state.exp_avg.embedding" in state
            and b"exp_avg.decoder.layers.mlp.linear_fc1.weight" not in state
        )


@there
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt2", "gemma4_e2b"])
def test_the_budget_counts_its_state(family: str, tmp_path: Path) -> None:
    folder = str(make(family, tmp_path / "model"))
    model = {"path": folder, "config": {"mtp_num_layers": 0}}
    optim = {"optimizer": "muon", "muon_split_qkv": False}
    recipe = parse_recipe(asked(tmp_path / "run", optim, model=model, train={"precision": "bf16"}))
    plan, ranks = blueprint(recipe), Ranks(0, 1, 0, 1, "cpu", te=False)
    with session(recipe, ranks):
        chunks = [models.wrap(recipe, network, ranks) for network in models.build(recipe, plan, ranks)]
        found = models.optimizer(recipe, chunks, ranks)
        stepped = {
            type(one.optimizer).__name__.endswith("Muon"): sum(
                p.numel() for group in one.optimizer.param_groups for p in group["params"]
            )
            for one in found.chained_optimizers
        }
    counts = count(recipe, plan, 0)
    assert stepped[True] == counts.matrices and sum(stepped.values()) == counts.base
    wanted = 8 * counts.matrices + 12 * (counts.base - counts.matrices)  # with fp32 copies
    assert predict(recipe, plan, 1).parts["optimizer"] == wanted


@there
@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"lora": {"rank": 4}}, "adapters are stepped by Adam"),
        ({"train": {"precision": "fp16"}}, "no loss scale"),
        ({"parallel": {"distributed_optimizer": True}}, "which the distributed optimizer cuts"),
        ({"fp8": {"recipe": "tensorwise"}}, "does not step FP8"),
        ({"train": {"tower": "trained"}}, "a tower is stepped by Adam"),
    ],
)
def test_what_it_does_not_go_with_is_named(sections: dict[str, dict[str, object]], said: str, tmp_path: Path) -> None:
    recipe = parse_recipe(asked(tmp_path, {"optimizer": "muon"}, **sections))
    with pytest.raises(UnsupportedError, match=said) as raised:
        muon.check_muon(recipe, blueprint(recipe), 2, dry=False)
    assert raised.value.hint
    alone = dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, optimizer="adam"))
    muon.check_muon(alone, blueprint(recipe), 2, dry=False)


@there
def test_layers_of_two_kinds_are_not_parted(tmp_path: Path) -> None:
    for family, said in (
        ("gemma4_31b", "layers differ"),
        ("mimo_v2_flash", "layers differ"),
        ("step_3_5_flash", "gate"),
    ):
        model = {"path": str(make(family, tmp_path / family))}
        recipe = parse_recipe(asked(tmp_path / "run", {"optimizer": "muon"}, model=model))
        with pytest.raises(UnsupportedError, match=said):
            muon.check_muon(recipe, blueprint(recipe), 1, dry=False)


def test_without_its_package_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "_installed", tuple)
    recipe = parse_recipe(asked(tmp_path, {"optimizer": "muon"}))
    with pytest.raises(MbxError) as raised:
        prepare(recipe)
    if core_release().muon:
        assert isinstance(raised.value, DeviceError) and "needs emerging-optimizers" in raised.value.fact
        assert raised.value.hint and "[muon]" in raised.value.hint
        prepare(recipe, dry=True)
    else:
        assert isinstance(raised.value, UnsupportedError) and raised.value.hint == "megatron-core 0.18 or newer"


@there
def test_the_proof_says_what_it_does_not_compare(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="not with Muon's"):
        verify_training(parse_recipe(asked(tmp_path, {"optimizer": "muon"})))
