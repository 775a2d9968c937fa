"""Orders that the rows of a tensor are found in by mistake: fused parts, halves, groups and rotary pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from converters.rows.pack import Slot, slot_rows

Index = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Heads:
    """How rotary embeddings see rows: heads of `size` rows, of which `rotary` from row `first` on turn."""

    size: int
    rotary: int
    first: int = 0


@dataclass(frozen=True, slots=True)
class Structure:
    """What the rows of a tensor are.

    `atoms` are the slots of fused parts (query, key, value; gate, up) where there are several, `names` theirs.
    `heads` are set where rows belong to rotary heads; `rotates` lists the atoms that turn, None where all rows do.
    """

    atoms: tuple[Slot, ...] = ()
    names: tuple[str, ...] = ()
    heads: Heads | None = None
    rotates: tuple[int, ...] | None = None


def arrangements(rows: int, structure: Structure) -> Iterator[tuple[str, Index]]:
    """Wrong orders of rows: a sentence, and for each actual row the expected one it would equal, [rows]."""
    whole = np.arange(rows, dtype=np.int64)
    if len(structure.atoms) > 1 and sum(slot.rows for slot in structure.atoms) == rows:
        yield from _of_atoms(whole, structure)
    elif rows % 2 == 0 and rows > 1:
        yield "its two halves are swapped", np.roll(whole, rows // 2)
        yield "its rows alternate where the halves were expected one after the other", _zip(whole)
        yield "its halves lie one after the other where alternating rows were expected", _unzip(whole)
    if structure.heads is not None:
        yield from _rotary(whole, structure, structure.heads)
    if rows > 1:
        yield "its rows are in reverse order", whole[::-1]


def _of_atoms(whole: Index, structure: Structure) -> Iterator[tuple[str, Index]]:
    parts = [slot_rows(slot) for slot in structure.atoms]
    names = structure.names or tuple(f"part {i}" for i in range(len(parts)))
    for i in range(len(parts)):
        for j in range(i + 1, len(parts)):
            if len(parts[i]) == len(parts[j]):
                order = whole.copy()
                order[parts[i]], order[parts[j]] = parts[j], parts[i]
                yield f"{names[i]} and {names[j]} are swapped", order
    concat = np.concatenate(parts)
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    if not np.array_equal(concat, whole):
        yield f"{listed} lie one after the other instead of side by side per group", concat
    groups = structure.atoms[0].groups
    if groups == 1 and len({len(part) for part in parts}) == 1:
        yield f"{listed} alternate row by row instead of one after the other", np.stack(parts, 1).reshape(-1)
    if groups > 1:
        # Repeats as one tensor-parallel rank of the wrong size would make: whole groups in reverse.
        stride = len(whole) // groups
        yield "its groups are in reverse order", whole.reshape(groups, stride)[::-1].reshape(-1)


def _rotary(whole: Index, structure: Structure, heads: Heads) -> Iterator[tuple[str, Index]]:
    atoms = structure.atoms
    chosen = structure.rotates if structure.rotates is not None else tuple(range(len(atoms)))
    parts = {i: slot_rows(atoms[i]) for i in chosen if i < len(atoms)} if atoms else {0: whole}
    names = structure.names or ("it",)
    groups: list[tuple[str, tuple[int, ...]]] = [("", tuple(parts))]
    if len(parts) > 1:
        groups += [(f" of {names[i]} alone", (i,)) for i in parts]
    half = heads.rotary // 2
    pairs = np.arange(heads.rotary).reshape(2, half).T.reshape(-1)
    for label, members in groups:
        if any(len(parts[i]) % heads.size for i in members) or half < 1:
            continue
        for sentence, inner in (
            ("interleaved pairs where halves were expected", pairs),
            ("halves where interleaved pairs were expected", np.argsort(pairs)),
        ):
            order = whole.copy()
            for i in members:
                head = parts[i].reshape(-1, heads.size)
                turned = head.copy()
                turned[:, heads.first : heads.first + heads.rotary] = head[:, heads.first + inner]
                order[head.reshape(-1)] = turned.reshape(-1)
            yield f"the rotary rows{label} are in {sentence}", order


def _zip(whole: Index) -> Index:
    return np.ascontiguousarray(whole.reshape(2, -1).T).reshape(-1)


def _unzip(whole: Index) -> Index:
    return np.ascontiguousarray(whole.reshape(-1, 2).T).reshape(-1)
