"""The engine against slicing and concatenating in torch, on random plans over random chunk grids."""

from __future__ import annotations

import threading
import tracemalloc
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.engine import relay
from converters.engine.pieces import Cutting
from converters.engine.plan import Entry, Unit
from converters.engine.stream import Engine
from converters.engine.workers import MemoryGate
from converters.errors import DeviceError, StorageError
from converters.tensors import StoredTensor
from converters.torch_casts import TORCH_DTYPES
from tests.unit._memory import Fused, Store, check_crcs, content, layout, plan_of, raw, sizes, store, unit_of

MIB = 1 << 20


class Case:
    """A random plan: sources in memory, places for the targets, and what the targets must hold."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        self.source, self.sink = Store(), Store()
        self.sources: list[StoredTensor] = []
        self.targets: list[StoredTensor] = []
        self.units: list[Unit] = []
        self.expected: dict[str, torch.Tensor] = {}
        for number in range(draw(st.integers(1, 3))):
            self._add(draw, f"u{number}")
        for file, nbytes in sizes(self.targets).items():
            self.sink.add(file, np.full(nbytes, 0xAA, np.uint8))
        self.plan = plan_of(self.units, self.sources, self.targets)

    def _add(self, draw: st.DrawFn, name: str) -> None:
        """One row of a table over a stack of entries: the same atoms, fused differently on the two sides."""
        fold = draw(st.sampled_from((1, 1, 1, 2)))
        cols = draw(st.integers(1, 9))
        atoms = [4 * draw(st.integers(1, 6)) for _ in range(draw(st.integers(1, 3)))]
        origin, dtype = draw(st.sampled_from((("BF16", "BF16"), ("F32", "BF16"), ("BF16", "F32"), ("U8", "U8"))))
        shift = draw(st.sampled_from((0, 0, 1, -1))) if origin != "U8" else 0
        entries = draw(st.integers(1, 3))
        left = self._fusions(draw, f"{name}.in", len(atoms), fold)
        right = self._fusions(draw, f"{name}.out", len(atoms), fold)
        left, right = [replace(f, padding=0) for f in left], [replace(f, padding=2 * f.padding) for f in right]
        stacked = [draw(st.booleans()) for _ in (left, right)]
        parts: dict[str, list[torch.Tensor]] = {}
        for entry in range(entries):
            values = [self._values(rows, cols, origin) for rows in atoms]
            here = [self._at(side, entry, entries, many) for side, many in zip((left, right), stacked, strict=True)]
            for fused in here[0]:
                parts.setdefault(fused.name, []).append(fused.matrix(values))
            for fused in here[1]:
                moved = [self._cast(value, dtype, shift) for value in values]
                self.expected.setdefault(fused.name, torch.empty(0))
                parts.setdefault(fused.name, []).append(fused.matrix(moved))
            self.units.append(unit_of(f"{name}[{entry}]", values, *here, fold=fold, shift=shift))
            if shift:  # a norm offset reaches padding too; no table pads a shifted row
                for fused in here[1]:
                    if fused.padding:
                        rows = parts[fused.name][-1]
                        pad = rows[:, -fused.padding :] if fused.transposed else rows[-fused.padding :]
                        pad += shift
        for key, matrices in parts.items():
            whole = self._stack([m.reshape(len(m) // fold, -1) for m in matrices], key, left + right, stacked, left)
            cuts = [self._cuts(draw, size, at, whole.ndim, fold) for at, size in enumerate(whole.shape)]
            if key in self.expected:
                self.expected[key] = whole
                self.targets.append(layout(key, dtype, tuple(whole.shape), cuts, self.rng))
            else:
                self.sources.append(store(key, origin, whole, cuts, self.source, self.rng))

    @staticmethod
    def _fusions(draw: st.DrawFn, name: str, atoms: int, fold: int) -> list[Fused]:
        """Split the atoms over one or two tensors, each with its own repeats; transposed ones stand alone."""
        order = draw(st.permutations(range(atoms)))
        at = draw(st.integers(1, atoms))
        groups = [tuple(order[:at]), tuple(order[at:])]
        flipped, repeats = fold == 1 and draw(st.booleans()), st.sampled_from((1, 2, 4))
        return [
            Fused(f"{name}{n}", members, draw(repeats), transposed=flipped, padding=draw(st.integers(0, 2)))
            for n, members in enumerate(groups)
            if members
        ]

    @staticmethod
    def _at(side: list[Fused], entry: int, entries: int, stacked: bool) -> list[Fused]:
        if stacked:
            return [replace(fused, stack=(entries,), index=(entry,)) for fused in side]
        return [replace(fused, name=f"{fused.name}.{entry}") for fused in side]

    @staticmethod
    def _stack(
        matrices: list[torch.Tensor], key: str, both: list[Fused], stacked: list[bool], left: list[Fused]
    ) -> torch.Tensor:
        side = 0 if any(key.startswith(f.name) for f in left) else 1
        return torch.stack(matrices) if stacked[side] else matrices[0]

    @staticmethod
    def _cuts(draw: st.DrawFn, size: int, at: int, dims: int, fold: int) -> list[int]:
        if fold > 1 and at == dims - 1:
            return []
        return draw(st.lists(st.integers(1, max(1, size - 1)), max_size=3)) if size > 1 else []

    def _values(self, rows: int, cols: int, dtype: str) -> torch.Tensor:
        if dtype == "U8":
            return torch.from_numpy(self.rng.integers(0, 256, (rows, cols), np.uint8))
        return torch.from_numpy(self.rng.standard_normal((rows, cols), np.float32)).to(TORCH_DTYPES[dtype])

    @staticmethod
    def _cast(value: torch.Tensor, dtype: str, shift: int) -> torch.Tensor:
        return (value.float() + shift if shift else value).to(TORCH_DTYPES[dtype])

    def engine(self, workers: int = 1, max_memory: int = 64 * MIB, piece_bytes: int | None = None) -> Engine:
        cutting = None if piece_bytes is None else Cutting(piece_bytes, max_memory)
        targets = {t.name: t for t in self.targets}
        return Engine(
            self.plan, targets, self.source, self.sink, workers=workers, max_memory=max_memory, cutting=cutting
        )

    def check(self, crcs: dict[str, list[int]]) -> None:
        for tensor in self.targets:
            want, got = self.expected[tensor.name], content(tensor, self.sink)
            assert np.array_equal(raw(want), raw(got)), tensor.name
            check_crcs(tensor, crcs[tensor.name], self.sink)


cases = st.composite(lambda draw: Case(draw))()


def _touched(tensors: list[StoredTensor], into: Store) -> np.ndarray:
    """How often each byte was touched: that of a chunk once, that of a gap never."""
    out = []
    for tensor in tensors:
        for chunk in tensor.chunks:
            span = slice(chunk.start, chunk.start + int(np.prod(chunk.sizes)) * TORCH_DTYPES[tensor.dtype].itemsize)
            out.append(into.touched[chunk.file][span].copy())
            into.touched[chunk.file][span] -= 1
    assert not any(counts.any() for counts in into.touched.values()), "a byte between chunks was touched"
    return np.concatenate(out)


@settings(max_examples=200, deadline=None)
@given(cases, st.integers(1, 3), st.sampled_from((None, 16, 100, 4096)), st.booleans())
def test_equals_torch_whatever_the_chunks(case: Case, workers: int, piece_bytes: int | None, tight: bool) -> None:
    """Right values and CRCs; every source byte read once, every target byte written once."""
    memory = 4096 if tight and piece_bytes else 64 * MIB
    try:
        engine = case.engine(workers, memory, piece_bytes)
    except DeviceError:  # a transposed unit that does not fit is refused, never half done
        assert memory == 4096
        return
    case.check(engine.run())
    assert (_touched(case.sources, case.source) == 1).all()
    assert (_touched(case.targets, case.sink) == 1).all()


@settings(max_examples=60, deadline=None)
@given(cases, st.sampled_from((1, 5, 32)), st.sampled_from((None, 100)))
def test_rows_that_only_move_are_relayed_by_blocks(case: Case, block: int, piece_bytes: int | None) -> None:
    """The same bytes and CRCs as through a matrix, each read and written once."""
    with mock.patch.object(relay, "BLOCK", block):
        case.check(case.engine(2, piece_bytes=piece_bytes).run())
    assert (_touched(case.sources, case.source) == 1).all()
    assert (_touched(case.targets, case.sink) == 1).all()


def test_what_is_relayed_needs_no_matrix() -> None:
    """Rows that change their place alone are; those that change their columns or values are not."""
    case = _big(64, 64)
    engine, whole = case.engine(), layout("out", "BF16", (64, 64), [[], []], case.rng)
    unit = case.units[0]
    assert engine.relay.stretches(unit, unit.entries[0], 0, 64) is None  # the target's columns are cut
    case.targets = [whole]
    for file, nbytes in sizes(case.targets).items():
        case.sink.add(file, np.full(nbytes, 0xAA, np.uint8))
    case.plan = plan_of(case.units, case.sources, case.targets)
    engine = case.engine()
    found = engine.relay.stretches(unit, unit.entries[0], 16, 48)
    assert found is not None and sum(stretch.nbytes for stretch in found) == 48 * 64 * 2
    assert engine.relay.stretches(replace(unit, shift=1), unit.entries[0], 0, 64) is None
    case.check(engine.run())


@settings(max_examples=40, deadline=None)
@given(cases, st.data())
def test_pieces_may_be_done_by_others(case: Case, data: st.DataObject) -> None:
    """Pieces that one engine did and another absorbs give the same CRCs as one engine that does all."""
    first = case.engine(2, piece_bytes=64)
    mine = set(data.draw(st.lists(st.sampled_from(range(len(first.pieces))), unique=True)))
    records: dict[int, list[int]] = {}
    first.work([p for p in first.pieces if p.number in mine], done=lambda n, crcs: records.update({n: list(crcs)}))
    case.sink.crcs.clear()
    second = case.engine(1, piece_bytes=64)
    assert second.absorb(records) == sum(first.pieces[n].nbytes for n in mine)
    second.work([p for p in second.pieces if p.number not in records])
    case.check(second.checksums())
    assert (_touched(case.targets, case.sink) == 1).all()


@settings(max_examples=20, deadline=None)
@given(cases)
def test_a_changed_value_is_noticed(case: Case) -> None:
    """The oracle and the CRC check do fail: one flipped exponent bit of one source element."""
    tensor = case.sources[0]
    chunk = tensor.chunks[0]
    case.source.files[chunk.file][chunk.start + TORCH_DTYPES[tensor.dtype].itemsize - 1] ^= 0x40
    with pytest.raises(AssertionError):
        case.check(case.engine().run())


def _big(rows: int, cols: int, *, transposed: bool = False) -> Case:
    """One source [rows, cols] of bf16 that one target takes in two halves exchanged."""
    case = object.__new__(Case)
    case.rng, case.source, case.sink = np.random.default_rng(0), Store(), Store()
    value = torch.from_numpy(case.rng.integers(0, 2**15, rows * cols, np.uint16).view(np.int16)).reshape(rows, cols)
    atoms = list(value.view(torch.bfloat16).chunk(2))
    source, target = Fused("in", (0, 1), 1), Fused("out", (1, 0), 1, transposed=transposed)
    case.sources = [store("in", "BF16", source.matrix(atoms), [[rows // 3], []], case.source, case.rng)]
    case.expected = {"out": target.matrix(atoms)}
    case.targets = [layout("out", "BF16", tuple(case.expected["out"].shape), [[rows // 5], [cols // 2]], case.rng)]
    for file, nbytes in sizes(case.targets).items():
        case.sink.add(file, np.full(nbytes, 0xAA, np.uint8))
    case.units = [unit_of("swap", atoms, [source], [target], fold=1, shift=0)]
    case.plan = plan_of(case.units, case.sources, case.targets)
    return case


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_memory_stays_within_the_limit(workers: int) -> None:
    """A 64 MB tensor moves within 16 MiB of allocations, numpy's included, for any number of workers."""
    case, limit = _big(1 << 12, 1 << 13), 16 * MIB
    engine = case.engine(workers, limit)
    tracemalloc.start()
    try:
        crcs = engine.run()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    case.check(crcs)
    assert engine.cutting.piece_bytes < peak <= limit


