"""Layers of attention beside Mamba-2 (Falcon-H1) against Transformers, on a CPU: whole, and with one thing wrong.

Megatron Core's own mixer runs, over the recurrence in torch; every multiplier of the config is set and has to be felt.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from converters.errors import UnsupportedError, UsageError
from converters.rows.expr import Value
from fixtures.make_tiny import make
from mbx.models.device import Spread
from mbx.models.megatron.build import build_model
from mbx.models.megatron.core.cpu import megatron_on_cpu
from mbx.models.megatron.processes import process_group
from mbx.proof.parity import parity
from mbx.run.job import Options, plan_hf_to_mcore, run
from mbx.torchfile.dcp import read_dcp
from tests.judge import asked_keys
from tests.mamba_on_cpu import mamba_on_cpu
from tests.oracles import compare_logits, hf_logits, loaded_model, mcore_logits

IDS = torch.arange(40).reshape(2, 20) * 5 % 251
#: No two alike, and none of them 1.
MULTIPLIERS: Mapping[str, Value] = {
    "embedding_multiplier": 5.5,
    "lm_head_multiplier": 0.5,
    "attention_in_multiplier": 0.8,
    "attention_out_multiplier": 0.9,
    "key_multiplier": 0.4,
    "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.7,
    "ssm_multipliers": [0.35, 0.45, 0.55, 0.65, 0.75],
    "mlp_multipliers": [0.85, 0.6],
}
DROPPED = [(key, None) for key, value in MULTIPLIERS.items() if isinstance(value, float)]
DROPPED += [(key, n) for key, value in MULTIPLIERS.items() if isinstance(value, list) for n in range(len(value))]


@dataclass(frozen=True)
class Falcon:
    """A tiny checkpoint on both sides, its flat config, and Transformers' logits for `IDS`."""

    source: Path
    target: Path
    config: dict[str, Value]
    reference: torch.Tensor

    def differs(self, changed: Mapping[str, Value], change: Callable[[nn.Module], None] | None = None) -> float:
        """The largest difference of a logit, of Megatron Core's model with a changed config or changed itself."""
        model = loaded_model({**self.config, **changed}, self.target / "iter_0000000")
        if change is not None:
            change(model)
        return compare_logits(mcore_logits(model, IDS, vocab_size=251), self.reference).max_abs


def falcon(folder: Path, keys: Mapping[str, Value]) -> Falcon:
    """The same with `keys` over the tiny config; tensors that these bring are drawn."""
    source = make("falcon_h1_0_5b", folder / "hf")
    config = json.loads((source / "config.json").read_text(encoding="utf-8")) | MULTIPLIERS | dict(keys)
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if config["mamba_rms_norm"]:
        tensors = load_file(source / "model.safetensors")
        for layer in range(config["num_hidden_layers"]):
            tensors[f"model.layers.{layer}.mamba.norm.weight"] = 1 + torch.rand(config["mamba_d_ssm"])
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    job = plan_hf_to_mcore(source, folder / "mcore", Options(sync=False))
    run(job)
    return Falcon(source, folder / "mcore", dict(job.plan.config), hf_logits(source, IDS))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Falcon:
    return falcon(tmp_path_factory.mktemp("falcon"), {})


@pytest.fixture(scope="module")
def megatron() -> Iterator[None]:
    with ExitStack() as stack:
        for context in (mamba_on_cpu(), megatron_on_cpu(), process_group()):
            stack.enter_context(context)
        yield


def test_the_leg_passes(plain: Falcon) -> None:
    with mamba_on_cpu():
        report = parity(plain.source, plain.target, forward=True)
    leg = next(leg for leg in report.legs if leg.name == "forward")
    assert leg.status == "passed" and dict(leg.figures)["max_abs"] <= 1e-4
    assert any("reached: multipliers" in line for line in leg.details)


def test_a_cpu_without_the_kernels_is_named(plain: Falcon) -> None:
    leg = next(leg for leg in parity(plain.source, plain.target, forward=True).legs if leg.name == "forward")
    assert leg.status == "not run"
    assert "Mamba" in leg.summary or "mamba" in leg.summary


def test_megatron_core_asks_for_what_is_written(plain: Falcon, megatron: None) -> None:
    tensors, objects = asked_keys(build_model(plain.config, Spread()))
    stored = read_dcp(plain.target / "iter_0000000")
    assert tensors == stored.tensors.keys() and objects <= stored.objects.keys()
    assert plain.differs({}) <= 1e-5


@pytest.mark.parametrize(("key", "place"), DROPPED)
def test_a_dropped_multiplier_is_found(plain: Falcon, megatron: None, key: str, place: int | None) -> None:
    value = plain.config[key]
    without = 1.0 if place is None else [1.0 if n == place else factor for n, factor in enumerate(value)]  # type: ignore[arg-type]
    assert plain.differs({key: without}) > 1e-3


def test_exchanged_branches_are_found(plain: Falcon, megatron: None) -> None:
    for one, other in (
        ("attention_in_multiplier", "ssm_in_multiplier"),
        ("attention_out_multiplier", "ssm_out_multiplier"),
    ):
        assert plain.differs({one: plain.config[other], other: plain.config[one]}) > 1e-3


@pytest.mark.parametrize(
    ("part", "dim"),
    [
        (r"mamba_mixer\.conv1d[._]weight", -1),  # its taps; since Megatron Core 0.19 the mixer's own parameter
        (r"mamba_mixer\.in_proj\.weight", 0),
        (r"self_attention\.linear_qkv\.weight", 0),
    ],
)
def test_a_wrong_weight_is_found(plain: Falcon, megatron: None, part: str, dim: int) -> None:
    def turned(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if re.search(part, name):
                parameter.data.copy_(parameter.data.flip(dim))

    assert plain.differs({}, turned) > 1e-3


def test_a_norm_behind_the_gate_has_the_model_s_epsilon(tmp_path: Path, megatron: None) -> None:
    normed = falcon(tmp_path, {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "rms_norm_eps": 1e-3})
    assert normed.differs({}) <= 1e-5

    def as_megatron_core_has_it(model: nn.Module) -> None:
        for layer in model.decoder.layers:  # type: ignore[union-attr]
            layer.mamba_mixer.norm.eps = 1e-5

    assert normed.differs({}, as_megatron_core_has_it) > 1e-3


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"rmsnorm": True, "norm_before_gate": True}, UnsupportedError, "norm_before_gate"),
        ({"ssm_multipliers": [1.0, 2.0]}, UsageError, "ssm_multipliers"),
        ({"ssm_multipliers": [1.0, False, 1.0, 1.0, 1.0]}, UsageError, "ssm_multipliers"),
        ({"key_multiplier": -1.0}, UsageError, "key_multiplier"),
        ({"key_multiplier": math.nan}, UsageError, "key_multiplier"),
        ({"residual_multiplier": 2.0}, UnsupportedError, "residual_multiplier"),
        ({"model.rope_scaling": True}, UnsupportedError, "rope_scaling"),
        ({"model.mcore_model": "gpt"}, UnsupportedError, "attention_beside_mamba"),
        ({"model.attention_beside_mamba": None}, UnsupportedError, "ssm_multipliers"),
    ],
)
def test_what_is_not_built_is_named(
    plain: Falcon, megatron: None, change: dict[str, Value], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        build_model({**plain.config, **change}, Spread())
