"""What an adapter changes of its base besides linears: whole tensors, single rows, and with them the vocabulary.

PEFT unties embedding and head where only one of them is adapted or replaced, or both differently: its unmerged model
computes with two matrices. A model that says `tie_word_embeddings` would be read with one, so the merge unties it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from converters.adapters.as_stored import check_fits
from converters.adapters.merge import Spot
from converters.adapters.peft_keys import embedding_name, head_name, name_in_base, names_in_base
from converters.adapters.peft_names import PeftAdapter
from converters.adapters.settings import LoraSettings
from converters.adapters.sites import Adapted
from converters.engine.lowrank import LowRank, RowsOf
from converters.errors import CoverageError, UnsupportedError
from converters.mcore.keys import HEAD, TIED
from converters.rows.config_map import environment
from converters.rows.expr import Value
from converters.rows.table import Table
from converters.tensors import StoredTensor

_SIZE = "model.vocab_size"


@dataclass(frozen=True, slots=True)
class Merged:
    """The tensors of a merged model, before its linears are updated.

    `tensors` have the dtypes and shapes of the result under the base's names, and lie where the base's own do; those
    of `origins` are read from there instead. `fields` is the Megatron Core config, `settings` are the keys of
    config.json that change, `updates` those of single rows, and of weights as they are stored.
    """

    tensors: Mapping[str, StoredTensor]
    fields: Mapping[str, Value]
    origins: Mapping[str, StoredTensor] = field(default_factory=dict)
    settings: Mapping[str, Value] = field(default_factory=dict)
    updates: Mapping[str, LowRank] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the result should know."""
        lines = []
        if self.origins:
            lines.append(f"{len(self.origins)} tensors taken whole: {', '.join(sorted(self.origins))}")
        for name, update in self.updates.items():
            lines += [f"{name}: {len(new.rows)} rows replaced" for new in update.replaced]
        if self.settings:
            said = ", ".join(f"{key} {value!r}" for key, value in self.settings.items())
            lines.append(f"config.json changes: {said}")
        return tuple(lines)


def adapts_head(adapted: tuple[Adapted, ...]) -> bool:
    """Whether some factor updates the output layer."""
    return any(found.row.spec.param == HEAD for found in adapted)


def merged_model(
    table: Table,
    fields: Mapping[str, Value],
    base: Mapping[str, StoredTensor],
    adapter: PeftAdapter,
    settings: LoraSettings,
    *,
    alike: bool = False,
) -> Merged:
    """What is left of `base`, a Hugging Face folder's tensors, once the adapter's whole tensors are in it.

    `alike` says that the adapter's embedding and head are one. Raises CoverageError for a tensor that the base does
    not hold, or of a shape that it cannot have; UnsupportedError for rows of a model whose embedding is untied.
    """
    env = environment(fields)
    names, saved = names_in_base(table, env, base), dict(adapter.saved)
    embedding, head = embedding_name(table, env), head_name(table, env)
    tied = bool(fields.get(TIED))
    if tied and embedding in saved and head in saved and (alike or settings.tied):
        del saved[head]
    trained = embedding in saved or embedding in adapter.as_stored
    untie = tied and (head in saved or adapts_head(adapter.adapted) or (trained and not (alike or settings.tied)))
    if untie:
        assert embedding is not None and head is not None
        if adapter.rows:
            raise UnsupportedError(
                "`trainable_token_indices` beside a head of its own, on a base whose embedding and head are one",
                hint="merge it with PEFT itself: `merge_and_unload`, then `save_pretrained`",
            )
        saved.setdefault(head, base[names[embedding]])
    tensors, origins = dict(base), dict[str, StoredTensor]()
    for own, tensor in saved.items():
        name = names.get(own) or name_in_base(table, own, base)
        like = base.get(name) or (base[names[str(embedding)]] if untie and own == head else None)
        if like is None:
            raise CoverageError(
                f"the adapter replaces `{own}`, which the base does not hold",
                hint="is it the model that the adapter was trained on?",
            )
        tensors[name], origins[name] = replace(like, name=name, shape=tensor.shape), tensor
    size = _vocabulary_size(names.get(str(embedding)), names.get(str(head)), base, tensors)
    if tied and not untie and head is not None and (repeated := names[head]) in base and embedding in saved:
        name = names[str(embedding)]
        tensors[repeated], origins[repeated] = replace(tensors[name], name=repeated), origins[name]
    changes: dict[str, Value] = {} if size is None else {"vocab_size": size}
    changed_fields = {} if size is None else {_SIZE: size}
    if untie:
        changes["tie_word_embeddings"], changed_fields[TIED] = False, False
    one = (embedding, names[head]) if tied and not untie and head is not None else None
    updates = _as_stored(adapter, names, tensors, one) | _rows(adapter, names, tensors, one, head)
    return Merged(tensors, {**fields, **changed_fields}, origins, changes, updates)


