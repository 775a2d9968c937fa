"""The table of a checkpoint that has no config.json: the one its writer names, held against every field and tensor.

A table that merely fits is never taken for one that is named, and of several that fit none is guessed: those that say
the same function in every field are one model under several names, any others an error that lists them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from converters.errors import CoverageError, LayoutError, MbxError, UnsupportedError, UsageError
from converters.mcore.bridge_families import family_named
from converters.mcore.bridge_towers import towers_in
from converters.mcore.field_equality import alike, is_idle
from converters.mcore.flavours import flavoured
from converters.mcore.keys import inner_prefix
from converters.mcore.megatron_args import TRAINING
from converters.mcore.named import NAME_A_FOLDER, Named, named_by
from converters.planning.exporter import plan_export
from converters.rows.config_spelling import DIFFUSERS_CLASS
from converters.rows.expr import Value
from converters.rows.table import Table
from mappings import table_names
from mbx.tables import shipped, table_for

if TYPE_CHECKING:
    from mbx.formats.checkpoint import Checkpoint

#: The table that is taken where several say the same in every field: the one most tools know.
_PREFERRED = ("llama", "qwen2", "qwen3", "mistral", "mixtral", "qwen3_moe", "deepseek_v3")


@dataclass(frozen=True, slots=True)
class Fit:
    """A table, the config.json that it makes of what sidecars say, and what to tell of the choice."""

    table: Table
    config: Mapping[str, Value]
    notes: tuple[str, ...] = ()


def fitting(known: Mapping[str, Value], opened: Checkpoint, mapping: str | None) -> Fit:
    """The table that the writer names, or that Megatron Core's fields leave: it says `known` and covers every tensor.

    `mapping` is the user's choice. Raises UnsupportedError where no table is right, UsageError where several are.
    """
    if mapping is not None:
        return _chosen(known, opened, mapping)
    named = named_by(opened.args, opened.run_config)
    inside = any(map(inner_prefix, opened.tensors))
    tables = [table for name in table_names() if _may_be(table := shipped(name), named)]
    # A text model alone is not taken for one whose towers lie elsewhere, where a table of the former may be meant.
    tables = [table for table in tables if bool(table.flavours) == inside] or (tables if named else [])
    if named is not None and not tables:
        raise UnsupportedError(
            f"{named.origin} is of {' or '.join(named.architectures)}, for which there is no table", hint=NAME_A_FOLDER
        )
    fits, reasons = [], []
    for table in tables:
        try:
            fits.append(_fit(table, known, opened, named))
        except (CoverageError, UsageError, UnsupportedError, LayoutError) as error:
            reasons.append((table, error))
    if not fits:
        raise _none(named, reasons)
    if len(fits) == 1:
        return fits[0]
    stated = () if named is None else named.architectures
    if (chosen := _preferred(fits, stated)) is not None and all(_same_function(chosen, other) for other in fits):
        others = ", ".join(sorted(fit.table.architectures[0] for fit in fits if fit is not chosen))
        return replace(chosen, notes=(f"the same function also goes by {others}",))
    raise UsageError(
        f"{len(fits)} tables describe this checkpoint: {', '.join(fit.table.name for fit in fits)}",
        hint=f"{NAME_A_FOLDER}; or choose one: ‹mapping› {fits[0].table.name}",
        details=_against(fits, reasons),
    )


def _may_be(table: Table, named: Named | None) -> bool:
    """Whether a table is of a class that is named; without a name, whether Megatron Core itself builds its models."""
    if named is None:
        return not table.unsupported
    first, *others = table.architectures
    # a class that another table is of is that one's, though a model of this one may be saved under it
    own = [name for name in others if all(shipped(other).architectures[0] != name for other in table_names())]
    return first in named.architectures or not set(own).isdisjoint(named.architectures)


def _none(named: Named | None, reasons: Sequence[tuple[Table, MbxError]]) -> UnsupportedError:
    details = [f"{table.name}: {error.fact}" for table, error in reasons]
    if named is not None and len(reasons) == 1:
        table, error = reasons[0]
        return UnsupportedError(
            f"{named.origin} is of {' or '.join(table.architectures)}, and the table `{table.name}` does not describe "
            f"this checkpoint: {error.fact}",
            hint=f"{NAME_A_FOLDER} (the sidecar may leave out what the table needs)",
            details=lambda: error.details,
        )
    by = "" if named is None else f" {named.origin} leaves {', '.join(named.architectures)}."
    return UnsupportedError(
        f"no shipped table describes this checkpoint.{by}",
        hint=f"{NAME_A_FOLDER} (the sidecar may leave out what a table needs, as Megatron-Bridge's of 0.3 does YaRN); "
        "or a table, to see why it does not: ‹mapping› TABLE",
        details=details,
    )


def _against(fits: list[Fit], reasons: Sequence[tuple[Table, MbxError]]) -> list[str]:
    """What speaks against each candidate: for those that fit, the fields in which they differ from the first."""
    first = fits[0].table.config.to_mcore(fits[0].config)
    lines = []
    for fit in fits:
        fields = fit.table.config.to_mcore(fit.config)
        odd = [key for key in sorted(set(first) | set(fields)) if first.get(key) != fields.get(key)]
        said = ", ".join(f"`{key}` {fields.get(key)!r}" for key in odd if key not in TRAINING)
        lines.append(f"{fit.table.name}: fits{f'; it says {said}' if said else ''}")
    return [*lines, *(f"{table.name}: {error.fact}" for table, error in reasons)]


def _preferred(fits: list[Fit], stated: tuple[str, ...]) -> Fit | None:
    """The fit of exactly the classes that are stated, or of the table that most tools know."""
    own = [fit for fit in fits if fit.table.architectures == stated]
    return next(iter((*own, *(fit for wish in _PREFERRED for fit in fits if fit.table.name == wish))), None)


def _same_function(left: Fit, right: Fit) -> bool:
    """Whether two tables make a model of the same fields, what one leaves out being idle in the other."""
    mine, other = (fit.table.config.to_mcore(fit.config) for fit in (left, right))
    if unequal_fields(mine, other):
        return False
    return all(is_idle(key, (mine | other)[key]) for key in set(mine) ^ set(other) if key not in TRAINING)


def _chosen(known: Mapping[str, Value], opened: Checkpoint, mapping: str) -> Fit:
    try:
        return _fit(table_for({}, mapping), known, opened, None)
    except (CoverageError, UsageError, UnsupportedError, LayoutError) as error:
        raise UnsupportedError(
            f"the table `{mapping}` does not describe this checkpoint: {error.fact}",
            hint=f"the sidecar may leave it out: {NAME_A_FOLDER}",
            details=error.details,
        ) from error


#: Keys that Transformers' classes give a value where they are absent: a model without says so by null.
_NULL_SAYS_NONE = frozenset({"q_lora_rank", "sliding_window"})


def _fit(table: Table, known: Mapping[str, Value], opened: Checkpoint, named: Named | None) -> Fit:
    """The config.json that `table` makes of `known`; raises where the two differ, or tensors are left."""
    if named is not None and (family := family_named(table.architectures)) is not None:
        known = {**family.implied, **known}
    stated = {key: value for key, value in known.items() if key not in TRAINING}
    made = table.config.to_hf(stated)
    for row in table.config.rows:
        if row.mcore in TRAINING and (value := known.get(row.mcore)) is not None:
            made[row.hf] = value
    config: dict[str, Value] = {
        key: _without_none(value) for key, value in made.items() if value is not None or key in _NULL_SAYS_NONE
    }
    if table.family == "dit":
        config[DIFFUSERS_CLASS] = table.architectures[0]
    else:
        config["model_type"] = table.model_types[0]
        if table.architectures:
            config["architectures"] = [table.architectures[0]]
    if table.flavours and (model := _provider_of(opened)) is not None and (towers := towers_in(model)) is not None:
        config = towers.whole(model, config)
    back = table.config.to_mcore(config)
    if wrong := unequal_fields(back, known):
        key = wrong[0]
        raise UsageError(f"`{key}` is {known[key]!r}; the table `{table.name}` makes it {back[key]!r}")
    for key, value in known.items():
        unused = is_idle(key, value) or key == "ffn_hidden_size" and _all_experts(known)
        if key not in back and key not in TRAINING and not unused:
            raise UsageError(f"`{key}` is {value!r}, of which the table `{table.name}` knows nothing")
    if named is None or not named.certain:
        _check_silence(table, back, known)
    _check_sections(back)
    table = flavoured(table, opened.tensors)
    plan_export(table, back, opened.tensors)
    return Fit(table, config)


def _provider_of(opened: Checkpoint) -> Mapping[str, object] | None:
    """The `model` node of run_config.yaml."""
    model = (opened.run_config or {}).get("model")
    return model if isinstance(model, Mapping) else None


def _all_experts(known: Mapping[str, Value]) -> bool:
    """Whether no layer has a dense MLP, of which `ffn_hidden_size` is the width."""
    freq = known.get("moe_layer_freq")
    everywhere = freq in (None, 1) or isinstance(freq, list) and all(flag == 1 for flag in freq)
    return bool(known.get("num_moe_experts")) and everywhere


def _check_silence(table: Table, back: Mapping[str, Value], known: Mapping[str, Value]) -> None:
    """UsageError for a field that is not idle and of which the sidecars say nothing: it has none then.

    Latent attention's own epsilon is every norm's there. Where the class itself is named, its defaults are meant.
    """
    for key, value in back.items():
        same = key == "model.latent_layernorm_epsilon" and value == back.get("layernorm_epsilon")
        if key not in known and key not in TRAINING and not is_idle(key, value) and not same:
            raise UsageError(f"the table `{table.name}` says `{key}` = {value!r}, and the checkpoint nothing of it")


def _check_sections(fields: Mapping[str, Value]) -> None:
    """UsageError where the class's own sections stand for those of positions in an image, and the head is another's.

    Megatron-Bridge writes them for every Qwen2.5-VL and GLM-4.5V, whatever the folder says.
    """
    sections, width = fields.get("mrope_section"), fields.get("kv_channels")
    share = fields.get("model.rotary_percent", 1.0)
    if not isinstance(sections, list) or not isinstance(width, int) or not isinstance(share, int | float):
        return
    turned, pairs = sum(part for part in sections if isinstance(part, int)), int(width * share) // 2
    if turned != pairs:
        raise UsageError(
            f"`mrope_section` is not said; the class's {sections} are {turned} pairs, a head turns {pairs}"
        )


def unequal_fields(left: Mapping[str, Value], right: Mapping[str, Value]) -> list[str]:
    """Fields that both sides state, and not alike."""
    shared = (set(left) & set(right)) - TRAINING
    return sorted(key for key in shared if not alike(key, left, right))


def _without_none(value: Value) -> Value:
    """A nested object without the keys that nothing says."""
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, Mapping) else value
