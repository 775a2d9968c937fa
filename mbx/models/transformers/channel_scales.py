"""Scales of channels under which a codec's rounding costs a product's output least, as in AWQ (arXiv:2306.00978).

A channel's scale is its mean input to the power of an α between 0 and 1, which a grid search chooses on the inputs
themselves. Whether a scale can stand where the table says so is tried before: with powers of two, by which every
product stays what it was to the bit, a layer has to compute what it computed.

This file imports torch when it is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from converters.codecs.calibration import Vector
from converters.codecs.fresh import Fresh
from converters.errors import UnsupportedError
from converters.planning.folds import Fold, folds_of
from converters.planning.fresh import is_product
from converters.pruning.kept import in_ranges
from converters.rows.expr import Env
from converters.rows.table import Row
from converters.tensors import StoredTensor
from converters.torch_casts import TORCH_DTYPES
from mbx.models.transformers.inputs import Inputs, is_last, module_name
from mbx.models.transformers.streamed import experts_parameter, holds_experts

#: Steps of α between 0 and 1.
_STEPS = 20
#: How far a layer's output may be from what it was, in parts of it: in fp32, and where a norm of 16 bits is rounded.
_NEAR, _NEAR_IN_16_BITS = 1e-5, 2**-5


@dataclass(slots=True)
class ChannelScales:
    """Chooses the scales for the codec `fresh`, layer by layer; `stored` are the folder's tensors.

    `found` are the scales by the tensor that makes the channels; `held` counts the folds that leave a layer what it
    was, `refused` says by kind and layer why others are left out.
    """

    fresh: Fresh
    fields: Env
    stored: Mapping[str, StoredTensor]
    found: dict[str, Vector] = field(default_factory=dict)
    held: int = 0
    refused: dict[str, dict[int, str]] = field(default_factory=dict)

    def choose(
        self, layer: nn.Module, number: int, rows: Sequence[Row], inputs: Inputs, output: Callable[[], torch.Tensor]
    ) -> None:
        """Choose the scales within a layer of `rows`, by its `inputs`; `output` runs it on some states."""
        held = _Held(layer, number, rows, self.stored)
        kinds: dict[str, list[Fold]] = {}
        for fold in folds_of(rows, self.fields):
            if any(self._takes(row, name) for row in fold.users for name in row.hf):
                kinds.setdefault(fold.kind, []).append(fold)
        before = output() if kinds else torch.empty(0)
        for kind, folds in kinds.items():
            if why := _in_the_way(held, folds, before, output):
                self.refused.setdefault(kind, {})[number] = why
                continue
            self.held += len(folds)
            for fold in folds:
                if (scale := self._best(held, fold, inputs)) is not None:
                    self.found[fold.name] = scale

    def explained(self) -> tuple[str, ...]:
        """Why kinds of scales are left out, in words."""
        return tuple(
            f"`{kind}` of layers {in_ranges(tuple(layers))} is not scaled: {next(iter(layers.values()))}"
            for kind, layers in self.refused.items()
        )

    def _takes(self, row: Row, name: str) -> bool:
        """Whether the codec takes a tensor of a row."""
        shape = self.stored[name].shape
        return is_product(row.mcore) and self.fresh.encoded(name, "F32", shape) is not None

    def _best(self, held: _Held, fold: Fold, inputs: Inputs) -> Vector | None:
        """The scale of least error; None where that is without any."""
        users = [(row, inputs.sample(module_name(row))) for row in fold.users]
        seen = [(row, given) for row, given in users if given is not None]
        if not seen:
            return None
        made = held.view(fold.name)
        mean = fold.gathered(inputs.mean([module_name(row) for row, _ in seen]), len(made))
        products = [
            (held.view(name).detach().float().cpu(), given)
            for row, given in seen
            for name in row.hf
            if self._takes(row, name)
        ]
        best, least = None, self._error(products, None, fold)
        for step in range(1, _STEPS):
            power = np.maximum(mean, 1e-4) ** np.float32(step / _STEPS)
            scale = (power / np.sqrt(power.max() * power.min())).astype(np.float32)
            if (error := self._error(products, scale, fold)) < least:
                best, least = scale, error
        return None if best is None else self._representable(made, best, fold)

    def _error(self, products: Sequence[tuple[torch.Tensor, torch.Tensor]], scale: Vector | None, fold: Fold) -> float:
        """Sum of squares of what rounding changes in the outputs of `products`, of a weight and inputs each."""
        codec, total = self.fresh.codec, 0.0
        for weight, given in products:
            factor = torch.ones(weight.shape[1])
            if scale is not None:
                factor = torch.from_numpy(fold.spread(scale, weight.shape[1]))
            rounded = codec.decode(codec.encode(weight * factor), dtype=torch.float32) / factor
            total += float(((rounded - weight) @ given.t()).double().square().sum())
        return total

    def _representable(self, made: torch.Tensor, scale: Vector, fold: Fold) -> Vector:
        """The scale next to `scale` that a norm's dtype, as it is stored, divides by without rounding."""
        if made.dim() > 1:
            return scale
        gamma = made.detach().float().cpu() + fold.offset
        dtype = TORCH_DTYPES[self.stored[fold.name].dtype]
        divided = (gamma / torch.from_numpy(scale) - fold.offset).to(dtype).float() + fold.offset
        exact = torch.where((gamma != 0) & (divided != 0), gamma / divided, torch.from_numpy(scale))
        out: Vector = exact.numpy()
        return out


