"""What Megatron Core's own modules keep for their backward pass, tensor by tensor, against what the budget counts.

On a CPU Transformer Engine's norms and attention are missing: stand-ins keep what those keep, without statistics of a
few bytes a token. Everything between them is Megatron Core's: products, activations, router, dispatcher, latents.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _trainings import raw
from torch import nn

from fixtures.make_tiny import make
from mbx.installed import core_release
from mbx.models.device import Spread
from mbx.models.megatron.build import build_model
from mbx.models.megatron.core.cpu import megatron_on_cpu
from mbx.models.megatron.processes import process_group
from mbx.train.budget.activations import kept
from mbx.train.budget.adapters import chosen
from mbx.train.budget.load import Load
from mbx.train.budget.mixers import mixer
from mbx.train.budget.shape import shape_of
from mbx.train.lora import attach as lora
from mbx.train.model.blueprint import blueprint
from mbx.train.model.config import gpu_config
from mbx.train.recipe.parse import parse_recipe

TOKENS = 32
LATENT = ["linear_q_proj", "linear_kv_down_proj", "linear_kv_up_proj", "linear_proj"]


class _Keeps(torch.autograd.Function):
    """Keeps `tensors` and returns a new tensor shaped as the first, or as `shape`, then kept as well."""

    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...] | None, *tensors: torch.Tensor) -> torch.Tensor:
        out = torch.empty(shape or tensors[0].shape, dtype=tensors[0].dtype)
        ctx.save_for_backward(*tensors, *((out,) if shape else ()))
        return out.fill_(0.5)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, ...]:
        raise NotImplementedError


class _Norm(nn.Module):
    """Transformer Engine's norm: it keeps its input, contiguous."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Keeps.apply(None, x.contiguous())  # type: ignore[no-any-return]


class _Attention(nn.Module):
    """Fused attention: it keeps q, k, v, contiguous, and its output; [s, b, heads, d] → [s, b, heads · d_v]."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object
    ) -> torch.Tensor:
        shape = (*query.shape[:2], query.shape[2] * value.shape[3])
        return _Keeps.apply(shape, query.contiguous(), key.contiguous(), value.contiguous())  # type: ignore[no-any-return]


def _stand_in(model: nn.Module) -> None:
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if "norm" in leaf and type(module).__name__ != "IdentityOp":
            setattr(model.get_submodule(parent), leaf, _Norm())
        elif leaf == "core_attention":
            setattr(model.get_submodule(parent), leaf, _Attention())


class _Held:
    """What a graph keeps a tensor as."""

    def __init__(self, value: torch.Tensor | None) -> None:
        self.value = value


class _Kept:
    """Counts the bytes of storages that a graph keeps, by the decoder layer that ran when they were saved."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.layer, self.found = model, "", list[tuple[str, weakref.ref[_Held], int, int]]()
        self.held: list[weakref.ref[_Held]] = []
        own = (*model.parameters(), *model.buffers())
        self.own = {tensor.untyped_storage().data_ptr() for tensor in own}
        for number, layer in enumerate(model.decoder.layers):  # type: ignore[union-attr, arg-type]
            layer.register_forward_pre_hook(lambda *_, n=number: setattr(self, "layer", str(n)))
            layer.register_forward_hook(lambda *_: setattr(self, "layer", ""))

    def pack(self, tensor: torch.Tensor) -> _Held:
        held, storage = _Held(tensor), tensor.untyped_storage()
        self.held.append(weakref.ref(held))
        if storage.data_ptr() not in self.own:
            self.found.append((self.layer, weakref.ref(held), storage.data_ptr(), storage.nbytes()))
        return held

    def let_go(self) -> None:
        """Part what a graph holds from what holds the graph, through which no collector sees.

        A graph keeps the hooks that packed for it, and so this object; a router's module keeps the graph.
        """
        for reference in self.held:
            if (held := reference()) is not None:
                held.value = None
        del self.model

    def by_layer(self) -> list[int]:
        seen: dict[int, tuple[str, int]] = {}
        for layer, alive, pointer, size in self.found:
            if alive() is not None and layer:
                seen.setdefault(pointer, (layer, size))
        count = len(self.model.decoder.layers)  # type: ignore[union-attr, arg-type]
        self.let_go()
        return [sum(size for layer, size in seen.values() if layer == str(n)) for n in range(count)]


