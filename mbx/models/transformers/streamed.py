"""A model's layers in Transformers' own arithmetic, one in memory at a time: all tokens pass a layer before the next.

Measures of activations are taken on it.

This file imports torch when it is imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from converters.errors import UnsupportedError
from converters.rows.expr import Env
from converters.rows.table import Row, Table
from mbx.models.transformers.shallow import PartialTransformers, left_out

_PRODUCTS = (nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
#: Parameters of a module that is all experts of a layer: of an expert's first product, gated or not, and its second.
EXPERTS_UP, EXPERTS_DOWN = ("gate_up_proj", "up_proj"), "down_proj"

Call = tuple[Sequence[Any], Mapping[str, Any]]


@dataclass(slots=True)
class Flow:
    """Batches on their way through a model of `parts`: `states` are what reaches the next layer, on the CPU.

    `calls` are what else each layer is given, by layer and batch; `norm` stands behind the last.
    """

    parts: PartialTransformers
    states: list[torch.Tensor]
    calls: list[list[Call]]
    norm: nn.Module
    device: str

    @classmethod
    def of(cls, parts: PartialTransformers, batches: Sequence[torch.Tensor], device: str) -> Flow:
        """`batches` of token ids in front of the first layer."""
        return cls(parts, *_embedded(parts, batches, device), device)

    def layers(self) -> Iterator[tuple[int, nn.Module]]:
        """Each layer with its number, for as long as the caller has it; the batches go through by `through`."""
        for number in range(len(self.calls)):
            yield number, self.parts.layer(number).to(self.device)

    def output(self, layer: nn.Module, number: int, at: int, states: torch.Tensor) -> torch.Tensor:
        """What layer `number` makes of `states`, the batch `at` or its like."""
        arguments, keywords = self.calls[number][at]
        found = layer(states, *arguments, **keywords)
        after: torch.Tensor = found[0] if isinstance(found, tuple) else found
        return after

    def through(self, layer: nn.Module, number: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Take every batch through layer `number`; yields what goes in and what comes out."""
        for at, kept in enumerate(self.states):
            before = kept.to(self.device)
            after = self.output(layer, number, at, before)
            self.states[at] = after.cpu()
            yield before, after


def _embedded(
    parts: PartialTransformers, batches: Sequence[torch.Tensor], device: str
) -> tuple[list[torch.Tensor], list[list[Call]], nn.Module]:
    """What reaches the first layer, what else each layer is given, and the last norm: the model run without layers.

    Masks and rotary tables are what the model's own forward makes; they depend on no hidden state.
    """
    tokens = torch.unique(torch.cat([batch.flatten() for batch in batches]))
    frame: Any = parts.frame(tokens.tolist()).to(torch.device(device))  # type: ignore[arg-type]
    states: list[torch.Tensor] = []
    calls: list[list[Call]] = []

    def passing(number: int) -> Callable[..., torch.Tensor]:
        def run(hidden: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
            if number == 0:
                states.append(hidden.cpu())
            call = (arguments, keywords)
            before = calls[number][-1:]
            calls[number] += before if before and _alike(before[0], call) else [call]
            return hidden

        return run

    for number, stand_in in left_out(frame, parts.layers_path):
        calls.append([])
        stand_in.__dict__["run"] = passing(number)
    for batch in batches:
        try:
            frame(torch.searchsorted(tokens, batch).to(device), use_cache=False)
        except (ValueError, TypeError, IndexError) as error:  # its layers return more than a hidden state
            raise UnsupportedError(f"layers of {type(frame).__name__} do not run one by one: {error}") from error
    around = frame.get_submodule(parts.layers_path.rpartition(".")[0])
    norms = [child for name, child in around.named_children() if name.endswith(("norm", "norm_f", "ln_f"))]
    if len(norms) != 1:
        raise UnsupportedError(f"{type(around).__name__} has {len(norms)} norms behind its layers; one was expected")
    return states, calls, norms[0]


def _alike(one: object, other: object) -> bool:
    """Whether two calls give a layer the same: batches share one mask, which is large, and one is kept."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_alike, one, other))
    return one is other or (isinstance(one, bool | int | float | str) and one == other)


def rows_by_layer(table: Table, env: Env, names: Mapping[str, object]) -> dict[int, list[Row]]:
    """Rows of decoder layers by number."""
    out: dict[int, list[Row]] = {}
    for row in table.expand(env, names):
        if row.layer is not None and not row.spec.drop and "mtp." not in row.site:
            out.setdefault(row.layer, []).append(row)
    return out


def module_of(layer: nn.Module, row: Row) -> nn.Module:
    """The module of a decoder layer that holds a row's weight; UnsupportedError where the class has none there."""
    path = row.hf[0].split(f".{row.layer}.", 1)[-1].rpartition(".")[0]
    try:
        return layer.get_submodule(path)
    except AttributeError as error:
        raise UnsupportedError(
            f"{type(layer).__name__} has no module `{path}`, whose input would be measured"
        ) from error


def holds_experts(module: nn.Module) -> bool:
    """Whether a module is all experts of a layer, called with states, the experts of each token and their weights."""
    down = getattr(module, "down_proj", None)
    takes = len(inspect.signature(module.forward).parameters)
    return isinstance(down, nn.Parameter) and down.dim() == 3 and takes >= 3


def experts_parameter(module: nn.Module, down: bool) -> nn.Parameter | None:
    """The matrices of all experts' last products, or of their first; None where the module has none of the name."""
    names = (EXPERTS_DOWN,) if down else EXPERTS_UP
    return next((one for name in names if isinstance(one := getattr(module, name, None), nn.Parameter)), None)


class ExpertProducts(TorchFunctionMode):
    """Sees the products of each expert of a module, whatever the gate between them is.

    `see` is called with whether it is the last, the number of the expert and the input [tokens, channels].
    """

    def __init__(self, module: nn.Module, see: Callable[[bool, int, torch.Tensor], None]) -> None:
        super().__init__()
        self.held = {down: held for down in (False, True) if (held := experts_parameter(module, down)) is not None}
        self.see = see

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func`; where it is a product with one of the experts' matrices, show its input."""
        if func in _PRODUCTS and len(args) > 1:
            place = args[1].untyped_storage().data_ptr()
            for down, held in self.held.items():
                if place == held.untyped_storage().data_ptr():
                    self.see(down, args[1].storage_offset() // held.stride(0), args[0])
        return func(*args, **(kwargs or {}))
