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

from converters.errors import DifferenceError, StorageError, UnsupportedError
from converters.isos import inexpressible_rope
from converters.spelling import canonical
from mbx import config_leg, legs
from mbx.convert import DEFAULT_MAX_MEMORY
from mbx.io.files import FileSource
from mbx.legs import Difference, Dtypes, Leg, Status
from mbx.loss import LOSS_TOLERANCE, compare_loss
from mbx.mcore.prompts import DRAWN, Prompts
from mbx.pairs import Pair, pair_sides
from mbx.sides import open_side

Progress = Callable[[int], None]

__all__ = ["Difference", "Dtypes", "Leg", "ParityReport", "Status", "parity"]


@dataclass(frozen=True, slots=True)
class ParityReport:
    """All legs of one comparison.

    `differences` are the tensors that are not what they should be, in the order of the model; `dtypes` what every
    tensor is stored as; `padding` what stands behind the vocabulary; `waived` tensors that one side may lack.
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
    device: str = "cpu",
    prompts: Prompts = DRAWN,
    tolerance: float | None = None,
    mapping: str | None = None,
    dtype: str | None = None,
    workers: int = 2,
    max_memory: int = DEFAULT_MAX_MEMORY,
    progress: Progress = lambda _: None,
) -> ParityReport:
    """Compare two checkpoints: Hugging Face folders, Megatron Core ones, or one of each, whatever their layouts.

    `device`, `prompts` and `tolerance` are those of the forward and loss legs: `cuda` runs them on one GPU with
    Transformer Engine. `dtype` declares a cast that a conversion was asked for. Raises MbxError only where a side, the
    prompts or the device cannot be had at all; differences are findings of a leg.
    """
    sides = open_side(first), open_side(second)
    sources = tuple(FileSource(side.root) for side in sides)
    by_side = {id(side): source for side, source in zip(sides, sources, strict=True)}
    try:
        pair = pair_sides(*sides, by_side, mapping, dtype)
        cover, comparable, odd = legs.cover(pair)
        left, right = by_side[id(pair.left)], by_side[id(pair.right)]
        found = legs.weights(
            pair, comparable, odd, left, right, workers=workers, max_memory=max_memory, progress=progress
        )
    finally:
        for source in sources:
            source.close()
    run = [cover, config_leg.config(pair), found.leg]
    if forward:
        run.append(_modelled(pair, "forward", device, prompts, tolerance))
    if loss:
        run.append(_modelled(pair, "loss", device, prompts, tolerance))
    table = pair.plan.table
    return ParityReport(
        str(first),
        str(second),
        "" if table is None else table.name,
        tuple(run),
        found.differences,
        legs.dtype_table(pair),
        found.padding,
        pair.repeated,
        sum(tally.compared for tally in found.tallies.values()),
    )


def _modelled(pair: Pair, name: str, device: str, prompts: Prompts, tolerance: float | None) -> Leg:
    """The forward or loss leg of a pair that has one side of each kind: fp32, Transformers and Megatron Core."""
    folder, checkpoint, plan = pair.left.folder, pair.right.checkpoint, pair.plan
    if folder is None or checkpoint is None:
        return Leg(name, "not run", "both sides are of one kind: there is no second implementation to run")
    if checkpoint.format != "torch_dist":
        return Leg(name, "not run", "Megatron Core loads torch_dist checkpoints only: `mbx convert reshard` makes one")
    from mbx.mcore.parity import FORWARD_TOLERANCE, compare_forward, read_prompts, vocab_size

    config = canonical(folder.config)
    inexpressible = set(inexpressible_rope(config))
    if others := [note for note in plan.notes if note not in inexpressible]:
        return Leg(name, "not run", others[0], tuple(others))
    if plan.table is not None and plan.table.unsupported:
        return Leg(name, "not run", plan.table.unsupported)
    vocab = vocab_size(plan.config)
    embedding = pair.actual.get("embedding.word_embeddings.weight")
    padded = embedding.shape[0] if embedding else None
    if padded is not None and padded < vocab:
        return Leg(name, "failed", f"the checkpoint embeds {padded} tokens, the vocabulary has {vocab}")
    read = read_prompts(prompts, plan.config, folder.path, config)
    sides = plan.config, folder.path, checkpoint.iteration, config, read
    try:
        if name == "loss":
            losses = compare_loss(
                *sides,
                padded_vocab=padded,
                device=device,
                tolerance=LOSS_TOLERANCE if tolerance is None else tolerance,
            )
            return Leg(name, "passed" if losses.ok else "failed", losses.summary, losses.details)
        limit = FORWARD_TOLERANCE if tolerance is None else tolerance
        found = compare_forward(*sides, padded_vocab=padded, device=device, tolerance=limit)
    except UnsupportedError as error:
        return Leg(name, "not run", error.fact, error.details)
    except (StorageError, DifferenceError) as error:
        return Leg(name, "failed", error.fact, error.details)
    return Leg(name, "passed" if found.diff.ok else "failed", found.summary, found.details)