def test_any_number_of_workers_gives_the_same_bytes() -> None:
    results = []
    for workers in (1, 2, 3, 8):
        case = _big(600, 300)
        crcs = case.engine(workers, piece_bytes=4096).run()
        results.append((crcs, {file: data.tobytes() for file, data in case.sink.files.items()}))
    assert all(result == results[0] for result in results)


def test_a_transposed_unit_that_does_not_fit_is_refused_with_the_limit_it_needs() -> None:
    with pytest.raises(DeviceError, match="transposed and needs 11 MiB at once; 6 MiB") as caught:
        _big(1 << 10, 1 << 10, transposed=True).engine(1, 8 * MIB)
    assert caught.value.hint == "raise ‹max-memory› to 14MiB"
    case = _big(1 << 10, 1 << 10, transposed=True)
    case.check(case.engine(1, 14 * MIB).run())


@pytest.mark.parametrize("side", ["source", "sink"])
def test_a_failing_worker_stops_the_run_and_raises_its_error(side: str) -> None:
    case, calls = _big(2048, 64), 0

    def fail(file: str) -> None:
        nonlocal calls
        calls += 1
        if calls >= 3:
            raise StorageError(f"`{file}` broke")

    getattr(case, side).on_access = fail
    engine = case.engine(2, piece_bytes=1024)
    with pytest.raises(StorageError, match="broke"):
        engine.run()
    assert calls < len(engine.pieces) // 4, "the other worker went on"
    with pytest.raises(AssertionError, match="unwritten"):
        engine.checksums()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mbx-")]


