"""What Megatron-LM's trainer draws from the GPU's random stream before it builds a model.

Megatron-LM compiles its fused kernels on random tensors between seeding and building
(`megatron/training/initialize.py`, `_warmup_jit_function`, core_v0.16.1). Dropout outside sequence parallelism reads
the stream those tensors came from, so losses agree with Megatron-LM's only after the same draws in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from converters.rows.expr import Value
from mbx.train.model.blueprint import Blueprint, as_int
from mbx.train.model.parallel import Ranks
from mbx.train.recipe.sections import Recipe

#: Calls of the fused bias, dropout and addition, first without and then with a gradient for its input.
_CALLS = 5
_DROPOUT = 0.1


@dataclass(frozen=True, slots=True)
class Draws:
    """Shapes of the random tensors, in the order in which they are drawn; the last three enter the fused kernel."""

    ffn_bias: tuple[int, ...]
    ffn_input: tuple[int, ...]
    hidden_input: tuple[int, ...]
    residual: tuple[int, ...]
    bias: tuple[int, ...]


def draws(recipe: Recipe, config: Mapping[str, Value]) -> Draws:
    """The shapes for a recipe and its flat `config`: [tokens, micro-batch, width], as a rank holds them."""
    p, micro = recipe.parallel, recipe.train.micro_batch
    hidden = as_int(config, "hidden_size")
    ffn = config.get("ffn_hidden_size")
    width = (ffn if isinstance(ffn, int) else 4 * hidden) // p.tp
    length = recipe.data.length
    cut = length // p.tp if p.sequence_parallel and p.tp > 1 else length
    rows = (cut // p.cp, micro, hidden)
    return Draws((width,), (length // p.cp, micro, width), rows, rows, (hidden,))


def warm_up(recipe: Recipe, plan: Blueprint, ranks: Ranks) -> None:
    """Make Megatron-LM's draws on this rank's GPU; nothing where no dropout will read the stream."""
    if ranks.device != "cuda" or not (plan.config.get("hidden_dropout") or plan.config.get("attention_dropout")):
        return
    from mbx.models.megatron.core.training import bias_dropout_add_fused_train

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[recipe.train.precision]
    shapes = draws(recipe, plan.config)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.rand(shape, dtype=dtype, device="cuda")

    draw(shapes.ffn_bias), draw(shapes.ffn_input)
    inputs, residual, bias = draw(shapes.hidden_input), draw(shapes.residual), draw(shapes.bias)
    residual.requires_grad_(True)
    bias = bias.expand_as(residual).requires_grad_(True)
    for wanted in (False, True):
        inputs.requires_grad_(wanted)
        for _ in range(_CALLS):
            bias_dropout_add_fused_train([inputs, bias], residual, _DROPOUT)
    torch.cuda.empty_cache()
