"""Parity of two checkpoints, in legs that are reported apart.

cover: every tensor on both sides is accounted for. config: the settings agree. weights: every byte agrees,
streamed through the same plan a conversion would run. forward: Transformers and Megatron Core compute the same
logits. loss: they compute the same loss. A round trip alone proves nothing (a swapped pair of rows survives it), so
no leg stands for another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mbx.formats.files import FileSource
from mbx.formats.registry import open_checkpoint
from mbx.models.device import ONE_PROCESS, Spread, is_main
from mbx.models.prompts import DRAWN, Prompts
from mbx.proof import config_leg, legs
from mbx.proof.compare import PLAIN, Reading
from mbx.proof.comparison import pair_sides
from mbx.proof.legs import Difference, Dtypes, Leg, Status
from mbx.proof.model_legs import model_legs

if TYPE_CHECKING:
    from mbx.models.forward.divergence import BorderDiff

Progress = Callable[[int], None]

__all__ = ["Difference", "Dtypes", "Leg", "ParityReport", "Status", "parity"]


@dataclass(frozen=True, slots=True)
class ParityReport:
    """All legs of one comparison.

    `differences` are the tensors that are not what they should be, in the order of the model; `dtypes` what every
    tensor is stored as; `padding` what stands behind the vocabulary; `waived` tensors that one side may lack;
    `borders` how far the forward leg's hidden states are apart behind each layer.
    """

    left: str
    right: str
    table: str
    legs: tuple[Leg, ...]
    differences: tuple[Difference, ...] = ()
    dtypes: tuple[Dtypes, ...] = ()
    padding: tuple[str, ...] = ()
    waived: tuple[str, ...] = ()
    compared_values: int = 0
    borders: tuple[BorderDiff, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every leg that was asked for ran and passed."""
        return all(leg.status == "passed" for leg in self.legs)

    @property
    def first(self) -> Difference | None:
        """The first differing tensor, in the order of the model."""
        return self.differences[0] if self.differences else None

    @property
    def worst(self) -> Difference | None:
        """The tensor with the largest difference of two values; one of another shape counts most."""
        return max(
            self.differences, key=lambda d: (d.max_abs is None, d.max_abs or 0.0, d.elements or 0), default=None
        )


def parity(
    first: Path,
    second: Path,
    *,
    forward: bool = False,
    loss: bool = False,
    spread: Spread = ONE_PROCESS,
    prompts: Prompts = DRAWN,
    tolerance: float | None = None,
    mapping: str | None = None,
    dtype: str | None = None,
    reading: Reading = PLAIN,
) -> ParityReport:
    """Compare two checkpoints: Hugging Face folders, Megatron Core ones, or one of each, whatever their layouts.

    `spread`, `prompts` and `tolerance` are those of the forward and loss legs: device `cuda` runs them on GPUs with
    Transformer Engine. Under torchrun every process calls this, and rank 0 has the report: the others take part in the
    forward leg alone. `dtype` declares a cast that a conversion was asked for. Raises MbxError only where a side, the
    prompts or the device cannot be had at all; differences are findings of a leg.
    """
    sides = open_checkpoint(first), open_checkpoint(second)
    sources = tuple(FileSource(side.home) for side in sides)
    by_side = {id(side): source for side, source in zip(sides, sources, strict=True)}
    try:
        pair = pair_sides(*sides, by_side, mapping, dtype)
        cover, comparable, odd = legs.cover(pair)
        if not is_main():  # rank 0 compares the weights
            comparable, odd = frozenset(), ()
        left, right = by_side[id(pair.left)], by_side[id(pair.right)]
        found = legs.weights(pair, comparable, odd, left, right, reading)
    finally:
        for source in sources:
            source.close()
    asked = [name for name, wanted in (("forward", forward), ("loss", loss)) if wanted]
    ran, borders = model_legs(pair, asked, spread, prompts, tolerance, mapping)
    table = pair.plan.table
    return ParityReport(
        str(first),
        str(second),
        "" if table is None else table.name,
        (cover, config_leg.config(pair), found.leg, *ran),
        found.differences,
        legs.dtype_table(pair),
        found.padding,
        pair.repeated,
        sum(tally.compared for tally in found.tallies.values()),
        borders,
    )