@dataclass(slots=True)
class _Held:
    """The parameters of a layer in memory, by the names that a folder has them under."""

    layer: nn.Module
    number: int
    rows: Sequence[Row]
    stored: Mapping[str, StoredTensor]
    experts: nn.Module | None = field(init=False)
    by_name: dict[str, Row] = field(init=False)

    def __post_init__(self) -> None:
        self.experts = next((module for module in self.layer.modules() if holds_experts(module)), None)
        self.by_name = {name: row for row in self.rows for name in row.hf}

    def view(self, name: str) -> torch.Tensor:
        """A tensor's values, which are the layer's own; UnsupportedError where its class has none such."""
        row = self.by_name[name]
        whole = None if row.expert is None or self.experts is None else experts_parameter(self.experts, is_last(row))
        if whole is not None and row.expert is not None:
            found = whole[row.expert].chunk(len(row.hf))[row.hf.index(name)]
        else:
            try:
                found = self.layer.get_parameter(name.split(f".{self.number}.", 1)[-1])
            except AttributeError as error:
                raise UnsupportedError(
                    f"{type(self.layer).__name__} has no `{name}`, which would be scaled"
                ) from error
        if tuple(found.shape) != self.stored[name].shape:
            raise UnsupportedError(f"{type(self.layer).__name__} has `{name}` in another shape than it is stored in")
        return found

    @contextmanager
    def scaled(self, folds: Sequence[Fold], scale_of: Callable[[int], Vector]) -> Iterator[None]:
        """Scale channels meanwhile; `scale_of` gives as many scales as it is asked for."""
        names = {name for fold in folds for name in (*fold.divided, *(n for row in fold.users for n in row.hf))}
        before = {name: self.view(name).clone() for name in names}
        try:
            for fold in folds:
                scale = scale_of(len(self.view(fold.name)))
                for name in fold.divided:
                    values, offset = self.view(name), fold.offset if name == fold.name else 0
                    by = torch.from_numpy(scale).to(values).reshape(-1, *(1 for _ in values.shape[1:]))
                    values.copy_((values + offset) / by - offset)
                for name in (name for row in fold.users for name in row.hf):
                    values = self.view(name)
                    factor = torch.from_numpy(fold.spread(scale, values.shape[1]))
                    if len(factor) != values.shape[1]:
                        raise UnsupportedError(f"`{name}` takes {values.shape[1]} channels, not {len(factor)}")
                    values.mul_(factor.to(values))
            yield
        finally:
            for name, values in before.items():
                self.view(name).copy_(values)


def _powers(count: int) -> Vector:
    """Halves and twos, in no order that heads or halves have."""
    return np.where(np.random.default_rng(count).random(count) < 0.5, 0.5, 2).astype(np.float32)


def _in_the_way(held: _Held, folds: Sequence[Fold], before: torch.Tensor, output: Callable[[], torch.Tensor]) -> str:
    """Why the channels of `folds` cannot be scaled; empty where a layer computes what it did before."""
    try:
        with held.scaled(folds, _powers):
            after = output()
    except UnsupportedError as error:
        return error.fact
    near = _NEAR if before.dtype == torch.float32 else _NEAR_IN_16_BITS
    apart = (after.float() - before.float()).norm() / before.float().norm().clamp(min=1e-30)
    return "" if apart <= near else f"then a layer computes otherwise, by {float(apart):.2g} of its output"
