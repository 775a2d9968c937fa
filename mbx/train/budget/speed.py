"""An estimate of how fast a recipe runs, good for putting settings in order and for nothing else.

A micro-batch takes the longer of two times: its products at a share of the GPU's peak, and the kernels' launches,
which a processor makes one by one where no CUDA graph replays them. Tensor parallelism adds its collectives: their
bytes over the link, and a wait for the other ranks each. The constants are from measured runs on H200s (Qwen3 8B, LoRA
on all linears, 1 x 2048: 14,500 device events a step at 8,400 tokens/s, replayed at 13,900; tp 2: 580 all-gathers and
as many reduce-scatters at 4,300, replayed at 17,400) and from full fine-tuning of the 8B shape (10,900 tokens/s, 57 %
of peak).
"""

from __future__ import annotations

from mbx.train.budget.devices import Device
from mbx.train.budget.shape import shape_of
from mbx.train.model.blueprint import Blueprint
from mbx.train.model.build import flops_per_token
from mbx.train.model.graphs import why_not
from mbx.train.model.parallel import Ranks
from mbx.train.recipe.sections import Recipe

#: Share of peak that products reach, events of a layer's micro-batch.
_SHARE, _EVENTS = 0.55, 400
#: Seconds of launching an event and of waiting a collective, one by one and replayed.
_LAUNCH_S, _WAIT_S = {False: 17e-6, True: 2e-6}, {False: 2e-4, True: 4e-5}
#: Collectives of a layer's micro-batch under tp with sequence parallelism, adapters on all linears or none.
_COLLECTIVES = {True: 32, False: 16}


def tokens_per_s(recipe: Recipe, plan: Blueprint, device: Device, dp: int) -> float:
    """Tokens a second of the whole run, estimated."""
    p, t = recipe.parallel, recipe.train
    shape, frozen = shape_of(plan.config), recipe.lora.rank > 0
    layers = len(shape.layers) / p.pp
    tokens = t.micro_batch * recipe.data.length / p.cp
    flops = flops_per_token(plan.config, recipe.data.length, plan.padded_vocab, frozen) * tokens / (p.tp * p.pp)
    again = 1 / (2 if frozen else 3)  # the forward pass's share of the products
    flops *= 1 + (again if t.recompute == "full" else 0.05 if t.recompute == "selective" else 0)
    peak = device.tflops * 1e12 * (1.6 if recipe.fp8.recipe != "none" else 1.0)
    events = (
        layers * _EVENTS * (1.33 if t.recompute == "full" else 1.0) * (1.2 if recipe.fp8.recipe != "none" else 1.0)
    )
    replayed = why_not(recipe, plan.config, Ranks(0, dp * p.tp * p.pp * p.cp, 0, dp, "cuda", te=True)) is None
    took = max(flops / (peak * _SHARE), events * _LAUNCH_S[replayed])
    if p.tp > 1:
        count = layers * _COLLECTIVES[frozen]
        moved = tokens * shape.hidden * 2 * (p.tp - 1) / p.tp
        took += count * (_WAIT_S[replayed] + moved / (device.link * 1e9))
    rounds = t.global_batch // (t.micro_batch * dp)
    bubble = (rounds + (p.pp - 1) / p.vpp) / rounds
    return t.global_batch * recipe.data.length / (took * rounds * bubble)
