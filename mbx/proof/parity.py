"""Parity of two checkpoints, in legs that are reported apart.

cover: every tensor on both sides is accounted for. config: the settings agree. weights: every byte agrees,
streamed through the same plan a conversion would run. forward: Transformers and Megatron Core compute the same
logits. loss: they compute the same loss. A round trip alone proves nothing (a swapped pair of rows survives it), so
no leg stands for another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from converters.codecs.calibration import Calibration
from mbx.formats.files import FileSource
from mbx.models.device import ONE_PROCESS, Spread, alone, is_main
from mbx.models.prompts import DRAWN, Prompts
from mbx.proof import config_leg, legs
from mbx.proof.compare import PLAIN, Reading
from mbx.proof.comparison import Pair, open_sides, pair_sides
from mbx.proof.exported import exported_pair
from mbx.proof.gaps import Gap, open_gaps
from mbx.proof.legs import Difference, Dtypes, Leg, Status
from mbx.proof.model_legs import Asked, model_legs
from mbx.run.export_codec import PLAIN as PLAIN_CODEC
from mbx.text import plural

if TYPE_CHECKING:
    from mbx.models.forward.divergence import BorderDiff

Progress = Callable[[int], None]

__all__ = ["Difference", "Dtypes", "Leg", "ParityReport", "Status", "parity"]


@dataclass(frozen=True, slots=True)
class ParityReport:
    """All legs of one comparison.

    `differences` are the tensors that are not what they should be, in the order of the model; `dtypes` what every
    tensor is stored as; `padding` what stands behind the vocabulary; `waived` tensors that one side may lack;
    `borders` how far the forward leg's hidden states are apart behind each layer. `gaps` are what no leg looked at;
    `allowed` the globs of those that the caller does without. Where `is_whole` is False this process only took part:
    rank 0 has the report.
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
    gaps: tuple[Gap, ...] = ()
    allowed: tuple[str, ...] = ()
    is_whole: bool = True

    @property
    def passed(self) -> bool:
        """Whether every leg that was asked for ran and passed."""
        return all(leg.status == "passed" for leg in self.legs)

    @property
    def open_gaps(self) -> tuple[Gap, ...]:
        """What no leg looked at and nobody does without."""
        return open_gaps(self.gaps, self.allowed)

    @property
    def proved(self) -> bool:
        """Whether every leg passed and nothing was left out that nobody does without."""
        return self.passed and not self.open_gaps

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
    codec: str | None = None,
    calibration: Calibration | None = None,
    reading: Reading = PLAIN,
    hf_config: Path | None = None,
    allow_gaps: Sequence[str] = (),
    allowed_keys: tuple[str, ...] = (),
) -> ParityReport:
    """Compare two checkpoints: Hugging Face folders, Megatron Core ones, or one of each, whatever their layouts.

    `spread`, `prompts` and `tolerance` are those of the forward and loss legs: device `cuda` runs them on GPUs with
    Transformer Engine. Under torchrun every process calls this, and rank 0 has the report: the others take part in the
    forward leg alone. `dtype` declares a cast that a conversion was asked for, `codec` how an export stored a
    folder's weights: its codes and scales are then held against those that such an export makes, and the forward leg
    runs both libraries on what they stand for; `calibration` is what it was given. `hf_config` is a folder with
    config.json for a Megatron checkpoint that carries none. `allow_gaps` are globs of gaps to do without,
    `allowed_keys` keys of config.json that no table knows and that cannot change the forward pass; those that a
    conversion waived need not be named again.

    Raises MbxError only where a side, the prompts or the device cannot be had at all; differences are findings of a
    leg.
    """
    sides = open_sides(first, second, mapping, hf_config, allowed_keys)
    names = tuple(name for name, wanted in (("forward", forward), ("loss", loss)) if wanted)
    asked = Asked(names, spread, prompts, tolerance, decoded=codec not in (None, PLAIN_CODEC))
    with contextlib.ExitStack() as stack:
        if not names or all(side.spelling == "hf" for side in sides):
            stack.enter_context(alone())  # nothing is spread over processes: each of them compares everything
        sources = tuple(stack.enter_context(contextlib.closing(FileSource(side.home))) for side in sides)
        by_side = {id(side): source for side, source in zip(sides, sources, strict=True)}
        pair = pair_sides(*sides, by_side, mapping, dtype)
        held = pair if codec in (None, PLAIN_CODEC) else exported_pair(pair, codec, mapping, calibration)
        cover, comparable, odd = legs.cover(held)
        if not is_main():  # rank 0 compares the weights
            comparable, odd = frozenset(), ()
        left, right = by_side[id(held.left)], held.source or by_side[id(held.right)]
        found = legs.weights(held, comparable, odd, left, right, reading)
        config, gaps = config_leg.config(pair)
        ran = model_legs(pair, asked, mapping, by_side[id(pair.left)])
        table = pair.plan.table
        return ParityReport(
            str(first),
            str(second),
            "" if table is None else table.name,
            (cover, config, _told_of_scales(found.leg, held, calibration), *ran.legs),
            found.differences,
            legs.dtype_table(held),
            found.padding,
            pair.repeated,
            sum(tally.compared for tally in found.tallies.values()),
            ran.borders,
            (*pair.gaps, *gaps, *ran.gaps),
            tuple(allow_gaps),
            is_main(),
        )


def _told_of_scales(weights: Leg, pair: Pair, calibration: Calibration | None) -> Leg:
    """The weights leg, which says first where tensors differ by design: a side's channels were scaled on export."""
    scaled = [side for side in (pair.left, pair.right) if side.scaled]
    if weights.status != "failed" or not scaled or calibration is not None:
        return weights
    said = [
        f"`{side.path.name}` has scales of channels folded into {plural(len(side.scaled), 'tensor')}, which "
        "differ by design: the forward leg says whether it is the same model, ‹codec› and ‹calibrate› whether "
        "its codes are right"
        for side in scaled
    ]
    return replace(weights, details=(*said, *weights.details))
