"""Laws of the one primitive, against plain slicing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters.rows.pack import Pack, Slot, runs


def naive(slot: Slot) -> list[int]:
    return [k * slot.stride + slot.start + j for k in range(slot.groups) for j in range(slot.size)]


def spread(starts: np.ndarray, lengths: np.ndarray) -> list[int]:
    return [s + i for s, n in zip(starts.tolist(), lengths.tolist(), strict=True) for i in range(n)]


@st.composite
def slot_pairs(draw: st.DrawFn) -> tuple[Slot, Slot]:
    rows = draw(st.integers(1, 48))
    divisors = [n for n in range(1, rows + 1) if rows % n == 0]

    def slot() -> Slot:
        groups = draw(st.sampled_from(divisors))
        size, start, rest = rows // groups, draw(st.integers(0, 5)), draw(st.integers(0, 5))
        return Slot(start, size, start + size + rest, groups)

    return slot(), slot()


@given(slot_pairs())
def test_runs_carry_each_row_of_an_atom_once(pair: tuple[Slot, Slot]) -> None:
    source, target = pair
    found = runs(source, target)
    moved = dict(zip(spread(found.target, found.length), spread(found.source, found.length), strict=True))
    assert moved == dict(zip(naive(target), naive(source), strict=True))
    assert found.target.tolist() == sorted(found.target.tolist())


@given(slot_pairs())
def test_runs_back_undo_runs_forth(pair: tuple[Slot, Slot]) -> None:
    forth, back = runs(*pair), runs(*reversed(pair))
    triples = sorted(zip(forth.source.tolist(), forth.target.tolist(), forth.length.tolist(), strict=True))
    again = sorted(zip(back.target.tolist(), back.source.tolist(), back.length.tolist(), strict=True))
    assert triples == again


@given(slot_pairs())
def test_runs_are_maximal(pair: tuple[Slot, Slot]) -> None:
    found = runs(*pair)
    for i in range(len(found) - 1):
        joins = (
            found.source[i] + found.length[i] == found.source[i + 1]
            and found.target[i] + found.length[i] == found.target[i + 1]
        )
        assert not joins


@given(st.integers(1, 6), st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_slots_of_a_pack_tile_its_rows(groups: int, sizes: list[int]) -> None:
    pack = Pack(groups, tuple(sizes))
    rows = [row for slot in pack.slots() for row in naive(slot)]
    assert sorted(rows) == list(range(pack.rows))


def test_atoms_of_unequal_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="8 rows cannot fill one of 6"):
        runs(Slot(0, 8, 8, 1), Slot(0, 6, 6, 1))
