"""What flows into the products of a layer, seen by hooks as it runs.

This file imports torch when it is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from converters.codecs.calibration import Calibration, Vector
from converters.planning.calibrated import WEIGHT
from converters.rows.table import Row
from mbx.models.transformers.streamed import ExpertProducts, holds_experts, module_of

#: What the Megatron Core names of an expert's last products have in them.
_LAST = "linear_fc2."


def module_name(row: Row) -> str:
    """The module under which the inputs of a row's product are known."""
    return row.hf[0].removesuffix(WEIGHT)


def is_last(row: Row) -> bool:
    """Whether an expert's row is of the product that leaves it."""
    return _LAST in row.spec.param


@dataclass(slots=True)
class Inputs:
    """Largest magnitudes [channels], sums of magnitudes, and the tokens that were seen, by module.

    `samples` of each call's tokens are kept until they are cleared, evenly spaced.
    """

    samples: int = 0
    largest: dict[str, torch.Tensor] = field(default_factory=dict)
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    kept: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def add(self, name: str, given: torch.Tensor) -> None:
        """See what goes into a module: [..., channels]."""
        sizes = given.detach().float().abs().reshape(-1, given.shape[-1])
        if not len(sizes):
            return
        if self.samples:
            flat = given.detach().reshape(-1, given.shape[-1])
            self.kept.setdefault(name, []).append(flat[:: -(-len(flat) // self.samples)].float().cpu())
        largest, total = sizes.amax(0).cpu(), sizes.double().sum(0).cpu()
        self.largest[name] = torch.maximum(self.largest[name], largest) if name in self.largest else largest
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.tokens[name] = self.tokens.get(name, 0) + len(sizes)

    @contextmanager
    def watching(self, layer: nn.Module, products: Sequence[Row]) -> Iterator[None]:
        """See what flows into the `products` of a layer meanwhile."""
        with ExitStack() as stack:
            holders = [module for module in layer.modules() if holds_experts(module)]
            names: dict[tuple[bool, int], str] = {}
            for row in products:
                if row.expert is not None and holders:
                    names[is_last(row), row.expert] = module_name(row)
                else:
                    stack.callback(self._hook(module_of(layer, row), module_name(row)).remove)
            for holder in holders:
                stack.enter_context(ExpertProducts(holder, self._of_expert(names)))
            yield

    def _hook(self, module: nn.Module, name: str) -> Any:
        return module.register_forward_pre_hook(lambda _, given: self.add(name, given[0]))

    def _of_expert(self, names: Mapping[tuple[bool, int], str]) -> Callable[[bool, int, torch.Tensor], None]:
        def see(down: bool, expert: int, given: torch.Tensor) -> None:
            if (down, expert) in names:
                self.add(names[down, expert], given)

        return see

    def fill(self, products: Sequence[Row]) -> None:
        """Give experts that saw nothing what their like in the layer saw at most."""
        for row in products:
            if row.expert is None or module_name(row) in self.largest:
                continue
            alike = [module_name(one) for one in products if one.spec.param == row.spec.param]
            if seen := [self.largest[name] for name in alike if name in self.largest]:
                self.largest[module_name(row)] = torch.stack(seen).amax(0)

    def sample(self, name: str) -> torch.Tensor | None:
        """Tokens that went into a module: fp32 [tokens, channels]; None where none did."""
        return torch.cat(self.kept[name]) if name in self.kept else None

    def mean(self, names: Sequence[str]) -> Vector:
        """Mean magnitudes [channels] of all that went into some modules."""
        total = sum((self.sums[name] for name in names), torch.zeros(()))
        out: Vector = (total / sum(self.tokens[name] for name in names)).float().numpy()
        return out

    def found(self) -> Calibration:
        """Maxima and means of all that was seen."""
        means = {name: self.mean([name]) for name in self.sums}
        return Calibration({name: one.numpy() for name, one in self.largest.items()}, means)
