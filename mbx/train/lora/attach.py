"""LoRA and DoRA on a Megatron Core model: which linears take an adapter, and putting them on."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from converters.adapters.sites import ADAPTABLE, is_weight, spellings
from converters.errors import LayoutError, StorageError, UnsupportedError, UsageError
from converters.rows.config_map import environment
from converters.rows.pack import Pack
from mbx.train.lora.grouped import LoraGrouped
from mbx.train.lora.layer import COLUMN, GROUPED_COLUMN, GROUPED_ROW, ROW, WHOLE, LoraLinear, Slots
from mbx.train.lora.product import ends_checkpoint
from mbx.train.model.blueprint import Blueprint, as_int
from mbx.train.recipe.sections import Lora, Recipe

__all__ = ["LoraGrouped", "LoraLinear", "adapters", "attach", "base_of", "check_lora", "only_adapters"]

#: Linears of latent attention, and of the standard one; then those of every model.
_LATENT = ("linear_q_proj", "linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj")
_STANDARD = ("linear_qkv",)
TARGETS = (*_STANDARD, *_LATENT, "linear_proj", "linear_fc1", "linear_fc2")
_LOCAL = re.compile(r"\.local_experts\.(\d+)\.")


def check_lora(recipe: Recipe, plan: Blueprint) -> None:
    """Refuse targets that have no adapter here, before anything is built."""
    if not recipe.lora.targets:
        raise UsageError(
            "lora.targets is empty: nothing would be trained",
            hint="lora.targets=linear_qkv,linear_proj adapts attention",
        )
    if unknown := [name for name in recipe.lora.targets if name not in TARGETS]:
        raise UsageError(
            f"lora.targets: {', '.join(unknown)}; adapters exist for {', '.join(TARGETS)}",
            hint="q_proj, k_proj, v_proj are linear_qkv; o_proj linear_proj; gate_proj, up_proj linear_fc1; "
            "down_proj linear_fc2",
        )
    if recipe.lora.adapter and not Path(recipe.lora.adapter).is_dir():
        raise StorageError(f"lora.adapter: `{recipe.lora.adapter}` is no folder")
    if plan.config.get("experimental_attention_variant"):
        raise UnsupportedError("adapters are supported on standard and latent attention; this model has another")
    has = _attention(plan)
    if absent := [name for name in recipe.lora.targets if name in (*_STANDARD, *_LATENT) and name not in has]:
        raise UsageError(
            f"lora.targets: this model has no {', '.join(absent)}",
            hint=f"lora.targets={','.join((*has, 'linear_proj', 'linear_fc1', 'linear_fc2'))}",
        )
    behind = [name for name in recipe.lora.targets if name in ("linear_proj", "linear_fc2")]
    if behind and plan.config.get("model.post_layernorms"):
        raise UnsupportedError(
            f"lora.targets: this model has a norm behind {', '.join(behind)}, which take no adapter here",
            hint=f"lora.targets={','.join((*has, 'linear_fc1'))}",
        )
    experts = plan.config.get("num_moe_experts") and {"linear_fc1", "linear_fc2"} & set(recipe.lora.targets)
    if experts and recipe.parallel.etp > 1:
        raise UnsupportedError(
            "experts that have adapters are not cut over ranks", hint="parallel.etp=1, and parallel.ep shares them out"
        )
    if recipe.lora.dora and recipe.fp8.recipe != "none":
        raise UnsupportedError("DoRA under FP8 is not supported: its norms would not be those of the FP8 weights")


def _attention(plan: Blueprint) -> tuple[str, ...]:
    """Linears in front of the model's attention."""
    if not plan.config.get("multi_latent_attention"):
        return _STANDARD
    queries = ("linear_q_proj",) if plan.config.get("q_lora_rank") is None else _LATENT[1:3]
    return (*queries, *_LATENT[3:])


