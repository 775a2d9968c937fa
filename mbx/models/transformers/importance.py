"""How much each part of a model matters, by what flows through it: Transformers' own layers, one in memory at a time.

The measures are those of Minitron (https://arxiv.org/abs/2407.14679), means over all tokens:

- a layer: how far it turns the residual stream, 1 - cos(in, out)
- a channel of the residual stream: |output| of the norms that it goes through, summed over them
- a channel of an MLP: |input| of the product that leaves it; of an expert's, of the tokens that are sent there
- a head: the Euclidean norm of its output
- an expert: the weight that the router gives it

This file imports torch when it is imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from converters.errors import UnsupportedError
from converters.pruning.choosing import Importance
from converters.pruning.kept import Spot
from converters.rows.config_map import environment
from converters.rows.expr import Env
from converters.rows.shapes import EXPECTED
from converters.rows.table import Row, Table
from mbx.models.prompts import check_ids
from mbx.models.transformers.shallow import PartialTransformers, left_out

#: Products whose inputs are the channels of a width.
_CHANNELS = {
    "mlp.linear_fc2.weight": "ffn_hidden_size",
    "mlp.shared_experts.linear_fc2.weight": "moe_shared_expert_intermediate_size",
}
_HEADS = "self_attention.linear_proj.weight"
_PRODUCTS = (nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


def measure_importance(
    folder: Path,
    table: Table,
    fields: Env,
    ids: torch.Tensor,
    *,
    rows_at_once: int = 8,
    device: str = "cpu",
    dtype: str = "float32",
    progress: Callable[[int], None] = lambda _: None,
) -> Importance:
    """Importance of the parts of the Hugging Face model in `folder`, of a `table` and Megatron Core `fields`.

    ids: [rows, tokens], of which `rows_at_once` go through a layer together. `progress` is called with the number of
    layers that are done. Raises what `PartialTransformers` raises, UsageError for ids outside the vocabulary, and
    UnsupportedError where a module that a row names is not where the class has it.
    """
    parts = PartialTransformers(folder, getattr(torch, dtype))
    parts.config._experts_implementation = "eager"  # the one whose products are called expert by expert
    try:
        check_ids(ids, parts.vocab_size)
        tally = _Tally(_by_layer(table, environment(fields), parts.weights.tensors), fields, ids.numel())
        with torch.no_grad():
            states, calls, norm = _embedded(parts, torch.split(ids, rows_at_once), device)
            turned = []
            for number in range(len(calls)):
                with tally.watching(parts.layer(number).to(device), number) as layer:
                    turn = 0.0
                    for at, (arguments, keywords) in enumerate(calls[number]):
                        before = states[at].to(device)
                        output = layer(before, *arguments, **keywords)
                        after = output[0] if isinstance(output, tuple) else output
                        similar = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
                        turn += float((1 - similar).double().sum())
                        states[at] = after.cpu()
                turned.append(turn / ids.numel())
                progress(1)
            for part in states:
                tally.add("hidden_size", (None, None), norm(part.to(device)))
    finally:
        parts.close()
    return Importance(torch.tensor(turned).double().numpy(), tally.widths())


Call = tuple[Sequence[Any], Mapping[str, Any]]


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


def _by_layer(table: Table, env: Env, names: Mapping[str, object]) -> dict[int, list[Row]]:
    """Rows of decoder layers by number."""
    out: dict[int, list[Row]] = {}
    for row in table.expand(env, names):
        if row.layer is not None and row.expert is None and not row.spec.drop and "mtp." not in row.site:
            out.setdefault(row.layer, []).append(row)
    return out


@dataclass(slots=True)
class _Tally:
    """Sums what flows through the modules of a layer that is watched; `tokens` are all that do."""

    rows: Mapping[int, Sequence[Row]]
    fields: Env
    tokens: int
    sums: dict[str, dict[Spot, torch.Tensor]] = field(default_factory=dict)

    def widths(self) -> dict[str, dict[Spot, Any]]:
        """Means over all tokens, by field and spot."""
        return {
            name: {spot: (total / self.tokens).numpy() for spot, total in found.items()}
            for name, found in self.sums.items()
        }

    def add(self, width: str, spot: Spot, values: torch.Tensor, count: int | None = None) -> None:
        """Add |values|: [..., parts]; of `count` parts where each is several values, their Euclidean norm."""
        values = values.detach().float()
        values = values.abs() if count is None else values.reshape(*values.shape[:-1], count, -1).norm(dim=-1)
        self.sum(width, spot, values.reshape(-1, values.shape[-1]).double().sum(0))

    def sum(self, width: str, spot: Spot, total: torch.Tensor) -> None:
        """Add totals: [parts]."""
        found = self.sums.setdefault(width, {})
        found[spot] = found[spot] + total.cpu() if spot in found else total.cpu()

    @contextmanager
    def watching(self, layer: nn.Module, number: int) -> Iterator[nn.Module]:
        """`layer`, while what flows through its parts is summed."""
        with ExitStack() as stack:
            for row in self.rows.get(number, ()):
                for handle in self._hooks(layer, row, number):
                    stack.callback(handle.remove)
            for module in layer.modules():
                if _holds_experts(module):
                    hook = module.register_forward_pre_hook(self._routing(number), with_kwargs=True)
                    stack.callback(hook.remove)
                    stack.enter_context(_ExpertInputs(module, number, self))
            yield layer

    def _hooks(self, layer: nn.Module, row: Row, number: int) -> Iterator[Any]:
        if row.spec.param == _HEADS:
            heads = self.fields["num_attention_heads"]
            assert isinstance(heads, int)
            yield self._input(_module(layer, row), "num_attention_heads", number, heads)
        elif (width := _CHANNELS.get(row.spec.param)) is not None:
            yield self._input(_module(layer, row), width, number)
        elif row.spec.op == "norm" and EXPECTED.get(row.spec.param) == EXPECTED["decoder.final_layernorm.weight"]:
            yield _module(layer, row).register_forward_hook(self._normed)

    def _normed(self, module: nn.Module, given: object, output: torch.Tensor) -> None:
        self.add("hidden_size", (None, None), output)

    def _input(self, module: nn.Module, width: str, number: int, count: int | None = None) -> Any:
        return module.register_forward_pre_hook(lambda _, given: self.add(width, (number, None), given[0], count))

    def _routing(self, number: int) -> Callable[..., None]:
        experts = self.fields["num_moe_experts"]
        assert isinstance(experts, int)

        def hook(module: nn.Module, given: Sequence[Any], named: Mapping[str, Any]) -> None:
            chosen, weights = [*given, *named.values()][1:3]
            total = torch.zeros(experts, dtype=torch.float64)
            total.index_add_(0, chosen.flatten().cpu(), weights.detach().double().flatten().cpu())
            self.sum("num_moe_experts", (number, None), total)

        return hook


def _module(layer: nn.Module, row: Row) -> nn.Module:
    """The module of a decoder layer that holds a row's weight; UnsupportedError where the class has none there."""
    path = row.hf[0].split(f".{row.layer}.", 1)[-1].rpartition(".")[0]
    try:
        return layer.get_submodule(path)
    except AttributeError as error:
        raise UnsupportedError(
            f"{type(layer).__name__} has no module `{path}`, whose input would be measured"
        ) from error


