"""The legs of parity that run models: forward and loss, of any two sides that one of the two libraries can run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converters.errors import DifferenceError, StorageError, UnsupportedError
from converters.rows.config_spelling import canonical
from converters.rows.expr import Value
from converters.rows.isos import inexpressible_rope
from mbx.formats.architecture import stated
from mbx.formats.checkpoint import Checkpoint
from mbx.models.device import Spread
from mbx.models.prompts import Passes, Prompts
from mbx.proof.comparison import Pair
from mbx.proof.legs import Leg, Status

if TYPE_CHECKING:
    from mbx.models.forward.divergence import BorderDiff
    from mbx.models.forward.models import Model

_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True, slots=True)
class _Sides:
    """Both models, in the order that the user named them, and what they read."""

    models: tuple[Model, Model]
    read: Passes
    vocab: int


def model_legs(
    pair: Pair, names: Sequence[str], spread: Spread, prompts: Prompts, tolerance: float | None, mapping: str | None
) -> tuple[tuple[Leg, ...], tuple[BorderDiff, ...]]:
    """The legs of `names`, of `forward` and `loss`, and the differences behind each layer if they were compared.

    Both come from the same passes. A model that cannot be run makes legs that did not run. Raises what
    `mbx.models.prompts.passes` raises, and DeviceError.
    """

    def all_legs(status: Status, summary: str, details: tuple[str, ...] = ()) -> tuple[Leg, ...]:
        return tuple(Leg(name, status, summary, details) for name in names)

    if not names:
        return (), ()
    sides = _sides(pair, prompts, mapping)
    if isinstance(sides, Leg):
        return all_legs(sides.status, sides.summary, sides.details), ()
    from mbx.models.forward.loss import LOSS_TOLERANCE
    from mbx.models.forward.parity import FORWARD_TOLERANCE, compare_models

    limits = {"forward": FORWARD_TOLERANCE, "loss": LOSS_TOLERANCE}
    asked = {name: limits[name] if tolerance is None else tolerance for name in names}
    try:
        found = compare_models(
            *sides.models,
            sides.read,
            sides.vocab,
            spread=spread,
            tolerance=asked.get("forward"),
            loss_tolerance=asked.get("loss"),
        )
    except UnsupportedError as error:
        return all_legs("not run", error.fact, error.details), ()
    except (StorageError, DifferenceError) as error:
        return all_legs("failed", error.fact, error.details), ()
    if found is None:
        return all_legs("not run", "rank 0 has the result"), ()
    forward, losses = found.forward, found.losses
    legs = []
    if forward is not None:
        status: Status = "passed" if forward.diff.ok else "failed"
        legs.append(Leg("forward", status, forward.summary, forward.details, forward.figures))
    if losses is not None:
        legs.append(Leg("loss", "passed" if losses.ok else "failed", losses.summary, losses.details))
    elif "loss" in asked:
        shape = list(sides.read.batches[0].ids.shape)
        legs.append(Leg("loss", "failed", f"a batch of {shape} tokens predicts nothing: no loss to compare"))
    return tuple(legs), forward.borders if forward is not None else ()


def _sides(pair: Pair, prompts: Prompts, mapping: str | None) -> _Sides | Leg:
    """Both models, or the leg that says why there are none."""
    left, right = (stated(side, mapping) for side in (pair.left, pair.right))
    both = (left, right) if left.config is not None else (right, left)
    hf_config, fields = canonical(dict(both[0].config or {})), pair.plan.config or pair.fields or both[0].fields or {}
    has_megatron = "mcore" in (pair.left.spelling, pair.right.spelling)
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
    from mbx.models.forward.parity import read_prompts

    stated_vocab = {**fields, "model.vocab_size": vocab}
    read = read_prompts(prompts, stated_vocab, reference or pair.left.path, hf_config)
    models = (
        _model(pair, pair.left, fields, reference, hf_config),
        _model(pair, pair.right, fields, reference, hf_config),
    )
    # Transformers is the reference where it takes part: its distribution is the one that KL is taken from.
    in_order = models if not pair.swapped or pair.left.spelling != pair.right.spelling else models[::-1]
    return _Sides((in_order[0], in_order[1]), read, vocab)


def _model(
    pair: Pair, side: Checkpoint, fields: Mapping[str, Value], reference: Path | None, hf_config: Mapping[str, Value]
) -> Model:
    from mbx.models.forward.models import MegatronModel, TransformersModel

    if side.spelling == "hf":
        return TransformersModel(side.path)
    # Paired with a folder, the checkpoint's tensors are spelt as the table has them.
    tensors = pair.actual if side is pair.right and pair.left.spelling == "hf" else side.tensors
    torch_dist = side.format == "torch_dist"
    return MegatronModel(fields, side.home, tensors, torch_dist, reference, hf_config)


def _rows(side: Checkpoint) -> int | None:
    tensor = side.tensors.get(_EMBEDDING) if side.spelling == "mcore" else None
    return None if tensor is None else tensor.shape[0]


def _reference(pair: Pair) -> Path | None:
    """A folder with config.json, for rotary frequencies and the tokenizer: a side, or what lies beside it."""
    for side in (pair.left, pair.right):
        beside = side.hf
        if beside is not None and (beside / "config.json").is_file():
            return beside
    return None
