"""A run's start: weights read straight into its model, by `mbx.live`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from converters.errors import UnsupportedError
from converters.mcore.keys import inner_prefix
from mbx.formats.checkpoint import Checkpoint
from mbx.formats.registry import open_checkpoint
from mbx.live.load import load_checkpoint, plan_folder
from mbx.train.model.blueprint import Blueprint

if TYPE_CHECKING:
    from torch import nn


def load_weights(model: nn.Module, plan: Blueprint, path: Path) -> str:
    """Fill `model` (a bare GPTModel) from a Hugging Face folder or a torch_dist checkpoint; returns a line to log.

    Raises CoverageError where the model has parameters the storage does not, StorageError where it cannot be read.
    """
    read = load_checkpoint([model], _opened(path), plan.config, plan.table, plan.layout)
    return (
        f"read {read.bytes_read / 1e6:.1f} MB of {read.source_bytes / 1e6:.1f} MB from {path} in {read.seconds:.1f} s"
    )


def _opened(path: Path) -> Checkpoint:
    """The storage at `path`; UnsupportedError for a Megatron checkpoint of more than a text model."""
    opened = open_checkpoint(path)
    if opened.spelling == "mcore" and any(map(inner_prefix, opened.tensors)):
        raise UnsupportedError(
            f"`{path}` holds a model with towers, of which only the text model is trained: its export would lack them",
            hint="start from its Hugging Face folder, or convert that with ‹flavour› text",
        )
    return opened


def check_source(plan: Blueprint, path: Path) -> None:
    """What `load_weights` can say of a storage before there is a model: that it opens and, by its table, is whole."""
    opened = _opened(path)
    if opened.spelling == "hf":
        plan_folder(opened, plan.table, plan.layout)
