"""What Transformers reads out of a config.json: defaults where a key is absent, and one spelling of all."""

from __future__ import annotations

from collections.abc import Mapping

from converters.rows.config_spelling import canonical
from converters.rows.expr import Value

#: Keys that say who wrote a config and in which dtype, on every level of it.
_PROVENANCE = frozenset(("transformers_version", "torch_dtype", "dtype"))


def completed(config: Mapping[str, Value]) -> dict[str, Value] | None:
    """`config` in the v4 spelling with every key that the class of its model type has; None without such a class.

    None too where the class refuses the config. Nothing of a folder's own code is run.
    """
    from transformers import CONFIG_MAPPING

    from mbx.models.transformers.reference import silent_transformers

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return None
    try:
        with silent_transformers():
            whole = CONFIG_MAPPING[kind].from_dict(dict(config)).to_dict()
        return canonical(whole)
    except Exception:  # the class checks as it likes; what it refuses is compared as it is written
        return None


def completed_pair(
    mine: Mapping[str, Value], other: Mapping[str, Value]
) -> tuple[Mapping[str, Value], Mapping[str, Value]]:
    """Two config.json files as their class reads them; in the v4 spelling, as written, where no one class reads both.

    What says who wrote a config, and in which dtype, is left out.
    """
    left, right = _plain(canonical(dict(mine))), _plain(canonical(dict(other)))
    if left == right or left.get("model_type") != right.get("model_type"):
        return left, right
    read = completed(mine), completed(other)
    if read[0] is None or read[1] is None:
        return left, right
    return _plain(read[0]), _plain(read[1])


def unequal_keys(left: Mapping[str, Value], right: Mapping[str, Value]) -> list[str]:
    """Keys by which two configs differ."""
    return sorted(key for key in set(left) | set(right) if left.get(key) != right.get(key))


def _plain(config: Mapping[str, Value]) -> dict[str, Value]:
    """`config` without what is absent, without provenance, nested objects alike."""
    return {
        str(key): _plain(value) if isinstance(value, Mapping) else value  # labels are numbered
        for key, value in config.items()
        if value is not None and key not in _PROVENANCE and not str(key).startswith("_")
    }
