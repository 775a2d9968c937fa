"""The two sides of a table's row, joined once: which entries of which tensors hold its atoms, and in which rows.

An import knows the Hugging Face tensors, an export the Megatron Core ones, a pairing two sets of Hugging Face ones.
The sizes of either side give the form of the row's op, and the form gives both sides.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from converters.engine.plan import STORABLE, Entry, row_form
from converters.engine.regions import Move, Region, matrix
from converters.errors import CoverageError
from converters.mcore.torch_dist import Home, homes, stacks_layers
from converters.rows.config_map import environment, part_of
from converters.rows.expr import Env, Value
from converters.rows.ops import ACROSS, Dims, Form
from converters.rows.pack import Slot
from converters.rows.table import Row, Table
from converters.tensors import Shape, StoredTensor

#: The op of rows whose Hugging Face tensor may have more rows, of zeros, than the parameter.
PADDED = "unpadded"


@dataclass(frozen=True, slots=True)
class Place:
    """One entry of a tensor that holds atoms of a row: `slots` are their rows.

    `index` picks the entry in leading dimensions `stack`; `shape` is the entry's own as it is stored, padding aside.
    """

    tensor: str
    index: Shape
    stack: Shape
    shape: Shape
    slots: Mapping[int, Slot]
    transposed: bool = False
    fold: int = 1

    @property
    def rows(self) -> int:
        """Rows of the entry's matrix."""
        return sum(slot.held for slot in self.slots.values()) // self.fold

    @property
    def entry(self) -> Entry:
        """What a unit fills that makes all of these atoms."""
        return Entry(self.tensor, self.index, self.fold)

    def region(self, atom: int) -> Region:
        """Where an atom lies."""
        return Region(self.tensor, self.index, self.slots[atom], self.transposed, self.fold)


@dataclass(frozen=True, slots=True)
class Joined:
    """A row with both its sides; `shape` is that of the whole parameter, all atoms packed."""

    row: Row
    form: Form
    shape: Shape
    hf: tuple[Place, ...]
    mcore: tuple[Place, ...]


def moves(sources: Iterable[Place], targets: Iterable[Place]) -> tuple[Move, ...]:
    """Every atom of `targets`, from where `sources` keep it."""
    held = {atom: place.region(atom) for place in sources for atom in place.slots}
    return tuple(Move(held[atom], place.region(atom)) for place in targets for atom in place.slots)


def one_dtype(row: Row, tensors: Iterable[StoredTensor]) -> str:
    """The dtype of a row's tensors on one side; CoverageError where they have several."""
    held = tuple(tensors)
    dtypes = {tensor.dtype for tensor in held}
    if len(dtypes) > 1:
        for tensor in held:
            if tensor.dtype not in STORABLE:
                raise without_scales(tensor.name, tensor.dtype)
        names = ", ".join(dict.fromkeys(tensor.name for tensor in held))
        raise CoverageError(f"`{row.mcore}`: {names} have different dtypes: {', '.join(sorted(dtypes))}")
    return dtypes.pop()


def without_scales(name: str, dtype: str) -> CoverageError:
    """What to say of codes that no codec took."""
    return CoverageError(
        f"`{name}` is stored as {dtype}, and its scales are not beside it",
        hint="quantised tensors need `quantization_config` in config.json and all parts: download the folder again",
    )


