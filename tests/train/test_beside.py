"""What Megatron Core computes beside the main loss sees the rows' masks: no padding is learned, no neighbour."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from _trainings import raw, run_here
from torch import nn

from converters.errors import UsageError
from fixtures.make_tiny import make
from mbx.train.recipe.parse import parse_recipe
from mbx.train.run.log import METRICS

CHATS = (
    [("user", "how many"), ("assistant", "two of eight, and one")],
    [("user", "say it"), ("assistant", "it")],
    [("user", "a"), ("assistant", "bcd"), ("user", "again"), ("assistant", "bcd bcd")],
)
#: Families with prediction layers, with experts, with both; each has balance losses of another kind.
MTP, BALANCED, BOTH = "mimo", "qwen3_moe", "glm4_moe"


def chats(path: Path, *numbers: int) -> str:
    lines = [{"messages": [{"role": r, "content": c} for r, c in CHATS[n]]} for n in numbers]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def first_step(
    tmp_path: Path, family: str, name: str, numbers: tuple[int, ...] = (0,), **sections
) -> dict[str, float]:
    """The figures of a step over chats; `sections` lie over the recipe."""
    hf = tmp_path / family
    if not hf.exists():
        make(family, hf)
    data = {"kind": "chat", "path": chats(tmp_path / f"{name}.jsonl", *numbers), "pack": False, "shuffle": False}
    base = {
        "model": {"path": str(hf)},
        "data": {**data, "length": 64},
        "train": {"steps": 1, "micro_batch": 1, "global_batch": len(numbers)},
        "optim": {"lr": 1e-3},
        "run": {"save": False},
    }
    merged = {key: {**base.get(key, {}), **sections.get(key, {})} for key in {*base, *sections}}
    run_here(raw(tmp_path / name, **merged))
    return json.loads((tmp_path / name / METRICS).read_text().splitlines()[0])


def differing(a: dict[str, float], b: dict[str, float], *but: str) -> list[str]:
    """Figures of two steps that are not equal, but for times and counts."""
    left = {"tokens", "step_s", "tokens_per_s", "tflops", "mfu", "memory_gib", *but}
    assert a.keys() == b.keys()
    return [k for k in a if k not in left and k != "kind" and abs(a[k] - b[k]) > 2e-5 * max(1.0, abs(a[k]))]


@pytest.mark.parametrize(("family", "recompute"), [(MTP, "none"), (BALANCED, "none"), (BOTH, "none"), (BOTH, "full")])
def test_longer_rows_change_nothing(tmp_path: Path, family: str, recompute: str) -> None:
    sections = {
        "train": {"recompute": recompute},
        "model": {"path": str(make(family, tmp_path / family)), "config": {"moe_z_loss_coeff": 1e-2}},
    }
    if family == MTP:
        del sections["model"]["config"]
    short, long = (
        first_step(tmp_path, family, str(n), (0, 2), **sections | {"data": {"length": n}}) for n in (64, 160)
    )
    assert not differing(short, long)
    beside = [k for k in short if k.startswith("mtp_") or k.endswith("balancing_loss") or k == "z_loss"]
    assert len(beside) == {MTP: 1, BALANCED: 2, BOTH: 3}[family]
    assert all(short[k] > 0.5 for k in beside)


def test_packed_and_apart_teach_prediction_layers_the_same(tmp_path: Path) -> None:
    """Rolled labels end with their example: packed, the next one's first tokens would be learned behind it."""
    apart = first_step(tmp_path, MTP, "apart", (0, 1, 2), train={"global_batch": 3})
    packed = first_step(
        tmp_path, MTP, "packed", (0, 1, 2), train={"global_batch": 1}, data={"pack": True, "length": 192}
    )
    assert not differing(apart, packed)


def test_a_row_that_leaves_nothing_to_predict(tmp_path: Path) -> None:
    """Megatron Core divides by the tokens that a prediction layer learns in a micro-batch, of which there are none."""
    path = tmp_path / "short.jsonl"
    hf = make(MTP, tmp_path / MTP)
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    for per_token in (True, False):
        figures = first_step(
            tmp_path,
            MTP,
            f"short-{per_token}",
            model={"path": str(hf)},
            data={"kind": "completion", "path": str(path), "pack": False, "length": 1, "too_long": "truncate"},
            train={"per_token_loss": per_token},
        )
        assert figures["mtp_1_loss"] == 0.0 and 0.0 < figures["grad_norm"] < 1e3


def test_an_expert_bias_moves_when_asked_and_counts_no_padding(tmp_path: Path) -> None:
    """It is the sign of each expert's load: at another length of rows the same, and exported with the weights."""
    from safetensors.torch import load_file

    from mbx.train.checkpoints.export import export_run

    def bias(name: str, rate: float, length: int, lr: float = 1e-9) -> torch.Tensor:
        model = {"path": str(tmp_path / BOTH), "config": {"moe_router_bias_update_rate": rate}}
        first_step(tmp_path, BOTH, name, model=model, data={"length": length}, run={"save": True}, optim={"lr": lr})
        export_run(tmp_path / name, tmp_path / f"{name}-hf")
        weights = load_file(tmp_path / f"{name}-hf" / "model.safetensors")
        return torch.stack([v for k, v in sorted(weights.items()) if k.endswith("e_score_correction_bias")]).float()

    make(BOTH, tmp_path / BOTH)
    still, moved, longer = bias("still", 0.0, 64), bias("moved", 0.25, 64), bias("longer", 0.25, 160)
    assert not torch.equal(still, moved) and torch.equal(moved, longer)
    assert torch.equal(still, bias("zero", 0.25, 64, lr=0.0))  # a learning rate of 0 moves nothing


def test_an_adapter_run_refuses_to_move_the_bias() -> None:
    with pytest.raises(UsageError, match="moves the router's expert bias"):
        parse_recipe({"lora": {"rank": 4}, "model": {"config": {"moe_router_bias_update_rate": 0.001}}})


@pytest.mark.parametrize("family", [BALANCED, BOTH])
def test_a_run_leaves_nothing_of_its_model_behind(tmp_path: Path, family: str) -> None:
    first_step(tmp_path, family, "run", (0, 2))
    gc.collect()
    left = [type(o).__name__ for o in gc.get_objects() if isinstance(o, nn.Module | torch.distributed.ProcessGroup)]
    assert not [name for name in left if name in ("GPTModel", "MoELayer", "ProcessGroup")]
