"""Rows of a table that the weights given cannot tell apart: a wrong table converts and computes the same with them.

A freshly made model has norms of ones and biases of zero; whichever row they belong to, nothing shows it.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from converters.engine.plan import FLOATS, Plan
from converters.protocols import Source
from converters.stored import read_box
from converters.tensors import DTYPE_BITS, Shape, StoredTensor
from mbx.proof.gaps import Gap

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
#: Elements that are read at a time; a tensor that is no constant shows it in the first of them, nearly always.
_BLOCK = 2048
#: Shape, dtype, where the first block that is no constant lies, and its bytes: what equal tensors have in common.
_Print: TypeAlias = tuple[Shape, str, int, bytes]


def not_told_apart(plan: Plan, source: Source) -> tuple[Gap, ...]:
    """Names of `plan`'s sources, layers and experts as `{}`, that hold constants, or the values of another.

    Of each tensor no more is read than shows that it is no constant.
    """
    if plan.table is None:
        return ()
    prints: dict[str, dict[tuple[str, ...], _Print | None]] = defaultdict(dict)
    for name in dict.fromkeys(move.source.tensor for unit in plan.units for move in unit.moves):
        tensor = plan.sources.get(name)
        if tensor is None or name in plan.encoded or tensor.dtype not in FLOATS or math.prod(tensor.shape) < 2:
            continue
        prints[_NUMBER.sub("{}", name)][tuple(_NUMBER.findall(name))] = _print(tensor, source)
    return tuple(Gap("not told apart", what) for what in _found(prints))


def _found(prints: Mapping[str, Mapping[tuple[str, ...], _Print | None]]) -> Iterator[str]:
    constant = [name for name, found in prints.items() if not any(found.values())]
    if constant:
        yield f"{_names(constant)}: constant in these weights"
    varied = {name: found for name, found in prints.items() if name not in constant}
    for name, found in varied.items():
        if len(found) > 1 and len(set(found.values())) == 1:
            yield f"`{name}`: the same in every place"
    by_first: dict[_Print, list[str]] = defaultdict(list)
    for name, found in varied.items():
        for value in {value for value in found.values() if value is not None}:
            by_first[value].append(name)
    pairs = {pair for names in by_first.values() for pair in combinations(sorted(names), 2)}
    for one, other in sorted(pairs):
        shared = [at for at in varied[one] if at in varied[other]]
        if shared and all(varied[one][at] == varied[other][at] for at in shared):
            yield f"`{one}` and `{other}`: equal in these weights"


def _names(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:6])
    return shown if len(names) <= 6 else f"{shown} and {len(names) - 6} more"


def _print(tensor: StoredTensor, source: Source) -> _Print | None:
    """What tells a tensor from others; None for a constant."""
    first: npt.NDArray[np.generic] | None = None
    for at, words in _blocks(tensor, source):
        first = words[:1] if first is None else first
        if (words != first).any():
            return tensor.shape, tensor.dtype, at, words.tobytes()
    return None


def _blocks(tensor: StoredTensor, source: Source) -> Iterator[tuple[int, npt.NDArray[np.generic]]]:
    """The values in order as words of their size, some rows of the first dimension at a time."""
    rows, inner = tensor.shape[0], math.prod(tensor.shape[1:])
    step = max(1, _BLOCK // max(1, inner))
    word = np.dtype(f"u{DTYPE_BITS[tensor.dtype] // 8}")
    for row in range(0, rows, step):
        sizes = (min(step, rows - row), *tensor.shape[1:])
        block = read_box(tensor, source, (row, *(0 for _ in tensor.shape[1:])), sizes)
        yield row, block.reshape(-1).view(word)