@pytest.fixture(autouse=True)
def _plain_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fused on a GPU: rotation keeps nothing, an activation its input."""
    from megatron.core.transformer import attention

    monkeypatch.setattr(attention, "apply_rotary_pos_emb", lambda t, *_, **__: t * 1.0)
    gated = lambda _, x, gate: _Keeps.apply(None, x, gate.contiguous())  # noqa: E731
    monkeypatch.setattr(attention.Attention, "_apply_output_gate", gated, raising=False)
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("targets", [None, "attention", "all"])
@pytest.mark.parametrize(
    "family",
    ["llama", "qwen2", "qwen3", "gemma3_text", "nemotron", "mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v2_lite"]
    + ["deepseek_v3", "llama4_scout", "glm4_moe", "mimo_v2_flash", "step_3_5_flash"]
    + ["gemma4_31b", "gemma4_e2b", "gemma4_26b"],
)
def test_a_layer_keeps_what_is_counted(family: str, targets: str | None, tmp_path: Path) -> None:
    if targets and family.startswith(("gemma4", "step")):
        pytest.skip("takes no adapters")
    folder = make(family, tmp_path / family)
    names = LATENT if family == "deepseek_v2_lite" else ["linear_qkv", "linear_proj"]
    if family == "deepseek_v3":
        names = ["linear_q_down_proj", "linear_q_up_proj", *LATENT[1:]]
    names = names[:-1] if family == "gemma3_text" else names
    if targets == "all":
        names = names + (["linear_fc1"] if family == "gemma3_text" else ["linear_fc1", "linear_fc2"])
    sections = {"lora": {"rank": 4, "targets": names}} if targets else {}
    train = {"precision": "bf16", "micro_batch": 1, "global_batch": 1}
    data = {"kind": "pattern", "length": TOKENS}
    recipe = parse_recipe(raw(tmp_path / "run", model={"path": str(folder)}, data=data, train=train, **sections))
    plan = blueprint(recipe)
    fusion = gpu_config(plan.config).get("bias_activation_fusion", False)
    with megatron_on_cpu(), process_group():
        model = build_model({**plan.config, "mtp_num_layers": None}, Spread(dtype="bf16")).bfloat16()
        for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
            config.bias_activation_fusion = fusion
            config.activation_func = config.activation_func if fusion else torch.nn.functional.silu
        _stand_in(model)
        if targets:
            lora.attach(model, recipe.lora, plan, 0)
        counted = _Kept(model)
        ids = torch.randint(0, 100, (1, TOKENS))
        with torch.autograd.graph.saved_tensors_hooks(counted.pack, lambda held: held.value):
            loss = model(ids, torch.arange(TOKENS)[None], None, labels=ids)
            found = counted.by_layer()
        assert loss.requires_grad
    shape = shape_of(plan.config)
    load = Load(recipe, plan, shape, TOKENS, chosen(recipe, plan))
    expected = [kept(load, layer) - 4 * layer.heads.count * TOKENS for layer in shape.layers]  # statistics
    if shape.layer_input:  # all layers' is one tensor, and its norm's input lies in front of them
        found, expected = [sum(found)], [sum(expected) - 2 * TOKENS * shape.layer_input * len(shape.layers)]
    assert found == pytest.approx(expected, rel=0.01), [a - b for a, b in zip(found, expected, strict=True)]


class _Kernel(torch.autograd.Function):
    """A fused kernel: it keeps its inputs and one tensor more of `extra` elements, and returns zeros of `shape`."""

    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...], extra: int, *tensors: torch.Tensor) -> torch.Tensor:
        kept = (torch.empty(extra, dtype=tensors[0].dtype),) if extra else ()
        ctx.save_for_backward(*tensors, *kept)
        return torch.zeros(shape, dtype=tensors[0].dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, ...]:
        raise NotImplementedError


class _L2Norm(torch.autograd.Function):
    """fla's norm: it keeps its output and a statistic of four bytes a head."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        out = x.clone()
        ctx.save_for_backward(out, torch.empty(x.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, ...]:
        raise NotImplementedError


class _Silu(torch.autograd.Function):
    """The compiled gated norm: it keeps the norm's output and the gate as they are."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(y, gate)
        return torch.zeros_like(y)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, ...]:
        raise NotImplementedError


@pytest.mark.parametrize("fused", [True] if core_release().fla_convolution else [True, False])
def test_a_gated_delta_net_keeps_what_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    """Megatron Core's module between stand-ins for kernels: flash-linear-attention's and, `fused`, causal-conv1d's.

    Where releases differ: the module is one of a package, and the convolution has arguments and a result of its own.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.ssm import gated_delta_net as core
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    from mbx.models.megatron.config import transformer_config

    folder = make("qwen3_next", tmp_path / "model")
    train = {"precision": "bf16", "micro_batch": 1, "global_batch": 1}
    data = {"kind": "pattern", "length": 2 * TOKENS}
    recipe = parse_recipe(raw(tmp_path / "run", model={"path": str(folder)}, data=data, train=train))
    plan, tokens = blueprint(recipe), 2 * TOKENS
    shape = shape_of(plan.config)
    assert shape.delta is not None
    heads = shape.delta.heads

    def rule(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, g: torch.Tensor, beta: torch.Tensor, **_: object):  # type: ignore[no-untyped-def]
        summed = g.detach().clone()  # what the kernel keeps is its own sum of g
        out = _Kernel.apply(v.shape, q.shape[1] * heads * 64, q, k, v, summed, beta)
        return out + g.mean().to(v.dtype), None  # g's own past is kept as well

    convolve = lambda x, **_: _Kernel.apply(x.shape, 0, x)  # noqa: E731
    kernels = {"HAVE_FLA": True, "l2norm": _L2Norm.apply, "chunk_gated_delta_rule": rule}
    kernels |= {"causal_conv1d_fn": convolve if fused else None, "causal_conv1d": lambda **k: (convolve(**k), None)}
    for home in {core.GatedDeltaNet.__module__, core.torch_chunk_gated_delta_rule.__module__}:
        for name, kernel in kernels.items():
            monkeypatch.setattr(f"{home}.{name}", kernel, raising=False)
    gated = lambda self, x, gate: _Silu.apply(self.out_norm(x.reshape(-1, x.shape[-1])), gate)  # noqa: E731
    monkeypatch.setattr(core.GatedDeltaNet, "_apply_gated_norm", gated)
    with megatron_on_cpu(), process_group():
        config = transformer_config(plan.config, Spread(dtype="bf16"), use_te=False)
        parts = core.GatedDeltaNetSubmodules(ColumnParallelLinear, _PlainNorm, RowParallelLinear)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        module = core.GatedDeltaNet(config, parts, layer_number=1, pg_collection=groups).bfloat16()
        model = nn.Module()
        model.decoder = nn.Module()
        model.decoder.layers = nn.ModuleList([module])
        counted = _Kept(model)
        x = torch.zeros(tokens, 1, shape.hidden, dtype=torch.bfloat16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(counted.pack, lambda held: held.value):
            out, _ = module(x * 1.0, None)
            found = counted.by_layer()
        assert out.requires_grad
    load = Load(recipe, plan, shape, tokens, fuses_convolution=fused)
    expected = tokens * (mixer(load, shape.layers[0]) - shape.hidden * 2)  # no norm here
    statistics = 4 * heads * tokens  # of the norm behind the rule, whose stand-in keeps none
    assert found[0] == pytest.approx(expected - statistics, rel=0.01)


class _PlainNorm(_Norm):
    """The stand-in as Megatron Core builds a norm."""

    def __init__(self, **_: object) -> None:
        super().__init__()
