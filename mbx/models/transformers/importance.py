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

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from converters.pruning.choosing import Importance
from converters.pruning.kept import Spot
from converters.rows.config_map import environment
from converters.rows.expr import Env
from converters.rows.shapes import EXPECTED
from converters.rows.table import Row, Table
from mbx.models.prompts import check_ids
from mbx.models.transformers.shallow import PartialTransformers
from mbx.models.transformers.streamed import (
    EXPERTS_DOWN,
    ExpertProducts,
    Flow,
    holds_experts,
    module_of,
    rows_by_layer,
)

#: Products whose inputs are the channels of a width.
_CHANNELS = {
    "mlp.linear_fc2.weight": "ffn_hidden_size",
    "mlp.shared_experts.linear_fc2.weight": "moe_shared_expert_intermediate_size",
}
_HEADS = "self_attention.linear_proj.weight"


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
        tally = _Tally(rows_by_layer(table, environment(fields), parts.weights.tensors), fields, ids.numel())
        with torch.no_grad():
            flow = Flow.of(parts, torch.split(ids, rows_at_once), device)
            turned = []
            for number, layer in flow.layers():
                turn = 0.0
                with tally.watching(layer, number):
                    for before, after in flow.through(layer, number):
                        similar = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
                        turn += float((1 - similar).double().sum())
                turned.append(turn / ids.numel())
                progress(1)
            for part in flow.states:
                tally.add("hidden_size", (None, None), flow.norm(part.to(device)))
    finally:
        parts.close()
    return Importance(torch.tensor(turned).double().numpy(), tally.widths())


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
    def watching(self, layer: nn.Module, number: int) -> Iterator[None]:
        """Sum what flows through the parts of `layer` meanwhile."""
        with ExitStack() as stack:
            for row in self.rows.get(number, ()):
                for handle in self._hooks(layer, row, number):
                    stack.callback(handle.remove)
            for module in layer.modules():
                if holds_experts(module):
                    hook = module.register_forward_pre_hook(self._routing(number), with_kwargs=True)
                    stack.callback(hook.remove)
                    stack.enter_context(self._experts(module, number))
            yield

    def _hooks(self, layer: nn.Module, row: Row, number: int) -> Iterator[Any]:
        if row.spec.param == _HEADS:
            heads = self.fields["num_attention_heads"]
            assert isinstance(heads, int)
            yield self._input(module_of(layer, row), "num_attention_heads", number, heads)
        elif (width := _CHANNELS.get(row.spec.param)) is not None:
            yield self._input(module_of(layer, row), width, number)
        elif row.spec.op == "norm" and EXPECTED.get(row.spec.param) == EXPECTED["decoder.final_layernorm.weight"]:
            yield module_of(layer, row).register_forward_hook(self._normed)

    def _normed(self, module: nn.Module, given: object, output: torch.Tensor) -> None:
        self.add("hidden_size", (None, None), output)

    def _input(self, module: nn.Module, width: str, number: int, count: int | None = None) -> Any:
        return module.register_forward_pre_hook(lambda _, given: self.add(width, (number, None), given[0], count))

    def _experts(self, module: nn.Module, number: int) -> ExpertProducts:
        """Adds the inputs of each expert's last product."""
        width = self.fields["moe_ffn_hidden_size"]
        assert isinstance(width, int)
        for expert in range(len(module.get_parameter(EXPERTS_DOWN))):
            self.sum("moe_ffn_hidden_size", (number, expert), torch.zeros(width, dtype=torch.float64))

        def see(down: bool, expert: int, given: torch.Tensor) -> None:
            if down:
                self.add("moe_ffn_hidden_size", (number, expert), given)

        return ExpertProducts(module, see)

    def _routing(self, number: int) -> Callable[..., None]:
        experts = self.fields["num_moe_experts"]
        assert isinstance(experts, int)

        def hook(module: nn.Module, given: Sequence[Any], named: Mapping[str, Any]) -> None:
            chosen, weights = [*given, *named.values()][1:3]
            total = torch.zeros(experts, dtype=torch.float64)
            total.index_add_(0, chosen.flatten().cpu(), weights.detach().double().flatten().cpu())
            self.sum("num_moe_experts", (number, None), total)

        return hook
