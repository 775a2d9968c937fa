"""LoRA and DoRA on a Megatron Core model: which linears take an adapter, and putting them on."""

from __future__ import annotations

import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from converters.adapters.sites import Adapted
from converters.errors import UnsupportedError, UsageError
from converters.mcore.keys import HEAD, ROUTER
from mbx.formats.hf import has_weights
from mbx.formats.registry import open_hf
from mbx.torchfile.dcp import read_dcp
from mbx.train.lora.adapter import COLUMN, GROUPED_COLUMN, GROUPED_ROW, ROW, WHOLE, group_of, slots_of
from mbx.train.lora.grouped import LoraGrouped
from mbx.train.lora.layer import LoraLinear
from mbx.train.lora.method import LOW_RANK, Method, Site
from mbx.train.lora.product import ends_checkpoint, kind_of
from mbx.train.lora.whole import thaw
from mbx.train.model.adapted import ALL, FUSED, Linear, adapted, key_of, linears, matches, plain
from mbx.train.model.blueprint import Blueprint
from mbx.train.model.trained_whole import Whole, whole_layers
from mbx.train.recipe.sections import LORA, Lora, Recipe

__all__ = ["LoraGrouped", "LoraLinear", "adapters", "attach", "base_of", "check_lora", "check_resumed", "only_trained"]

#: Where checkpoints of Mixtral and MiniMax-M2 have experts and router; Transformers 5 calls that `mlp` and renames on
#: loading what is no adapter.
_RENAMED = ".block_sparse_moe."
_LOCAL = re.compile(r"\.local_experts\.(\d+)\.")


def check_lora(recipe: Recipe, plan: Blueprint) -> None:
    """Refuse targets that have no adapter here, before anything is built."""
    lora, p = recipe.lora, recipe.parallel
    if not lora.targets:
        raise UsageError(
            "lora.targets is empty: nothing would be trained",
            hint="lora.targets=linear_qkv,linear_proj adapts attention",
        )
    _check_tower(lora, plan)
    found = adapted(lora, plan)
    if HEAD in found and whole_layers(lora, plan).holds(HEAD):
        raise UnsupportedError(
            "the output layer is trained whole, and has no use for an adapter",
            hint="leave it out of lora.targets or of lora.modules_to_save, where a tied embedding is the same",
        )
    _check_dora(lora, found)
    if lora.method != LORA:
        _check_method(recipe, found)
    renamed = [part.module for linear in found.values() for part in linear.parts if _RENAMED in part.module]
    if renamed:
        raise UnsupportedError(
            f"adapters on `{renamed[0]}` are not supported: Transformers has it under another name than its "
            "checkpoints, so that PEFT would not find them",
            hint="leave it out of lora.targets",
        )
    experts = any(".experts." in weight for weight in found)
    if experts and p.etp not in (1, p.tp):
        raise UnsupportedError(
            f"experts that have adapters are cut over all ranks of tensor parallelism or over none; parallel.etp is "
            f"{p.etp}, parallel.tp {p.tp}",
            hint="parallel.etp=1, and parallel.ep shares them out",
        )
    if lora.dora and recipe.fp8.recipe != "none":
        raise UnsupportedError("DoRA under FP8 is not supported: its norms would not be those of the FP8 weights")


def check_resumed(lora: Lora, plan: Blueprint, path: Path) -> None:
    """UsageError where a checkpoint at `path` has adapters that `all-linear` meant then, and not now."""
    # a name means what it did, as does an adapter to begin with
    if not lora.rank or ALL not in lora.targets or lora.adapter:
        return
    known = adapted(lora, plan)
    held = (name.removesuffix(".lora_a") for name in read_dcp(path).tensors if name.endswith(f"{FUSED}.lora_a"))
    if left := sorted(n for n in held if f"{n}.weight" not in known and plain(n, lora, plan) is None):
        raise UsageError(
            f"‹resume›: the checkpoint has an adapter on `{left[0]}`, which lora.targets={ALL} is without since",
            hint="export the adapter, and start another run from it with ‹init-from› and run.dir=NAME",
        )