def test_a_source_that_ends_early_is_an_error() -> None:
    case = _big(64, 64)
    file = case.sources[0].chunks[0].file
    case.source.files[file] = case.source.files[file][:-1]
    with pytest.raises(StorageError, match="ends before"):
        case.engine().run()


def test_a_source_with_a_hole_is_an_error() -> None:
    case = _big(64, 64)
    tensor = case.sources[0]
    case.plan = plan_of(case.units, [replace(tensor, chunks=tensor.chunks[:-1])], case.targets)
    with pytest.raises(StorageError, match="bytes of rows"):
        case.engine().run()


def test_a_plan_that_leaves_rows_unwritten_or_writes_them_twice_is_an_internal_error() -> None:
    case = _big(64, 64)
    case.plan = plan_of([], case.sources, case.targets)
    with pytest.raises(AssertionError, match="unwritten"):
        case.engine().run()
    case.plan = plan_of([*case.units, *case.units], case.sources, case.targets)
    with pytest.raises(AssertionError, match="twice"):
        case.engine().run()


def test_records_of_another_plan_are_refused() -> None:
    case = _big(64, 64)
    engine = case.engine()
    for records in ({len(engine.pieces): [0]}, {0: [0] * 99}, {-1: [0]}):
        with pytest.raises(StorageError, match="journal"):
            engine.absorb(records)


