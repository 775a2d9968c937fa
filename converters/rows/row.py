"""Rows of a table: as it writes them, where they repeat, and one at a layer and expert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

#: The `state` of a row whose module has no `_extra_state`, though its name says so: a norm of a tool's own class.
NO_STATE = "none"


@dataclass(frozen=True, slots=True)
class RowSpec:
    """One row as the table writes it; names are relative to the site and may hold `{L}`, `{I}`, `{E}`.

    `param` names one parameter, or of an op with one an atom several, ` + ` between them.

    `shift` is added to values on the way to Megatron Core. `dtype` is what Megatron Core stores whatever the source
    has; `keep_dtype` exempts the row from a requested cast. `same_as` names the Hugging Face tensor this one repeats;
    `drop` marks one that Megatron Core has no place for; where it is no buffer but a part of the model, it is also
    `beside`. `state` marks a module of Megatron Core's own that has an
    `_extra_state` where its name does not say so, or has none where it does (`NO_STATE`). `unsqueeze` marks a Hugging
    Face tensor with a first dimension of 1 before the parameter's own. `last` are sizes of last dimensions of Hugging
    Face tensors, which tell spellings under one name apart.
    """

    param: str
    op: str
    hf: tuple[str, ...]
    transpose: bool = False
    unsqueeze: bool = False
    shift: int = 0
    dtype: str | None = None
    keep_dtype: bool = False
    when: str | None = None
    optional: bool = False
    same_as: str | None = None
    drop: bool = False
    beside: bool = False
    state: bool | str = False
    last: Mapping[str, str | int] = field(default_factory=dict)

    @property
    def params(self) -> tuple[str, ...]:
        """The parameters of the row."""
        return tuple(self.param.split(" + "))

    @property
    def stacked(self) -> bool:
        """Whether one Hugging Face tensor holds all experts, the expert being its first dimension."""
        return "{E}" in self.param and not any("{E}" in name for name in self.hf)


@dataclass(frozen=True, slots=True)
class Site:
    """A place where blocks of rows repeat: `n` times, or once for each entry of a list, from layer `first` on.

    An `optional` one exists where the checkpoint holds any tensor below its prefix, and then whole. A `kept` one is a
    module that Megatron holds as it is: each tensor below one prefix is the same below the other. A native one belongs
    to the `part` whose config fields begin so. One with `when` is at the layers of the `n` where that holds alone, and
    these are a stack of their own where layers are stacked. An `outer` one of a text model stands outside of what a
    model around it calls that.
    """

    name: str
    hf: str
    mcore: str
    first: str | int
    n: str | int
    blocks: tuple[str, ...]
    optional: bool = False
    kept: bool = False
    part: str = ""
    when: str = ""
    outer: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A row at one layer and expert: names are final on the Hugging Face side.

    `site` and `spec.param` spell the Megatron Core parameter; `index` is its number within the site's
    stack and `expert` its expert, both None where the parameter has none. `count` are the entries of that stack where
    it is not all layers of the decoder, else None. `kept` and `part` are the site's, `kind` the layer's own.
    """

    spec: RowSpec
    site: str
    index: int | None
    layer: int | None
    expert: int | None
    hf: tuple[str, ...]
    same_as: str | None = None
    count: int | None = None
    kept: bool = False
    part: str = ""
    kind: str = ""

    @property
    def mcore(self) -> str:
        """Canonical Megatron Core name: global layer numbers, TE module names, expert behind the name."""
        name = self.site + self.spec.param
        if self.index is not None:
            name = name.replace("{I}", str(self.index)).replace("{L}", str(self.layer))
        return name if self.expert is None else name.replace("{E}", str(self.expert))
