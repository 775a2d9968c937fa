"""An estimate of how fast a recipe runs, good for putting settings in order and for nothing else.

A micro-batch takes the longer of two times: its products at a share of the GPU's peak, and the kernels' launches,
which a processor makes one by one where no CUDA graph replays them. Tensor parallelism adds its collectives: their
bytes over the link, and a wait for the other ranks each. The constants are from measured runs on H200s: Qwen3 8B, LoRA
on all linears, 1 x 2048, 14,500 device events a step at 8,400 tokens/s, replayed at 15,200, tp 2 replayed at 22,800;
and full fine-tuning of the 8B shape, 10,900 tokens/s, 57 % of peak. FP8, tensorwise: 1.30 x that, 1.22 x the adapters
replayed, 0.48 x them launched, for casts are kernels too.
"""

from __future__ import annotations

from dataclasses import replace

from mbx.train.budget.devices import Device
from mbx.train.budget.predict import GIB, predict
from mbx.train.budget.shape import shape_of
from mbx.train.model.blueprint import Blueprint
from mbx.train.model.build import flops_per_token
from mbx.train.model.graphs import why_not
from mbx.train.model.parallel import Ranks
from mbx.train.model.teacher import teacher_of
from mbx.train.recipe.sections import Recipe

#: Share of peak that products reach, events of a layer's micro-batch.
_SHARE, _EVENTS = 0.55, 400
#: What FP8 multiplies both by.
_FP8_SPEED, _FP8_EVENTS = 1.25, 2.0
#: Seconds of launching an event and of waiting a collective, one by one and replayed.
_LAUNCH_S, _WAIT_S = {False: 17e-6, True: 2e-6}, {False: 2e-4, True: 4e-5}
#: Collectives of a layer's micro-batch under tp with sequence parallelism.
_COLLECTIVES = 16


def tokens_per_s(recipe: Recipe, plan: Blueprint, device: Device, dp: int) -> float:
    """Tokens a second of the whole run, estimated."""
    p, t = recipe.parallel, recipe.train
    replayed = why_not(recipe, plan.config, Ranks(0, dp * p.tp * p.pp * p.cp, 0, dp, "cuda", te=True)) is None
    took = _micro_batch(recipe, plan, device, replayed)
    if (teacher := teacher_of(recipe)) is not None:  # a third of training is the forward pass
        took += _micro_batch(teacher.recipe, teacher.plan, device, replayed) / 3
    rounds = t.global_batch // (t.micro_batch * dp)
    bubble = (rounds + (p.pp - 1) / p.vpp) / rounds
    return t.global_batch * recipe.data.length / (took * rounds * bubble)


def _micro_batch(recipe: Recipe, plan: Blueprint, device: Device, replayed: bool) -> float:
    """Seconds that a rank takes for a micro-batch."""
    p, t = recipe.parallel, recipe.train
    shape, frozen = shape_of(plan.config), recipe.lora.rank > 0
    layers = len(shape.layers) / p.pp
    tokens = t.micro_batch * recipe.data.length / p.cp
    flops = flops_per_token(plan.config, recipe.data.length, plan.padded_vocab, frozen) * tokens / (p.tp * p.pp)
    again = 1 / (2 if frozen else 3)  # the forward pass's share of the products
    flops *= 1 + (again if t.recompute == "full" else 0.05 if t.recompute == "selective" else 0)
    peak, events = device.tflops * 1e12, layers * _EVENTS * (1.33 if t.recompute == "full" else 1.0)
    if recipe.fp8.recipe != "none":
        peak, events = peak * _FP8_SPEED, events * _FP8_EVENTS
    took = max(flops / (peak * _SHARE), events * _LAUNCH_S[replayed])
    if p.tp > 1:
        count = layers * _COLLECTIVES
        moved = tokens * shape.hidden * 2 * (p.tp - 1) / p.tp
        took += count * (_WAIT_S[replayed] + moved / (device.link * 1e9))
    return took


def fp8_does_not_pay(recipe: Recipe, plan: Blueprint, device: Device, dp: int) -> str | None:
    """In words, that a run is estimated to be no faster in FP8 than in bf16, and what it saves; None where it is."""
    plain = replace(recipe, fp8=replace(recipe.fp8, recipe="none"))
    ratio = tokens_per_s(recipe, plan, device, dp) / tokens_per_s(plain, plan, device, dp)
    if ratio > 1:
        return None
    saved = (predict(plain, plan, dp).total - predict(recipe, plan, dp).total) / GIB
    launched = why_not(recipe, plan.config, Ranks(0, dp * recipe.parallel.tp, 0, dp, "cuda", te=True))
    why = f"; kernels are launched one by one, as {launched}" if launched else ""
    memory = f", saving {saved:.1f} GiB" if saved >= 0.05 else ", and no less memory"
    return f"FP8 does not pay here: about {ratio:.1f} x the speed of bf16 by estimate{memory}{why}"