def test_empty_tensors_and_entries_without_moves() -> None:
    case = _big(64, 64)
    empty = layout("empty", "F32", (0, 4), [[], []], case.rng)
    zero = layout("zero", "F32", (3, 4), [[], []], case.rng)
    case.targets, case.sink = [empty, zero], Store()
    for file, nbytes in sizes(case.targets).items():
        case.sink.add(file, np.full(nbytes, 0xAA, np.uint8))
    units = [Unit(name, (), (Entry(name, ()),)) for name in ("zero", "empty")]
    case.plan = plan_of(units, [], case.targets)
    crcs = case.engine().run()
    assert crcs["empty"] == [0] and not content(zero, case.sink).any()
    check_crcs(zero, crcs["zero"], case.sink)


def test_the_gate_never_lets_more_through_than_it_holds() -> None:
    gate, held, peak, lock = MemoryGate(10), 0, 0, threading.Lock()

    def hold(amount: int) -> None:
        nonlocal held, peak
        for _ in range(50):
            taken = gate.acquire(amount)
            with lock:
                held += taken
                peak = max(peak, held)
            with lock:
                held -= taken
            gate.release(taken)

    threads = [threading.Thread(target=hold, args=(amount,)) for amount in (1, 3, 5, 7, 99)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert 5 < peak <= 10