@dataclass(frozen=True, slots=True)
class Joiner:
    """Joins the rows of a table at one config; `stacked` says that decoder layers lie in one tensor each.

    `parts` are the fields and dims of each part of the model and each kind of layer that has its own; `env` and `dims`
    are the text's.
    """

    table: Table
    env: Env
    dims: Dims
    layers: int
    experts: int
    stacked: bool
    parts: Mapping[str, tuple[Env, Dims]] = field(default_factory=dict)

    @classmethod
    def at(cls, table: Table, config: Mapping[str, Value]) -> Joiner:
        """The joiner at a Megatron Core config."""
        env = environment(config)
        counts = table.num_layers(env), table.num_experts(env)
        fields = {part: part_of(env, part) for part in table.parts()}
        parts: dict[str, tuple[Env, Dims]]
        parts = {part: (own, table.dims_at(own, of_part=True)) for part, own in fields.items()}
        for kinds in (some for count in range(len(table.kinds)) for some in combinations(table.kinds, count + 1)):
            seen = table.seen_by("+".join(kinds), env)
            parts["+".join(kinds)] = seen, table.dims_at(seen)
        return cls(table, env, table.dims_at(env), *counts, stacks_layers(table.family, config), parts)

    def fields_of(self, row: Row) -> Env:
        """The config fields of the part or the kind of layer that a row belongs to; none of a kept module's."""
        return {} if row.kept else self.at_row(row)[0]

    def at_row(self, row: Row) -> tuple[Env, Dims]:
        """The fields and dims that a row sees."""
        own = row.part or row.kind
        return self.parts[own] if own else (self.env, self.dims)

    def homes(self, row: Row, held: Collection[str] | None = None) -> tuple[Home, ...]:
        """Megatron Core keys of a row: stacked or a layer each, whichever all stand in `held`, else as is usual."""
        stacked = self.stacked or bool(row.part)
        usual = homes(row, stacked, self.layers, self.experts)
        if held is None or all(home.key in held for home in usual):
            return usual
        other = homes(row, not stacked, self.layers, self.experts)
        return other if all(home.key in held for home in other) else usual

    def join(self, row: Row, rows: int, columns: Shape | None = (), keys: Sequence[Home] | None = None) -> Joined:
        """The sides of a parameter of `rows` rows of the shape `columns`, None for one without dimensions.

        `keys` are its Megatron Core ones, by default those that are usual.
        """
        form = row_form(row, self.at_row(row)[1], rows)
        fold = 2 if form.columns else 1
        across = row.spec.op in ACROSS
        flipped = row.spec.transpose or across

        def shaped(rows: int) -> Shape:
            return () if columns is None else (rows // fold, *columns)

        packed = form.mcore_pack()
        index, stack = self._before(row)
        hf = tuple(
            Place(
                name,
                index,
                stack,
                shaped(pack.rows)[:: -1 if flipped else 1],
                dict(zip(members, pack.slots(), strict=True)),
                flipped,
                fold,
            )
            for name, pack, (_, members) in zip(row.hf, form.hf_packs(), form.hf, strict=True)
        )
        every = dict(zip(form.order(), packed.slots(), strict=True))
        mcore = []
        for home in self.homes(row) if keys is None else keys:
            slots = every if home.atoms is None else {atom: Slot.whole(form.atoms[atom]) for atom in home.atoms}
            shape = shaped(sum(slot.rows for slot in slots.values()))[:: -1 if across else 1]
            mcore.append(Place(home.key, home.index, home.stack, shape, slots, across, fold))
        return Joined(row, form, shaped(packed.rows), hf, tuple(mcore))

    def from_hf(self, row: Row, tensors: Sequence[StoredTensor]) -> Joined:
        """The sides of a row by its Hugging Face tensors; CoverageError where these do not fit each other."""
        shapes = [self._logical(row, tensor) for tensor in tensors]
        columns = shapes[0][1:]
        if any(shape[1:] != columns for shape in shapes):
            raise CoverageError(f"`{row.mcore}`: {', '.join(row.hf)} differ behind the first dimension: {shapes}")
        rows = [shape[0] if shape else 1 for shape in shapes]
        joined = self.join(row, sum(rows), columns if shapes[0] else None)
        for tensor, got, place in zip(tensors, rows, joined.hf, strict=True):
            if got < place.rows or got > place.rows and row.spec.op != PADDED:
                raise _unexpected(row, tensor, place.rows)
        return joined

    def _before(self, row: Row) -> tuple[Shape, Shape]:
        """Which entry of a row's Hugging Face tensors it is, in which leading dimensions."""
        if row.spec.stacked and row.expert is not None:
            return (row.expert,), (self.experts,)
        return ((0,), (1,)) if row.spec.unsqueeze else ((), ())

    def _logical(self, row: Row, tensor: StoredTensor) -> Shape:
        """Rows and columns of one entry, rows being columns where the row's are the other way round."""
        shape, (_, stack) = tensor.shape, self._before(row)
        if stack:
            if shape[:1] != stack:
                what = ", one entry an expert" if row.spec.stacked else ""
                raise CoverageError(
                    f"`{tensor.name}` has shape {list(shape)}; its first dimension should be {stack[0]}{what}"
                )
            shape = shape[1:]
        if row.spec.transpose or row.spec.op in ACROSS:
            if len(shape) != 2:
                raise CoverageError(f"`{tensor.name}` has shape {list(tensor.shape)}; a matrix was expected")
            shape = shape[::-1]
        return shape

    def from_mcore(self, row: Row, keys: Sequence[Home], tensors: Sequence[StoredTensor]) -> Joined:
        """The sides of a row by its Megatron Core tensors, of which a vocabulary's may have rows of padding."""
        for home, tensor in zip(keys, tensors, strict=True):
            if tensor.shape[: len(home.stack)] != home.stack:
                raise CoverageError(
                    f"`{home.key}` has shape {list(tensor.shape)}; the config asks for a stack of {list(home.stack)}"
                )
        owns = [tensor.shape[len(home.stack) :] for home, tensor in zip(keys, tensors, strict=True)]
        if row.spec.op in ACROSS:
            owns = [own[::-1] for own in owns]
        if any(own[1:] != owns[0][1:] for own in owns):
            raise CoverageError(f"`{row.mcore}`: shapes {[t.shape for t in tensors]} do not stand side by side")
        own = owns[0]
        rows = sum(matrix(shape, 0)[0] for shape in owns)
        joined = self.join(row, rows, own[1:] if own else None, keys)
        wanted = sum(place.rows for place in joined.mcore)
        if rows < wanted or (rows > wanted and row.spec.op != "vocab"):
            raise _unexpected(row, tensors[0], wanted)
        if len(keys) > 1:  # parameters that together have the right size may each have another's
            for tensor, shape, place in zip(tensors, owns, joined.mcore, strict=True):
                if matrix(shape, 0)[0] != place.rows:
                    raise _unexpected(row, tensor, place.rows)
        return joined


def _unexpected(row: Row, tensor: StoredTensor, rows: int) -> CoverageError:
    return CoverageError(
        f"`{tensor.name}` has shape {list(tensor.shape)}; {rows} rows were expected "
        f"for `{row.mcore}` (op {row.spec.op})"
    )
