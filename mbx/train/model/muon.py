"""Muon: Megatron Core's own steps the matrices of a model, Adam all else; what goes with it, and what does not."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from converters.errors import DeviceError, UnsupportedError
from converters.rows.expr import Value
from mbx.extras import install_line
from mbx.installed import core_release, core_version
from mbx.train.model.blueprint import Blueprint
from mbx.train.recipe.sections import Optim, Recipe

if TYPE_CHECKING:
    from mbx.models.megatron.core.training import DistributedDataParallel

MUON = "muon"
_PACKAGE = "emerging-optimizers"
#: Fields of Megatron Core's OptimizerConfig by the recipe's keys.
_FIELDS = {
    "muon_momentum": "muon_momentum",
    "muon_nesterov": "muon_nesterov",
    "muon_steps": "muon_num_ns_steps",
    "muon_coefficients": "muon_coefficient_type",
    "muon_scale": "muon_scale_mode",
    "muon_extra_scale": "muon_extra_scale_factor",
    "muon_split_qkv": "muon_split_qkv",
    "muon_tp": "muon_tp_mode",
    "muon_precision": "muon_fp32_matmul_prec",
}


def check_muon(recipe: Recipe, plan: Blueprint, shares: int, *, dry: bool) -> None:
    """UnsupportedError or DeviceError where Muon cannot step this run, in whose optimizer `shares` ranks would share.

    `dry`: nothing will be stepped, so the package need not be there.
    """
    o = recipe.optim
    if o.optimizer != MUON:
        return
    rules = (
        (
            not core_release().muon,
            f"megatron-core {core_version()} calls {_PACKAGE} as no published one is called: it has no Muon",
            "megatron-core 0.18 or newer",
        ),
        (recipe.lora.rank, "adapters are stepped by Adam", "lora.rank=0 trains every weight by Muon"),
        (recipe.train.precision == "fp16", "Muon has no loss scale", "train.precision=bf16"),
        (recipe.fp8.recipe != "none", "Muon does not step FP8 weights", "fp8.recipe=none"),
        (recipe.train.tower == "trained", "a tower is stepped by Adam", "train.tower=frozen"),
        (
            recipe.parallel.distributed_optimizer and shares > 1,
            "Muon needs whole matrices, which the distributed optimizer cuts",
            "parallel.distributed_optimizer=false",
        ),
        (
            plan.config.get("model.gate_by_head"),
            "a gate of a head stands in as many rows as the head has channels: Muon would step another matrix",
            "optim.optimizer=adam",
        ),
        (
            o.muon_split_qkv and _uneven(plan.config),
            "Megatron Core parts queries, keys and values alike in all layers, and this model's layers differ, or its "
            "values are narrower than its keys",
            "optim.muon_split_qkv=false steps them as one matrix",
        ),
    )
    for broken, fact, hint in rules:
        if broken:
            raise UnsupportedError(f"optim.optimizer=muon: {fact}", hint=hint)
    if not dry and (found := _installed()) < (0, 2):
        what = "is not installed" if not found else "is older than 0.2"
        raise DeviceError(
            f"optim.optimizer=muon needs {_PACKAGE}, which {what}",
            hint=f"{install_line(MUON)} (Python 3.12 or later)",
        )


def _uneven(config: Mapping[str, Value]) -> bool:
    """Whether rows of queries, keys and values are not alike in all layers, or values not as wide as keys."""
    wide = config.get("multi_latent_attention") or config.get("v_head_dim") in (None, config.get("kv_channels"))
    own = any(field.startswith("windowed_") for field, value in config.items() if value is not None)
    return not wide or own or bool(config.get("heterogeneous_block_specs") or config.get("num_kv_shared_layers"))


def _installed() -> tuple[int, ...]:
    """First numbers of the package's version; empty without it."""
    try:
        return tuple(int(part) for part in importlib.metadata.version(_PACKAGE).split(".")[:2])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return ()


def muon_fields(optim: Optim) -> Mapping[str, object]:
    """What Megatron Core's OptimizerConfig is told of Muon; empty without it."""
    return {field: getattr(optim, key) for key, field in _FIELDS.items()} if optim.optimizer == MUON else {}


def mark_tables(chunks: Sequence[DistributedDataParallel]) -> None:
    """Leave every table of vectors to Adam: Megatron Core knows those of words alone."""
    from torch import nn

    from mbx.models.megatron.core.layers import VocabParallelEmbedding

    for chunk in chunks:
        tables = [module for module in chunk.modules() if isinstance(module, nn.Embedding | VocabParallelEmbedding)]
        for weight in (table.weight for table in tables):
            weight.is_embedding_or_output_parameter = True  # type: ignore[union-attr]