def attach(model: nn.Module, lora: Lora, plan: Blueprint, seed: int) -> None:
    """Freeze `model` and put an adapter on every target linear of its decoder; `seed` draws the A's."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if name.startswith("decoder.layers.") and name.rpartition(".")[2] in lora.targets
    ]
    fused = _fused(plan)
    for name, base in found:
        kind = type(base).__name__
        if kind not in (*COLUMN, *ROW, *WHOLE, *GROUPED_COLUMN, *GROUPED_ROW):
            raise UnsupportedError(f"`{name}` is a {kind}, which takes no adapter")
        parent, _, leaf = name.rpartition(".")
        grouped = kind in (*GROUPED_COLUMN, *GROUPED_ROW)
        weight = base.weight0 if grouped else base.weight
        assert isinstance(weight, torch.Tensor)
        # by name, counted over the whole model, so that no layout and no stage changes what is drawn
        local = range(int(base.num_gemms)) if grouped else (None,)
        names = [_global_name(model, name, n) for n in local]
        seeds = [seed + zlib.crc32(own.encode()) for own in names]
        slots = _slots(leaf, weight, plan, _weight(names[0]) in fused)
        adapter: nn.Module
        if grouped:
            adapter = LoraGrouped(base, lora, slots, model.config, seeds)
        else:
            expert = _LOCAL.search(name) is not None
            adapter = LoraLinear(base, lora, slots, model.config, seeds[0], expert)
            adapter.ends_checkpoint = not expert and ends_checkpoint(model.get_submodule(parent), leaf, model.config)
        setattr(model.get_submodule(parent), leaf, adapter)
    if hasattr(model, "embedding"):
        # recomputed layers only have gradients when their input asks for one; a frozen embedding's does not
        model.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))  # type: ignore[union-attr]


def _fused(plan: Blueprint) -> frozenset[str]:
    """Weights that Transformers holds in one tensor as well, experts above all: PEFT gives those one adapter.

    Raises UnsupportedError for a linear that no PEFT adapter fits.
    """
    if plan.table is None:
        return frozenset()
    found = set()
    for row in plan.table.expand(environment(plan.config), None):
        if not is_weight(row) or ".linear_" not in f".{row.mcore}":
            continue
        if row.spec.op not in ADAPTABLE:
            raise UnsupportedError(f"`{row.mcore}` (op {row.spec.op}) takes no adapter")
        together = any(other.spec.stacked for other in spellings(plan.table, row))
        if row.spec.op in ("qkv_fused", "glu_fused", "glu_zip") or together:
            found.add(row.mcore)
    return frozenset(found)


def _slots(leaf: str, weight: torch.Tensor, plan: Blueprint, fused: bool) -> Slots:
    from mbx.models.megatron.core.groups import parallel_state

    rows = weight.shape[0]
    gated = leaf == "linear_fc1" and bool(plan.config.get("gated_linear_unit"))
    if leaf == "linear_qkv" and not fused:
        heads = as_int(plan.config, "num_attention_heads")
        groups = plan.config.get("num_query_groups") or heads
        head = plan.config.get("kv_channels") or as_int(plan.config, "hidden_size") // heads
        assert isinstance(groups, int) and isinstance(head, int)
        tp = parallel_state.get_tensor_model_parallel_world_size()
        if groups % tp:
            raise LayoutError(f"tp {tp} does not divide the {groups} query groups, which adapters need")
        pack = Pack(groups // tp, (heads // groups * head, head, head))
    elif gated and not fused:
        pack = Pack(1, (rows // 2, rows // 2))
    else:
        pack = Pack(1, (rows,))
    if pack.rows != rows:
        raise UnsupportedError(f"`{leaf}` has {rows} rows, {pack.rows} were expected: no adapter fits")
    return Slots(pack, gated)


def _global_name(model: nn.Module, name: str, expert: int | None = None) -> str:
    """A module's name with layers counted over the whole pipeline and experts over all ranks."""
    from mbx.models.megatron.core.groups import parallel_state

    layer = re.match(r"decoder\.layers\.(\d+)\.", name)
    assert layer is not None
    number = model.get_submodule(layer.group(0)[:-1]).layer_number
    rest = name[layer.end() :]
    if match := _LOCAL.search(name):
        expert = int(match[1])
    if expert is not None:
        count = model.get_submodule(name.partition(".experts.")[0] + ".experts").num_local_experts
        expert += parallel_state.get_expert_model_parallel_rank() * int(count)  # type: ignore[arg-type]
        rest = f"mlp.experts.local_experts.{expert}.{name.rpartition('.')[2]}"
    return f"decoder.layers.{int(number) - 1}.{rest}"  # type: ignore[arg-type]


def _weight(module: str) -> str:
    """A table's name for the weight of a module named by `_global_name`."""
    if match := _LOCAL.search(module):
        before, _, leaf = module.partition(match[0])
        return f"{before}.{leaf}.weight{match[1]}"
    return f"{module}.weight"


@dataclass(frozen=True, slots=True)
class Placed:
    """The adapter of one weight, named as a table names it, and views of its parameters on this rank.

    a: [atoms · r, in]; b: [rows of the atom, r] each; m likewise, empty without DoRA.
    """

    weight: str
    layer: LoraLinear | LoraGrouped
    a: torch.Tensor
    b: tuple[torch.Tensor, ...]
    m: tuple[torch.Tensor, ...] = ()


def adapters(model: nn.Module) -> Iterator[Placed]:
    """Adapters of a bare model, expert by expert."""
    for name, layer in model.named_modules():
        if isinstance(layer, LoraGrouped):
            for n in range(len(layer.lora_a)):
                b = tuple(layer.b(i)[n] for i in range(layer.slots.atoms))
                yield Placed(_weight(_global_name(model, name, n)), layer, layer.lora_a[n], b)
        elif isinstance(layer, LoraLinear):
            atoms = range(layer.slots.atoms)
            m = tuple(layer.get_parameter(f"lora_m{i}") for i in atoms) if layer.dora else ()
            yield Placed(_weight(_global_name(model, name)), layer, layer.lora_a, tuple(map(layer.b, atoms)), m)


def only_adapters(weights: Mapping[str, object]) -> dict[str, object]:
    """The adapters' entries of a sharded state dict."""
    return {name: value for name, value in weights.items() if name.rpartition(".")[2].startswith("lora_")}


def base_of(recorded: str) -> Path:
    """Where a resumed adapter run finds its frozen base; UsageError where it is gone."""
    if not recorded or not Path(recorded).is_dir():
        raise UsageError(
            f"‹resume›: the adapters' base `{recorded or 'random weights'}` is not there",
            hint="put it back: the run's checkpoints hold adapters only",
        )
    return Path(recorded)
