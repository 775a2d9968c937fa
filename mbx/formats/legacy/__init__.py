"""Megatron-LM's `torch` checkpoints: `mp_rank_*` folders, read without loading them and laid out rank by rank."""

from __future__ import annotations

from pathlib import Path

from mbx.formats.checkpoint import Checkpoint, Spelling
from mbx.formats.legacy.reading import open_legacy
from mbx.formats.legacy.writing import place
from mbx.formats.placement import Order, Placement
from mbx.formats.torch_dist import find_iteration

__all__ = ["Legacy", "open_legacy"]


class Legacy:
    """The format that Megatron-LM calls `torch`."""

    name = "torch"
    title = "megatron legacy"
    spelling: Spelling = "mcore"

    def find(self, path: Path) -> Path | None:
        """The iteration's folder meant by `path`, where it holds `mp_rank_*`."""
        iteration = find_iteration(path)
        return iteration if iteration is not None and any(iteration.glob("mp_rank_*")) else None

    def open(self, path: Path, home: Path) -> Checkpoint:
        """Open an iteration; pickles are read inertly, no tensor is."""
        return open_legacy(home, path)

    def place(self, order: Order) -> Placement:
        """Lay out every rank's `model_optim_rng.pt`."""
        return place(order)
