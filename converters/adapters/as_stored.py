"""Updates of weights as a Hugging Face folder stores them: an embedding's, and those of modules beside the text model.

No row regroups their rows. An embedding stores a token a row, so that its update, of `A: [r, tokens]` and
`B: [hidden, r]`, lies turned round: `W + s · (B A)ᵀ`. Source: `Embedding.get_delta_weight` of PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from converters.engine.lowrank import LowRank, Part, Site
from converters.errors import CoverageError
from converters.rows.pack import Pack, Slot
from converters.tensors import Shape, StoredTensor


@dataclass(frozen=True, slots=True)
class Module:
    """The tensors that adapt one module (or parameter) of the base model; `said` is its name in the file.

    a: [r, in], b: [out, r], m: [out].
    """

    name: str
    said: str
    a: StoredTensor
    b: StoredTensor
    m: StoredTensor | None = None


def update_of(module: Module, scale: float, *, embeds: bool) -> LowRank:
    """The update of a module's weight, whole: [out, in], or [in, out] where it `embeds`."""
    (rank, inputs), rows = module.a.shape, module.b.shape[0]
    m = None if module.m is None else module.m.name
    site = Site(module.a.name, module.b.name, m, (0,), Pack(1, (rows,)), rank, inputs)
    return LowRank((Part(0, Slot.whole(rows), site, scale),), transposed=embeds)


def check_fits(name: str, update: LowRank, tensors: Mapping[str, StoredTensor]) -> None:
    """CoverageError unless the base holds a weight of the shape that `update_of` updates."""
    (part,) = update.parts
    wanted: Shape = (part.site.pack.rows, part.site.inputs)
    wanted = wanted[::-1] if update.transposed else wanted
    got = tensors[name].shape if name in tensors else None
    if got != wanted:
        held = "does not hold it" if got is None else f"holds it as {list(got)}"
        raise CoverageError(
            f"the adapter updates `{name}`, a matrix of {list(wanted)}; the base {held}",
            hint="is it the model that the adapter was trained on?",
        )
