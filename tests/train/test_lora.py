"""Adapters on linears that fuse their norm, as Transformer Engine's do, and the laws of the joined factors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from _trainings import raw
from torch import nn

from converters.errors import UnsupportedError
from mbx.models.megatron.build import build_model
from mbx.models.megatron.core.cpu import megatron_on_cpu
from mbx.models.megatron.processes import process_group
from mbx.train.lora import attach as lora
from mbx.train.model.blueprint import blueprint
from mbx.train.recipe.parse import parse_recipe


class TELayerNormColumnParallelLinear(nn.Module):
    """Returns what Megatron Core's class of this name does: `((y, normed), None)` once asked for the norm's output."""

    def __init__(self, norm: nn.Module, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner, self.return_layernorm_output = norm, inner, False

    @property
    def weight(self) -> nn.Parameter:
        return self.inner.weight  # type: ignore[return-value]

    def forward(self, x: torch.Tensor) -> object:
        normed = self.norm(x)
        y, _ = self.inner(normed)
        return ((y, normed), None) if self.return_layernorm_output else (y, None)


def randomise(layer: lora.LoraLinear) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("leaf", ["self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2"])
def test_the_output_is_that_of_the_merged_weight(leaf: str, dora: bool) -> None:
    recipe = parse_recipe(raw(Path("unused"), lora={"rank": 4, "alpha": 8.0, "dora": dora}))
    plan = blueprint(recipe)
    with megatron_on_cpu(), process_group():
        model = build_model(plan.config)
        lora.attach(model, recipe.lora, plan, 0)
        layer = model.get_submodule(f"decoder.layers.1.{leaf}")
        assert isinstance(layer, lora.LoraLinear)
        x = torch.randn(7, 2, layer.base.weight.shape[1])
        before, _ = layer(x)
        assert torch.allclose(before, layer.base(x)[0], atol=1e-5), "a new adapter changes nothing"
        randomise(layer)
        out, _ = layer(x)
        assert torch.allclose(out, x @ layer.merged().t(), atol=1e-4)
        assert not torch.allclose(out, before, atol=1e-2)
        if dora:
            assert torch.allclose(layer.merged().norm(dim=1), layer._magnitudes().abs(), atol=1e-4)


def test_a_fused_norm_hands_out_its_output() -> None:
    recipe = parse_recipe(raw(Path("unused"), lora={"rank": 4}))
    plan = blueprint(recipe)
    with megatron_on_cpu(), process_group():
        model = build_model(plan.config)
        attention = model.get_submodule("decoder.layers.0.self_attention")
        norm = nn.RMSNorm(32)
        plain = attention.linear_qkv
        attention.linear_qkv = TELayerNormColumnParallelLinear(norm, plain)
        lora.attach(model, recipe.lora, plan, 0)
        layer = attention.linear_qkv
        assert isinstance(layer, lora.LoraLinear) and layer.base.return_layernorm_output
        randomise(layer)
        x = torch.randn(5, 2, 32, requires_grad=True)
        out, bias = layer(x)
        assert bias is None
        assert torch.allclose(out, norm(x) @ layer.merged().t(), atol=1e-4)
        out.sum().backward()
        assert layer.lora_a.grad is not None and plain.weight.grad is None


def test_other_linears_are_refused() -> None:
    recipe = parse_recipe(raw(Path("unused"), lora={"rank": 4}))
    plan = blueprint(recipe)
    with megatron_on_cpu(), process_group():
        model = build_model(plan.config)
        model.get_submodule("decoder.layers.0.mlp").linear_fc2 = nn.Linear(4, 4)
        with pytest.raises(UnsupportedError, match="linear_fc2.weight` is of no linear"):
            lora.attach(model, recipe.lora, plan, 0)
