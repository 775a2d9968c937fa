"""importance.json: how much each layer, head, channel and expert of a model matters, as it was measured.

`layers` has a number a layer and `hidden` one a channel; `ffn`, `shared_ffn`, `heads` and `experts` have a list by the
number of a layer, `expert_ffn` one by the number of an expert in it. What was measured on stands in `measured`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from converters.errors import StorageError
from converters.pruning.choosing import Importance, Scores
from converters.pruning.kept import WIDTHS, Spot
from mbx.untrusted.small_files import INDEX, read_json

#: Widths by their key; key heads are told by the query heads that share them.
_KEYS = {name: choice.replace("-", "_") for name, choice in WIDTHS.items() if name != "num_query_groups"}


def read_importance(path: Path) -> Importance:
    """What `write_importance` wrote; StorageError for anything else."""
    try:
        said = read_json(path, INDEX)
    except OSError as error:
        raise StorageError(f"`{path}` cannot be read: {error}") from error
    layers = None if "layers" not in said else _numbers(said["layers"], path, "layers")
    widths = {
        name: {spot: _numbers(own, path, key) for spot, own in _spots(said[key], (), path, key)}
        for name, key in _KEYS.items()
        if key in said
    }
    if layers is None and not widths:
        raise StorageError(
            f"`{path}` tells no importance: it has none of layers, {', '.join(_KEYS.values())}",
            hint="`mbx importance SRC data.jsonl -o importance.json` writes one",
        )
    return Importance(layers, widths)


def _spots(said: object, at: tuple[int, ...], path: Path, key: str) -> Iterator[tuple[Spot, object]]:
    """Every list below `said`, with the layer and the expert that lead to it."""
    if not isinstance(said, Mapping):
        layer, expert = (*at, None, None)[:2]
        yield (layer, expert), said
        return
    for number, below in said.items():
        if not re.fullmatch(r"\d{1,6}", str(number), re.ASCII) or len(at) == 2:
            raise StorageError(f"`{path}`: `{key}` holds {str(number)[:40]!r}; the number of a layer was expected")
        yield from _spots(below, (*at, int(number)), path, key)


def _numbers(said: object, path: Path, key: str) -> Scores:
    good = isinstance(said, list) and all(isinstance(one, int | float) and not isinstance(one, bool) for one in said)
    scores = np.asarray(said if good else [np.nan], dtype=np.float64)
    if not scores.size or not np.isfinite(scores).all():
        raise StorageError(f"`{path}`: `{key}` is no list of finite numbers")
    return scores


def importance_text(importance: Importance, measured: Mapping[str, object]) -> bytes:
    """The file's content; six digits of each number."""
    said: dict[str, object] = {"measured": dict(measured)}
    if importance.layers is not None:
        said["layers"] = _rounded(importance.layers)
    for name, scores in importance.widths.items():
        said[_KEYS[name]] = _nested(scores)
    return (json.dumps(said) + "\n").encode()


def _nested(scores: Mapping[Spot, Scores]) -> object:
    out: dict[str, object] = {}
    for (layer, expert), own in scores.items():
        if layer is None:
            return _rounded(own)
        if expert is None:
            out[str(layer)] = _rounded(own)
        else:
            inner = out.setdefault(str(layer), {})
            assert isinstance(inner, dict)
            inner[str(expert)] = _rounded(own)
    return out


def _rounded(scores: Scores) -> list[float]:
    return [float(f"{score:.6g}") for score in scores.tolist()]
