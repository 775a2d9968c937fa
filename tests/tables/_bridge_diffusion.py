"""Runs Megatron-Bridge's own diffusion models on a CPU: `python _bridge_diffusion.py BRIDGE_SRC HF CKPT`.

Its classes are imported alone, without the rest of the package. In Transformer Engine's place stand Megatron Core's
own linears and norms, and for attention torch's; what Bridge rounds to bf16 on the way stays fp32, and the GELU is the
tanh form that its fused kernel computes. Prints what the model asks a checkpoint for, and how far its output is from
diffusers', as JSON.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from mbx.models.megatron.core.cpu import megatron_on_cpu  # noqa: E402
from mbx.models.megatron.processes import process_group  # noqa: E402
from mbx.models.megatron.weights import sharded_weights  # noqa: E402
from tests.judge import load_torch_dist  # noqa: E402

_BRIDGE = "megatron.bridge"
_Model = TypeVar("_Model")


class _Provider(Generic[_Model]):
    """What Bridge's providers inherit beside a config: nothing that a model reads."""


class _Attention(torch.nn.Module):
    """All positions to all, of packed sequences too: [sequence, batch, heads, width] or without the batch."""

    def forward(self, query: Any, key: Any, value: Any, *_: Any, **packed: Any) -> torch.Tensor:
        parts = [part[:, None] if part.dim() == 3 else part for part in (query, key, value)]
        out = F.scaled_dot_product_attention(*(part.permute(1, 2, 0, 3) for part in parts))
        whole = out.permute(2, 0, 1, 3).flatten(2)
        return whole[:, 0] if packed.get("packed_seq_params") is not None else whole


def _without_name(kind: type) -> type:
    """A class whose constructor takes the `name` that Transformer Engine's does."""

    def build(self: Any, *args: Any, name: object = None, **named: Any) -> None:
        super(made, self).__init__(*args, **named)

    made = type(kind.__name__, (kind,), {"__init__": build})
    return made


def import_bridge(source: Path) -> None:
    """Make `megatron.bridge` importable from `source`, a folder with `megatron/bridge`, package by package."""
    import megatron.core.extensions.transformer_engine as engine
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import TransformerConfig

    packages = ("", ".utils", ".models", ".diffusion", ".diffusion.models")
    kinds = tuple(f".diffusion.models.{kind}" for kind in ("common", "wan", "flux"))
    for package in (*packages, *kinds):
        module = types.ModuleType(_BRIDGE + package)
        module.__path__ = [str(source / Path(*(_BRIDGE + package).split(".")))]
        sys.modules[_BRIDGE + package] = module
    for name, held in (
        ("model_provider", {"ModelProviderMixin": _Provider}),
        ("transformer_config", {"TransformerConfig": TransformerConfig}),
    ):
        module = types.ModuleType(f"{_BRIDGE}.models.{name}")
        module.__dict__.update(held)
        sys.modules[module.__name__] = module
    for name, stand_in in {
        "TEColumnParallelLinear": _without_name(ColumnParallelLinear),
        "TERowParallelLinear": _without_name(RowParallelLinear),
        "TEDotProductAttention": DotProductAttention,
        "TENorm": WrappedTorchNorm,
        "SplitAlongDim": None,
    }.items():
        setattr(engine, name, stand_in)


def _shared(config: dict[str, Any]) -> dict[str, Any]:
    heads, width = config["num_attention_heads"], config["attention_head_dim"]
    return {
        **{"num_attention_heads": heads, "num_query_groups": heads, "kv_channels": width},
        **{"hidden_size": heads * width, "in_channels": config["in_channels"], "use_cpu_initialization": True},
    }