def _vocabulary_size(
    embedding: str | None, head: str | None, base: Mapping[str, StoredTensor], merged: Mapping[str, StoredTensor]
) -> int | None:
    """The new number of tokens, None where it stays; CoverageError for other shapes that differ from the base's."""
    both = [name for name in (embedding, head) if name is not None and name in merged]
    for name, tensor in merged.items():
        old = base[name].shape if name in base else base[str(embedding)].shape
        grown = name in both and len(tensor.shape) == 2 and tensor.shape[1:] == old[1:]
        if tensor.shape != old and not grown:
            raise CoverageError(
                f"`{name}` is {list(old)}, and the adapter's own {list(tensor.shape)}",
                hint="is it the model that the adapter was trained on?",
            )
    rows = {merged[name].shape[0] for name in both}
    if len(rows) > 1:
        sizes = ", ".join(f"`{name}` {merged[name].shape[0]} rows" for name in both)
        raise CoverageError(
            f"the vocabulary was resized in one of two matrices: {sizes}",
            hint="save the adapter again with `save_embedding_layers=True`, which takes both along",
        )
    size = rows.pop() if rows else None
    return None if embedding is None or size == base[embedding].shape[0] else size


#: The embedding by the rows' name, and the base's name of the head that is one with it.
_One = tuple[str | None, str]


def _held(name: str, own: str, tensors: Mapping[str, StoredTensor], one: _One | None) -> list[str]:
    """The base's tensors that hold what the rows call `own`: two where a tied head repeats it."""
    return [name, *([one[1]] if one is not None and own == one[0] and one[1] in tensors else [])]


def _as_stored(
    adapter: PeftAdapter, names: Mapping[str, str], tensors: Mapping[str, StoredTensor], one: _One | None
) -> dict[str, LowRank]:
    """Updates of weights as they are stored, by the base's tensor."""
    out = {}
    for own, update in adapter.as_stored.items():
        if own in adapter.rows:
            raise UnsupportedError(
                f"`trainable_token_indices` beside a LoRA of the same `{own}`",
                hint="merge it with PEFT itself: `merge_and_unload`, then `save_pretrained`",
            )
        for name in _held(names.get(own, own), own, tensors, one):
            check_fits(name, update, tensors)
            out[name] = update
    return out


def _rows(
    adapter: PeftAdapter,
    names: Mapping[str, str],
    tensors: Mapping[str, StoredTensor],
    one: _One | None,
    head: str | None,
) -> dict[str, LowRank]:
    """Replaced rows by the base's tensor."""
    out = {}
    for own, (tensor, rows) in adapter.rows.items():
        if one is not None and own == head:
            raise UnsupportedError(
                f"`trainable_token_indices` of `{own}` alone, which is one with the embedding in this base",
                hint="merge it with PEFT itself: `merge_and_unload`, then `save_pretrained`",
            )
        for name in _held(names.get(own, own), own, tensors, one):
            shape = tensors[name].shape if name in tensors else ()
            if shape[1:] != tensor.shape[1:] or shape[0] <= max(rows, default=0):
                raise CoverageError(
                    f"the adapter replaces rows of `{name}` up to {max(rows)} by {tensor.shape[1]} values each; the "
                    f"base's is {list(shape)}",
                    hint="is it the model that the adapter was trained on?",
                )
            out[name] = replaced_rows(tensor, rows)
    return out


def replaced_rows(tensor: StoredTensor, rows: tuple[int, ...]) -> LowRank:
    """What replaces rows of a weight, by their numbers, with those of a tensor."""
    return LowRank((), replaced=(RowsOf(tensor.name, rows),))


def joined(updates: Mapping[Spot, LowRank], others: Mapping[str, LowRank]) -> dict[Spot, LowRank]:
    """Updates of linears, and those of whole tensors: rows are replaced on top of what is added to them."""
    out = dict(updates)
    for name, update in others.items():
        linear = out.get((name, ()))
        out[name, ()] = update if linear is None else replace(linear, replaced=update.replaced)
    return out
