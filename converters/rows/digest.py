"""A digest of what an object says, whatever text it was read from."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from hashlib import sha256


def digest_of(value: object, *, leave_out: Collection[str] = ()) -> str:
    """SHA-256 of a frozen dataclass of plain values, mappings, tuples and others like it, in hexadecimal.

    Fields at their default and fields named in `leave_out` do not count, at any depth: a field that is added later
    changes no digest of an object that does not use it. Orders count in tuples and not in mappings or sets.
    """
    return sha256(json.dumps(_plain(value, leave_out), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _plain(value: object, leave_out: Collection[str]) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        held = {field.name: getattr(value, field.name) for field in fields(value) if field.name not in leave_out}
        return {
            field.name: _plain(held[field.name], leave_out)
            for field in fields(value)
            if field.name in held and held[field.name] != _default(field)
        }
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, leave_out) for key, entry in value.items()}
    if isinstance(value, frozenset):
        return sorted(str(entry) for entry in value)
    if isinstance(value, (list, tuple)):
        return [_plain(entry, leave_out) for entry in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"no digest of a {type(value).__name__}")


def _default(field: Field[object]) -> object:
    """The field's default, or an object that equals nothing."""
    if field.default is not MISSING:
        return field.default
    return MISSING if field.default_factory is MISSING else field.default_factory()