def wan(config: dict[str, Any]) -> torch.nn.Module:
    """Bridge's WanModel of a diffusers config."""
    from diffusers.models.embeddings import TimestepEmbedding

    provider = importlib.import_module(f"{_BRIDGE}.diffusion.models.wan.wan_provider").WanModelProvider(
        **_shared(config),
        **{key: config[key] for key in ("num_layers", "out_channels", "text_dim", "freq_dim")},
        crossattn_emb_size=config["num_attention_heads"] * config["attention_head_dim"],
        ffn_hidden_size=config["ffn_dim"],
        patch_temporal=config["patch_size"][0],
        patch_spatial=config["patch_size"][1],
        apply_rope_fusion=False,
    )
    provider.bias_activation_fusion = False
    provider.activation_func = lambda x: F.gelu(x, approximate="tanh")
    model = importlib.import_module(f"{_BRIDGE}.diffusion.models.wan.wan_model").WanModel(provider)
    model.time_embedder.__class__ = TimestepEmbedding
    return model


def flux(config: dict[str, Any]) -> torch.nn.Module:
    """Bridge's Flux of a diffusers config."""
    shared = _shared(config)
    provider = importlib.import_module(f"{_BRIDGE}.diffusion.models.flux.flux_provider").FluxProvider(
        **shared,
        num_joint_layers=config["num_layers"],
        num_single_layers=config["num_single_layers"],
        ffn_hidden_size=4 * shared["hidden_size"],
        context_dim=config["joint_attention_dim"],
        vec_in_dim=config["pooled_projection_dim"],
        guidance_embed=config["guidance_embeds"],
        axes_dims_rope=config["axes_dims_rope"],
    )
    return importlib.import_module(f"{_BRIDGE}.diffusion.models.flux.flux_model").Flux(provider)


def run_wan(model: Any, given: dict[str, torch.Tensor], config: dict[str, Any]) -> torch.Tensor:
    """Its patches hold pixels before channels, and its sequences are packed."""
    video, (_, space, _) = given["hidden_states"], config["patch_size"]
    channels, frames, height, width = video.shape[1:]
    grid = (frames, height // space, width // space)
    cut = video.reshape(channels, grid[0], 1, grid[1], space, grid[2], space).permute(1, 3, 5, 2, 4, 6, 0)
    patches = cut.reshape(1, grid[0] * grid[1] * grid[2], -1).transpose(0, 1)
    ends = torch.tensor([0, len(patches)])
    names = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")
    packed = SimpleNamespace(**dict.fromkeys(names, ends), qkv_format="thd", cp_group=None, local_cp_size=None)
    out: torch.Tensor = model(
        patches,
        grid_sizes=torch.tensor([grid]),
        t=given["timestep"],
        context=given["encoder_hidden_states"].transpose(0, 1),
        packed_seq_params={"self_attention": packed, "cross_attention": packed},
    )
    return out.transpose(0, 1)


def run_flux(model: Any, given: dict[str, torch.Tensor], config: dict[str, Any]) -> torch.Tensor:
    out: torch.Tensor = model(
        img=given["hidden_states"].transpose(0, 1),
        txt=given["encoder_hidden_states"].transpose(0, 1),
        y=given["pooled_projections"],
        timesteps=given["timestep"],
        img_ids=given["img_ids"][None],
        txt_ids=given["txt_ids"][None],
        guidance=given.get("guidance"),
    )
    return out.transpose(0, 1)


_KINDS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "WanTransformer3DModel": (wan, run_wan),
    "FluxTransformer2DModel": (flux, run_flux),
}


def main(source: Path, hf: Path, checkpoint: Path) -> dict[str, Any]:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from test_diffusion import reference

    expected, told = reference(hf)
    config, given = told["config"], told["given"]
    build, compute = _KINDS[config["_class_name"]]
    with megatron_on_cpu(), process_group():
        import_bridge(source)
        model = build(config)
        # Releases that put `module.` before Wan's keys do not find them again; later ones put nothing.
        model.sharded_state_dict = functools.partial(model.sharded_state_dict, "")
        parts = sharded_weights(model).values()
        asked = {part.key: list(part.global_shape) for part in parts if isinstance(part, ShardedTensor)}
        load_torch_dist(model, checkpoint / "iter_0000000")
        for module in model.modules():
            if hasattr(module, "core_attention"):
                module.core_attention = _Attention()
        with torch.no_grad():
            got = compute(model.eval(), given, config)
    return {"asked": asked, "max_abs": float((got - expected).abs().max()), "std": float(expected.std())}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(*map(Path, sys.argv[1:]))))