def _check_tower(lora: Lora, plan: Blueprint) -> None:
    """Refuse a target that is a tower's alone, or its projector's."""
    if plan.hf is None or plan.table is None or not plan.table.beside or not has_weights(plan.hf):
        return
    beside = [
        name.removesuffix(".weight")
        for name in open_hf(plan.hf).tensors
        if name.startswith(plan.table.beside) and name.endswith(".weight")
    ]
    own = [(row.mcore.rpartition(".")[0], module) for row, modules in linears(plan) for module in modules]
    for word in lora.targets:
        if any(matches(word, *pair) for pair in own):
            continue
        if found := next((name for name in beside if matches(word, "", name)), None):
            raise UnsupportedError(
                f"lora.targets: {word} is of the tower (`{found}`), and names linears of the text model",
                hint=f"lora.tower_targets={word}; lora.rank=0 train.tower=trained trains the tower with every weight",
            )


def _check_dora(lora: Lora, found: Collection[str]) -> None:
    """Refuse magnitudes of a router's rows, which PEFT has for linears alone, and of rows that pad the vocabulary: a
    row of zeros has no direction."""
    odd = [weight for weight in found if weight == HEAD or weight.endswith(ROUTER)]
    if lora.dora and odd:
        raise UnsupportedError(f"DoRA on `{odd[0]}` is not supported", hint="lora.dora=false, or leave it out")


def _check_method(recipe: Recipe, found: Mapping[str, Linear]) -> None:
    """Refuse what a method of a user's own does not do: it adapts linears of the decoder, one by one."""
    lora = recipe.lora
    if odd := [one for one in found if one == HEAD or one.endswith(ROUTER) or ".experts." in one]:
        raise UnsupportedError(f"lora.method={lora.method} adapts no `{odd[0]}`", hint="leave it out of lora.targets")
    if fused := [part.module for one in found.values() for part in one.parts if len(part.atoms) > 1]:
        raise UnsupportedError(f"lora.method={lora.method}: `{fused[0]}` is several linears in one")
    idle = [key for key in ("dora", "adapter", "modules_to_save", "tower_targets") if getattr(lora, key)]
    idle = [*(f"lora.{key}" for key in idle), *(["run.export_every"] if recipe.run.export_every else [])]
    if idle:
        raise UnsupportedError(f"lora.method={lora.method} takes no {idle[0]}")


def attach(
    model: nn.Module,
    lora: Lora,
    plan: Blueprint,
    seed: int,
    held: Mapping[str, Adapted] | None = None,
    method: Method = LOW_RANK,
) -> None:
    """Freeze `model`, but for layers that are trained whole, and put an adapter on every target linear of its decoder
    and on its output layer, if that is one; `seed` draws the A's.

    `held`: an adapter to start from or to continue, by weight; what it does not adapt gets none. `method` makes them.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    thaw(model, whole_layers(lora, plan))
    known, done = adapted(lora, plan, held), set[str]()
    for name, base in list(model.named_modules()):
        if not (name.startswith("decoder.layers.") or f"{name}.weight" == HEAD) or not _is_linear(base):
            continue
        kind = kind_of(base)
        grouped = kind in (*GROUPED_COLUMN, *GROUPED_ROW)
        # by name, counted over the whole model, so that no layout and no stage changes what is drawn
        local = range(int(base.num_gemms)) if grouped else (None,)
        names = [_global_name(model, name, n) for n in local]
        weight = _weight(names[0])
        linear = known.get(key_of(weight)) if plan.table else plain(weight.rpartition(".")[0], lora, plan)
        if linear is None:
            continue
        parent, _, leaf = name.rpartition(".")
        own_weight = base.weight0 if grouped else base.weight
        if own_weight is None:  # an output layer that is the embedding
            own_weight = model.shared_embedding_or_output_weight()  # type: ignore[operator]
        assert isinstance(own_weight, torch.Tensor)
        seeds = [seed + zlib.crc32(own.encode()) for own in names]
        expert = grouped or _LOCAL.search(name) is not None
        cut = group_of(expert).size() if kind in (*COLUMN, *GROUPED_COLUMN) else 1
        slots = slots_of(linear, own_weight.shape[0], cut, expert=expert)
        ends = ends_checkpoint(model.get_submodule(parent), leaf, model.config)
        site = Site(base, name, own_weight, lora, slots, model.config, seeds, expert, ends, plan.vocab)
        adapter = method.attach(site)
        setattr(model.get_submodule(parent), leaf, adapter)
        done |= {re.sub(r"\d+$", "", _weight(own)) for own in names}
    _check_all(model, known, done)
    if hasattr(model, "embedding"):
        # recomputed layers only have gradients when their input asks for one; a frozen embedding's does not
        model.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))  # type: ignore[union-attr]


def _check_all(model: nn.Module, known: Iterable[str], done: Collection[str]) -> None:
    """UnsupportedError for a target of this rank's layers that got no adapter; experts have no number in `done`."""
    layers = {name for name, _ in model.named_modules() if re.fullmatch(r"decoder\.layers\.\d+", name)}
    here = {f"decoder.layers.{_number(model, name)}." for name in layers}
    here |= {HEAD} if hasattr(model, "output_layer") else set()
    for weight in known:
        plainly = re.sub(r"\d+$", "", weight)
        if plainly not in done and any(weight.startswith(layer) for layer in here):
            raise UnsupportedError(f"`{plainly}` is of no linear that takes an adapter in this build of the model")