def _holds_experts(module: nn.Module) -> bool:
    """Whether a module is all experts of a layer, called with states, the experts of each token and their weights."""
    down = getattr(module, "down_proj", None)
    takes = len(inspect.signature(module.forward).parameters)
    return isinstance(down, nn.Parameter) and down.dim() == 3 and takes >= 3


class _ExpertInputs(TorchFunctionMode):
    """Sees the inputs of each expert's last product, whatever the gate before it is, and adds them to a tally."""

    def __init__(self, module: nn.Module, number: int, tally: _Tally) -> None:
        super().__init__()
        self.down, self.number, self.tally = module.get_parameter("down_proj"), number, tally
        width = tally.fields["moe_ffn_hidden_size"]
        assert isinstance(width, int)
        for expert in range(len(self.down)):
            tally.sum("moe_ffn_hidden_size", (number, expert), torch.zeros(width, dtype=torch.float64))

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func`; where it is a product with one of the experts' matrices, add its input."""
        if func in _PRODUCTS and len(args) > 1 and args[1].untyped_storage().data_ptr() == self._place:
            expert = args[1].storage_offset() // self.down.stride(0)
            self.tally.add("moe_ffn_hidden_size", (self.number, expert), args[0])
        return func(*args, **(kwargs or {}))

    @property
    def _place(self) -> int:
        return int(self.down.untyped_storage().data_ptr())
