"""A parallel layout: which box of each parameter a tensor-parallel rank holds, and what does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from converters.errors import LayoutError
from converters.expr import Value
from converters.ops import Form


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of the parallel axes; `vocab_divisor` is Megatron's make-vocab-size-divisible-by."""

    tp: int = 1
    pp: int = 1
    vocab_divisor: int = 1

    def padded_vocab(self, vocab: int) -> int:
        """Rows of the embedding: `vocab` rounded up to a multiple of `vocab_divisor * tp`."""
        multiple = self.vocab_divisor * self.tp
        return -(-vocab // multiple) * multiple


@dataclass(frozen=True, slots=True)
class Box:
    """Rows `[row, row + rows)` and columns `[col, col + cols)` of a parameter seen as a matrix, on `rank`."""

    rank: int
    row: int
    rows: int
    col: int
    cols: int


def check(layout: Layout, config: Mapping[str, Value]) -> None:
    """Refuse a layout that the model of `config` cannot take; LayoutError lists every reason."""
    reasons = []
    for name, size in (("tp", layout.tp), ("pp", layout.pp), ("make-vocab-size-divisible-by", layout.vocab_divisor)):
        if size < 1:
            reasons.append(f"--{name} {size}: must be at least 1")
    if not reasons:
        layers = config.get("num_layers")
        if isinstance(layers, int) and layers % layout.pp:
            reasons.append(f"--pp {layout.pp} does not divide num_layers = {layers}{_nearest(layers, layout.pp, 'pp')}")
        for field in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
            size = config.get(field)
            if isinstance(size, int) and size % layout.tp:
                reasons.append(f"--tp {layout.tp} does not divide {field} = {size}{_nearest(size, layout.tp, 'tp')}")
    if reasons:
        raise LayoutError(f"this layout does not fit the model: {reasons[0]}", details=reasons)


def _nearest(size: int, asked: int, name: str) -> str:
    fits = [n for n in range(1, size + 1) if size % n == 0]
    return f"; the nearest that does is --{name} {min(fits, key=lambda n: (abs(n - asked), n))}"


def boxes(name: str, form: Form, rows: int, cols: int, tp: int) -> Iterator[Box]:
    """Boxes in which `tp` ranks hold a parameter of `rows` (padding included) by `cols`.

    Atoms that lie side by side are cut one by one, as Megatron Core's own shards are; grouped atoms are cut
    between groups. LayoutError where tp divides neither.
    """
    if form.cut is None:
        yield Box(0, 0, rows, 0, cols)
        return
    if form.cut == 1:
        for rank in range(tp):
            yield Box(rank, 0, rows, rank * _cut(name, cols, tp, "columns"), _cut(name, cols, tp, "columns"))
        return
    if form.mcore_groups > 1 and not form.columns:
        _cut(name, form.mcore_groups, tp, "groups")
    whole = form.mcore_groups > 1 or len(form.atoms) == 1
    row = 0
    for size in (rows,) if whole else (form.atoms[i] for i in form.order()):
        part = _cut(name, size, tp, "rows")
        for rank in range(tp):
            yield Box(rank, row + rank * part, part, 0, cols)
        row += size


def _cut(name: str, size: int, tp: int, what: str) -> int:
    if size % tp:
        raise LayoutError(f"--tp {tp} does not divide the {size} {what} of `{name}`{_nearest(size, tp, 'tp')}")
    return size // tp
