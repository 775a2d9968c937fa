"""How a linear is adapted: a method is asked to put itself on each linear that a recipe names.

The house's own is `LowRank`, which is LoRA and DoRA. Another is a class of a user's file (`mbx train --hooks FILE`): a
`LinearAdapter` that says its name, what it trains, and how a folder of PEFT has that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import nn

from converters.mcore.keys import HEAD
from mbx.train.lora.adapter import GROUPED_COLUMN, GROUPED_ROW, ROUTERS, Adapter, Slots
from mbx.train.lora.grouped import LoraGrouped
from mbx.train.lora.layer import LoraLinear
from mbx.train.lora.linear import LinearAdapter
from mbx.train.lora.output import LoraOutput
from mbx.train.lora.product import kind_of
from mbx.train.lora.router import LoraRouter
from mbx.train.recipe.sections import Lora

if TYPE_CHECKING:
    from mbx.models.megatron.core.config import TransformerConfig


@dataclass(frozen=True, slots=True)
class Site:
    """A linear that is to be adapted: `base`, the module, by its `name` in Megatron Core, with this rank's `weight`.

    `slots`: where its adapted parts lie on its rows. `seeds` draw what is random, one for each expert of a group.
    `expert`: of one expert, `ends`: nothing reads its output when a checkpointed layer is computed again.
    `vocabulary`: tokens that the model has.
    """

    base: nn.Module
    name: str
    weight: torch.Tensor
    lora: Lora
    slots: Slots
    config: TransformerConfig
    seeds: Sequence[int]
    expert: bool
    ends: bool
    vocabulary: int

    @property
    def leaf(self) -> str:
        """The last part of the name: `linear_fc2`."""
        return self.name.rpartition(".")[2]


class Method(Protocol):
    """Adapts linears; `names` are those of what it trains, without `lora_`."""

    names: tuple[str, ...]

    def attach(self, site: Site) -> Adapter:
        """What stands in the place of a linear; it holds the frozen base."""
        ...


class LowRank:
    """LoRA and DoRA, on every linear there is; `converters.adapters` has their spellings in folders."""

    names: tuple[str, ...] = ("a", "b", "m")

    def attach(self, site: Site) -> Adapter:
        """Factors on a linear; experts in a group, a router and the output layer have classes of their own."""
        given = (site.base, site.lora, site.slots, site.config)
        kind = kind_of(site.base)
        if kind in (*GROUPED_COLUMN, *GROUPED_ROW):
            return LoraGrouped(*given, site.seeds)
        if kind in ROUTERS:
            return LoraRouter(*given, site.seeds[0])
        if f"{site.name}.weight" == HEAD:
            return LoraOutput(*given, site.seeds[0], site.weight, site.vocabulary)
        adapter = LoraLinear(*given, site.seeds[0], site.expert)
        adapter.ends_checkpoint = site.ends and not site.expert and not hasattr(site.base, "behind")
        return adapter


LOW_RANK = LowRank()


@dataclass(frozen=True, slots=True)
class Trained:
    """What was trained on a module of Transformers: values by the method's names, each whole."""

    module: str
    values: Mapping[str, torch.Tensor]


class Tuned(LinearAdapter):
    """A method of a user's own: derive from it, say `method` and `names`, train in `__init__` what `add` is given, and
    compute in `adapted`.

    A value of a part's rows is added under a name and the part's key in `slots.names`, cut by `row_cut`; one of the
    linear's columns under the name alone, cut by `column_cut`.
    """

    method: ClassVar[str] = ""
    names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, site: Site) -> None:
        super().__init__(site.base, site.lora, site.slots, site.config)
        self.leaf = site.leaf

    @classmethod
    def attach(cls, site: Site) -> Adapter:
        """An instance in the linear's place."""
        return cls(site)

    @classmethod
    def export(cls, trained: Sequence[Trained], lora: Lora) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
        """adapter_config.json without the base's name, and tensors by PEFT's names."""
        raise NotImplementedError

    @property
    def column_cut(self) -> int | None:
        """The dimension by which values of the base's columns are cut over ranks."""
        return 0 if self.row_parallel else None

    def add_rows(self, name: str, fill: float) -> None:
        """Train a value for each adapted row, all `fill` at first; `over_rows` has them in the base's order."""
        for key, (_, size, _) in zip(self.slots.names, self.slots.places, strict=True):
            self.add(f"{name}{key}", self.weight.new_full((self.slots.groups * size,), fill), self.row_cut)

    def add_columns(self, name: str, fill: float) -> None:
        """Train a value for each column, all `fill` at first."""
        self.add(name, self.weight.new_full((self.weight.shape[1],), fill), self.column_cut)
