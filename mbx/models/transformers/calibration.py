"""What flows into a model's products, channel by channel: Transformers' own layers, one in memory at a time.

This file imports torch when it is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from converters.codecs.calibration import Calibration
from converters.planning.calibrated import WEIGHT
from converters.planning.fresh import is_product
from converters.rows.config_map import environment
from converters.rows.expr import Env
from converters.rows.table import Row, Table
from mbx.models.prompts import check_ids
from mbx.models.transformers.shallow import PartialTransformers
from mbx.models.transformers.streamed import (
    EXPERTS_DOWN,
    EXPERTS_UP,
    ExpertProducts,
    Flow,
    holds_experts,
    module_of,
    rows_by_layer,
)

#: Which of an expert's two products a row is of.
_OF_EXPERTS = {"linear_fc1": EXPERTS_UP, "linear_fc2": EXPERTS_DOWN}


def measure_inputs(
    folder: Path,
    table: Table,
    fields: Env,
    ids: torch.Tensor,
    *,
    rows_at_once: int = 8,
    device: str = "cpu",
    dtype: str = "float32",
    progress: Callable[[int], None] = lambda _: None,
) -> Calibration:
    """What flows into the products of the Hugging Face model in `folder`, of a `table` and Megatron Core `fields`.

    ids: [rows, tokens], of which `rows_at_once` go through a layer together. An expert that no token was sent to has
    the largest of what the layer's others have. `progress` is called with the number of layers that are done. Raises
    what `PartialTransformers` raises, UsageError for ids outside the vocabulary, and UnsupportedError where a module
    that a row names is not where the class has it.
    """
    parts = PartialTransformers(folder, getattr(torch, dtype))
    parts.config._experts_implementation = "eager"  # the one whose products are called expert by expert
    try:
        check_ids(ids, parts.vocab_size)
        rows = rows_by_layer(table, environment(fields), parts.weights.tensors)
        inputs = Inputs()
        with torch.no_grad():
            flow = Flow.of(parts, torch.split(ids, rows_at_once), device)
            for number, layer in flow.layers():
                products = [row for row in rows.get(number, ()) if is_product(row.mcore)]
                with inputs.watching(layer, products):
                    for _ in flow.through(layer, number):
                        pass
                inputs.fill(products)
                progress(1)
    finally:
        parts.close()
    return inputs.found()


def module_name(row: Row) -> str:
    """The module under which the inputs of a row's product are known."""
    return row.hf[0].removesuffix(WEIGHT)


@dataclass(slots=True)
class Inputs:
    """Largest magnitudes [channels], sums of magnitudes, and the tokens that were seen, by module."""

    largest: dict[str, torch.Tensor] = field(default_factory=dict)
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, given: torch.Tensor) -> None:
        """See what goes into a module: [..., channels]."""
        sizes = given.detach().float().abs().reshape(-1, given.shape[-1])
        if not len(sizes):
            return
        largest, total = sizes.amax(0).cpu(), sizes.double().sum(0).cpu()
        self.largest[name] = torch.maximum(self.largest[name], largest) if name in self.largest else largest
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.tokens[name] = self.tokens.get(name, 0) + len(sizes)

    @contextmanager
    def watching(self, layer: nn.Module, products: Sequence[Row]) -> Iterator[None]:
        """See what flows into the `products` of a layer meanwhile."""
        with ExitStack() as stack:
            holders = [module for module in layer.modules() if holds_experts(module)]
            names: dict[tuple[str, int], str] = {}
            for row in products:
                kind = next((kind for part, kind in _OF_EXPERTS.items() if f".{part}." in row.spec.param), None)
                if row.expert is not None and holders and kind is not None:
                    names[kind, row.expert] = module_name(row)
                else:
                    stack.callback(self._hook(module_of(layer, row), module_name(row)).remove)
            for holder in holders:
                stack.enter_context(ExpertProducts(holder, self._of_expert(names)))
            yield

    def _hook(self, module: nn.Module, name: str) -> Any:
        return module.register_forward_pre_hook(lambda _, given: self.add(name, given[0]))

    def _of_expert(self, names: Mapping[tuple[str, int], str]) -> Callable[[str, int, torch.Tensor], None]:
        def see(kind: str, expert: int, given: torch.Tensor) -> None:
            if (kind, expert) in names:
                self.add(names[kind, expert], given)

        return see

    def fill(self, products: Sequence[Row]) -> None:
        """Give experts that saw nothing what their like in the layer saw at most."""
        for row in products:
            if row.expert is None or module_name(row) in self.largest:
                continue
            alike = [module_name(one) for one in products if one.spec.param == row.spec.param]
            if seen := [self.largest[name] for name in alike if name in self.largest]:
                self.largest[module_name(row)] = torch.stack(seen).amax(0)

    def found(self) -> Calibration:
        """Maxima and means of all that was seen."""
        means = {name: (total / self.tokens[name]).float().numpy() for name, total in self.sums.items()}
        return Calibration({name: one.numpy() for name, one in self.largest.items()}, means)
