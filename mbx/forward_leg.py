"""The legs of parity that run models: forward and loss, of any two sides that one of the two libraries can run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converters.errors import DifferenceError, StorageError, UnsupportedError
from converters.expr import Value
from converters.isos import inexpressible_rope
from converters.spelling import canonical
from mbx.legs import Leg
from mbx.loss import LOSS_TOLERANCE, compare_loss
from mbx.mcore.device import Spread, world_of
from mbx.mcore.prompts import Passes, Prompts, passes
from mbx.pairs import Pair
from mbx.sides import Side, stated

if TYPE_CHECKING:
    from mbx.mcore.divergence import BorderDiff
    from mbx.mcore.parity import Model

_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True, slots=True)
class Modelled:
    """A leg that ran models, and the differences behind each layer, if it compared them."""

    leg: Leg
    borders: tuple[BorderDiff, ...] = ()


@dataclass(frozen=True, slots=True)
class _Sides:
    """Both models, in the order that the user named them, and what they read."""

    models: tuple[Model, Model]
    read: Passes
    vocab: int


def modelled(
    pair: Pair, name: str, spread: Spread, prompts: Prompts, tolerance: float | None, mapping: str | None
) -> Modelled:
    """The `forward` or the `loss` leg of a pair; a model that cannot be run is a leg that did not run.

    Raises what `mbx.mcore.prompts.passes` raises, and DeviceError.
    """
    sides = _sides(pair, prompts, mapping)
    if isinstance(sides, Leg):
        return Modelled(Leg(name, sides.status, sides.summary, sides.details))
    try:
        if name == "loss":
            return Modelled(_loss(sides, spread, tolerance))
        from mbx.mcore.parity import FORWARD_TOLERANCE, compare_forward

        limit = FORWARD_TOLERANCE if tolerance is None else tolerance
        found = compare_forward(*sides.models, sides.read, sides.vocab, spread=spread, tolerance=limit)
    except UnsupportedError as error:
        return Modelled(Leg(name, "not run", error.fact, error.details))
    except (StorageError, DifferenceError) as error:
        return Modelled(Leg(name, "failed", error.fact, error.details))
    if found is None:
        return Modelled(Leg(name, "not run", "rank 0 has the result"))
    leg = Leg(name, "passed" if found.diff.ok else "failed", found.summary, found.details, found.figures)
    return Modelled(leg, found.borders)


def _loss(sides: _Sides, spread: Spread, tolerance: float | None) -> Leg:
    if world_of()[1] > 1:
        return Leg("loss", "not run", "the loss is computed by one process")
    limit = LOSS_TOLERANCE if tolerance is None else tolerance
    found = compare_loss(*sides.models, sides.read, sides.vocab, device=spread.device, tolerance=limit)
    return Leg("loss", "passed" if found.ok else "failed", found.summary, found.details)


def _sides(pair: Pair, prompts: Prompts, mapping: str | None) -> _Sides | Leg:
    """Both models, or the leg that says why there are none."""
    left, right = (stated(side, mapping) for side in (pair.left, pair.right))
    both = (left, right) if left.config is not None else (right, left)
    hf_config, fields = canonical(dict(both[0].config or {})), pair.plan.config or pair.fields or both[0].fields or {}
    has_megatron = "mcore" in (pair.left.kind, pair.right.kind)
    if has_megatron:
        inexpressible = set(inexpressible_rope(hf_config))
        if others := [note for note in pair.plan.notes if note not in inexpressible]:
            return Leg("", "not run", others[0], tuple(others))
        table = pair.plan.table or both[0].table
        if table is not None and table.unsupported:
            return Leg("", "not run", table.unsupported)
        if "model.vocab_size" not in fields:
            return Leg("", "not run", both[0].why_not or "nothing says which architecture the checkpoint has")
    vocab = fields.get("model.vocab_size", hf_config.get("vocab_size"))
    if not isinstance(vocab, int):
        return Leg("", "not run", f"the vocabulary's size is {vocab!r}; a number was expected")
    for side in (pair.left, pair.right):
        rows = _rows(side)
        if rows is not None and rows < vocab:
            return Leg("", "failed", f"the checkpoint embeds {rows} tokens, the vocabulary has {vocab}")
    reference = _reference(pair)
    longest = fields.get("model.max_sequence_length")
    read = passes(
        prompts,
        reference or pair.left.path,
        hf_config,
        vocab_size=vocab,
        max_length=longest if isinstance(longest, int) else None,
    )
    models = (
        _model(pair, pair.left, fields, reference, hf_config),
        _model(pair, pair.right, fields, reference, hf_config),
    )
    # Transformers is the reference where it takes part: its distribution is the one that KL is taken from.
    in_order = models if not pair.swapped or pair.left.kind != pair.right.kind else models[::-1]
    return _Sides((in_order[0], in_order[1]), read, vocab)


def _model(
    pair: Pair, side: Side, fields: Mapping[str, Value], reference: Path | None, hf_config: Mapping[str, Value]
) -> Model:
    from mbx.mcore.parity import MegatronModel, TransformersModel

    if side.checkpoint is None:
        return TransformersModel(side.path)
    # Paired with a folder, the checkpoint's tensors are spelt as the table has them.
    tensors = pair.actual if side is pair.right and pair.left.kind == "hf" else side.tensors
    torch_dist = side.checkpoint.format == "torch_dist"
    return MegatronModel(fields, side.root, tensors, torch_dist, reference, hf_config)


def _rows(side: Side) -> int | None:
    tensor = side.tensors.get(_EMBEDDING) if side.kind == "mcore" else None
    return None if tensor is None else tensor.shape[0]


def _reference(pair: Pair) -> Path | None:
    """A folder with config.json, for rotary frequencies and the tokenizer: a side, or what lies beside it."""
    for side in (pair.left, pair.right):
        beside = side.path if side.checkpoint is None else side.checkpoint.hf
        if beside is not None and (beside / "config.json").is_file():
            return beside
    return None