def _is_linear(base: nn.Module) -> bool:
    """Whether a module is one of Megatron Core's linears."""
    kinds = (*COLUMN, *ROW, *WHOLE, *GROUPED_COLUMN, *GROUPED_ROW)
    return hasattr(base, "weight" if not hasattr(base, "weight0") else "weight0") and kind_of(base) in kinds


def _global_name(model: nn.Module, name: str, expert: int | None = None) -> str:
    """A module's name with layers counted over the whole pipeline and experts over all ranks."""
    from mbx.models.megatron.core.groups import parallel_state

    layer = re.match(r"decoder\.layers\.(\d+)\.", name)
    if layer is None:  # the output layer
        return name
    rest = name[layer.end() :]
    if match := _LOCAL.search(name):
        expert = int(match[1])
    if expert is not None:
        count = model.get_submodule(name.partition(".experts.")[0] + ".experts").num_local_experts
        expert += parallel_state.get_expert_model_parallel_rank() * int(count)  # type: ignore[arg-type]
        rest = f"mlp.experts.local_experts.{expert}.{name.rpartition('.')[2]}"
    return f"decoder.layers.{_number(model, layer.group(0)[:-1])}.{rest}"


def _number(model: nn.Module, layer: str) -> int:
    """A layer's number over the whole pipeline, from 0."""
    return int(model.get_submodule(layer).layer_number) - 1  # type: ignore[arg-type]


def _weight(module: str) -> str:
    """A table's name for the weight of a module named by `_global_name`."""
    if match := _LOCAL.search(module):
        before, _, leaf = module.partition(match[0])
        return f"{before}.{leaf}.weight{match[1]}"
    return f"{module}.weight"


@dataclass(frozen=True, slots=True)
class Placed:
    """The adapter of one weight, named as a table names it, and views of its parameters on this rank.

    a: [Σ r, in]; b: [rows of the atom, r] each, in the order of the slots' places; m likewise, empty without DoRA.
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
                b = tuple(every[n] for every in layer.factors())
                yield Placed(_weight(_global_name(model, name, n)), layer, layer.lora_a[n], b)
        elif isinstance(layer, LoraLinear):
            m = tuple(layer.factors("m")) if layer.dora else ()
            yield Placed(_weight(_global_name(model, name)), layer, layer.lora_a, tuple(layer.factors()), m)


def only_trained(weights: Mapping[str, object], whole: Whole) -> dict[str, object]:
    """The entries of a sharded state dict that are adapters, or are trained whole beside them."""
    return {
        name: value
        for name, value in weights.items()
        if any(part.startswith("lora_") for part in name.split(".")) or whole.holds(name)
    }


def base_of(recorded: str) -> Path:
    """Where a resumed adapter run finds its frozen base; UsageError where it is gone."""
    if not recorded or not Path(recorded).is_dir():
        raise UsageError(
            f"‹resume›: the adapters' base `{recorded or 'random weights'}` is not there",
            hint="put it back: the run's checkpoints hold adapters only",
        )
    return Path(recorded)
