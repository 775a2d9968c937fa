"""What mbx says of a model in Megatron's own sidecars where they have no words for it: its class, and further fields.

It stands under one name, `mbx`, in Megatron-LM's `args` and in Megatron-Bridge's `run_config.yaml`; neither reads it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from converters.errors import UsageError
from converters.mcore.field_equality import alike, is_idle
from converters.rows.expr import Value

NAME = "mbx"


def statement_of(
    architectures: Collection[str], config: Mapping[str, Value], told: Mapping[str, Value]
) -> dict[str, object]:
    """What is to be said beside a sidecar that already says `told` of `config`.

    Law: `told` with the `fields` of it, and without the `absent` ones, says what `config` does in every field.
    """
    absent = [name for name, value in told.items() if name not in config and not is_idle(name, value)]
    fields = {
        name: value
        for name, value in config.items()
        if value != told.get(name) and not (name in told and alike(name, config, told))
    }
    return {"architectures": list(architectures), "fields": fields, "absent": absent}


def architectures_of(sidecar: Mapping[str, object]) -> tuple[str, ...]:
    """The Hugging Face classes that the statement in `sidecar` names; empty where it has none."""
    said = sidecar.get(NAME)
    names = said.get("architectures") if isinstance(said, Mapping) else None
    return tuple(map(str, names)) if isinstance(names, list) else ()


def completed(told: Mapping[str, Value], sidecar: Mapping[str, object], origin: str) -> dict[str, Value]:
    """`told`, which `sidecar` says in its own words, with what its statement adds and takes away.

    UsageError where that is no statement.
    """
    said = sidecar.get(NAME)
    absent = said.get("absent", []) if isinstance(said, Mapping) else []
    fields = said.get("fields", {}) if isinstance(said, Mapping) else {}
    if not isinstance(fields, Mapping) or not all(isinstance(name, str) and _is_data(v) for name, v in fields.items()):
        raise UsageError(f"{origin}: `{NAME}.fields` is {fields!r}; fields of a model's config were expected")
    if not isinstance(absent, list):
        raise UsageError(f"{origin}: `{NAME}.absent` is {absent!r}; names of fields were expected")
    return {name: value for name, value in told.items() if name not in absent} | dict(fields)


def _is_data(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_data(entry) for name, entry in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_data, value))
    return value is None or isinstance(value, bool | int | float | str)
