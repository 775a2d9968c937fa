"""Layers that are trained whole beside adapters, in a built model: thawed, and filled from an adapter with them."""

from __future__ import annotations

import torch
from torch import nn

from converters.errors import UsageError
from converters.mcore.keys import EMBEDDING
from mbx.formats.adapter_folder import Adapter
from mbx.formats.files import FileSource
from mbx.formats.registry import open_checkpoint
from mbx.models.stored import read_whole
from mbx.train.model.blueprint import Blueprint
from mbx.train.model.trained_whole import Whole


def thaw(model: nn.Module, whole: Whole) -> None:
    """Have a frozen model train what is trained whole."""
    for name, parameter in model.named_parameters():
        if whole.holds(name):
            parameter.requires_grad_(True)


def modules_of(adapter: Adapter) -> tuple[str, ...]:
    """The modules that an adapter holds whole, as `lora.modules_to_save` names them."""
    saved = {name.removesuffix(".weight").rpartition(".")[2] for name in adapter.saved}
    return tuple(sorted(saved)) or adapter.settings.modules_to_save


def load_whole(model: nn.Module, plan: Blueprint, adapter: Adapter, whole: Whole) -> None:
    """Fill what is trained whole from an adapter that holds it, each rank its own rows.

    UsageError where it has other rows than the model, or holds as two what is one weight here.
    """
    stored = _stored(adapter, whole)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            own = name if name in whole.names else EMBEDDING
            if not whole.holds(name) or own not in stored:
                continue
            rows = stored[own]
            if adapter.saved and len(rows) != plan.vocab:
                raise UsageError(
                    f"`{adapter.path}` holds {len(rows)} rows of {whole.names[own][0]}, and the model {plan.vocab}",
                    hint="model=DIR names the base whose vocabulary was enlarged for it",
                )
            first = _first_row(parameter)
            mine = rows[first : first + len(parameter)]
            parameter.zero_()  # rows that pad the vocabulary
            parameter[: len(mine)].copy_(mine)


def _first_row(parameter: torch.Tensor) -> int:
    """Which row of the whole this rank's first one is."""
    from mbx.models.megatron.core.groups import parallel_state

    return int(parallel_state.get_tensor_model_parallel_rank()) * len(parameter)


def _stored(adapter: Adapter, whole: Whole) -> dict[str, torch.Tensor]:
    """Whole tensors that an adapter holds, by Megatron Core's name; those of a run have its rows of padding."""
    source = FileSource(adapter.root)
    try:
        if not adapter.saved:
            tensors = open_checkpoint(adapter.path).tensors if adapter.settings.modules_to_save else {}
            return {name: read_whole(tensors[name], source) for name in whole.names if name in tensors}
        found: dict[str, torch.Tensor] = {}
        for weight, names in whole.names.items():
            held = [read_whole(adapter.saved[name], source) for name in names if name in adapter.saved]
            if any(not bool((held[0] == other).all()) for other in held[1:]):
                raise UsageError(
                    f"`{adapter.path}` holds {' and '.join(names)} apart, which are one weight of the model",
                    hint="a base with `tie_word_embeddings` false and both weights trains them apart",
                )
            found |= {weight: held[0]} if held else {}
        return found
    finally:
        source.close()
