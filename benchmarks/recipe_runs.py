"""One run of a shipped recipe on random weights, and of the same shape in Transformers with PEFT."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from mbx.train.model.blueprint import Blueprint
    from mbx.train.recipe.sections import Recipe

GIB = 2**30
#: Steps that are left out of the throughput: kernels compile, allocators grow.
WARM = 3
Record = dict[str, object]


@dataclass(frozen=True, slots=True)
class Spec:
    """What one run is: a recipe, overrides, its number of GPUs, and whether Transformers with PEFT runs it."""

    recipe: str
    overrides: tuple[str, ...] = ()
    gpus: int = 1
    peft: bool = False

    @property
    def label(self) -> str:
        """The run in words."""
        return " ".join((self.recipe, *self.overrides, *(["transformers+peft"] if self.peft else [])))


def fixed(steps: int, device: str) -> list[str]:
    """What every run here has: random weights, rows that need no data, nothing saved."""
    more = ["run.save=false", "train.eval_every=0", "optim.warmup_steps=0", f"run.device={device}"]
    return ["model.init=random", "data.kind=pattern", f"train.steps={steps}", *more]


def narrowed(name: str, overrides: Sequence[str], gpus: int) -> list[str]:
    """Overrides that bring a recipe's axes down to `gpus` GPUs: its tensor parallelism as far as it goes, or its
    expert parallelism; one micro-batch a step on each rank."""
    from mbx.train.recipe.catalogue import load_recipe

    p = load_recipe(name, overrides).parallel
    tp, ep = min(p.tp, gpus), min(p.ep, gpus)
    if tp * ep > 1 and gpus % math.lcm(tp, ep):
        ep = 1
    axes = {"tp": tp, "ep": ep, "pp": 1, "vpp": 1, "cp": 1, "etp": 1}
    return [f"parallel.{axis}={size}" for axis, size in axes.items() if getattr(p, axis) != size]


def with_layers(recipe: Recipe, layers: int) -> Recipe:
    """The recipe with the first `layers` layers of its shape: patterns that say something of each are cut with it."""
    shape = dict(recipe.model.shape)
    whole = shape["num_layers"]
    for key, value in shape.items():
        if isinstance(value, list | tuple) and len(value) == whole:
            shape[key] = list(value)[:layers]
        elif key.endswith("hybrid_override_pattern") and isinstance(value, str):
            shape[key] = value[:layers]
    shape["num_layers"] = layers
    return replace(recipe, model=replace(recipe.model, shape=shape))


def period(shape: Mapping[str, object]) -> int:
    """Layers that a cut model has at least, so that every kind of layer is among them."""
    pattern = shape.get("model.hybrid_override_pattern")
    if isinstance(pattern, str):
        return 1 + max(pattern.index(kind) for kind in set(pattern))
    least = 1
    for value in shape.values():
        if isinstance(value, list | tuple) and len(value) == shape["num_layers"]:
            least = max(least, 1 + max(list(value).index(kind) for kind in set(value)))
    frequency = shape.get("linear_attention_freq", 1)
    return max(least, frequency if isinstance(frequency, int) else 1)


def fitted(recipe: Recipe, memory_bytes: float, dp: int) -> tuple[Recipe, Blueprint]:
    """The recipe with as many of its layers as the budget says fit into `memory_bytes`."""
    from mbx.train.budget.predict import predict
    from mbx.train.model.blueprint import blueprint

    whole, least = int(str(recipe.model.shape["num_layers"])), period(recipe.model.shape)
    layers = whole
    while True:
        cut = with_layers(recipe, layers)
        plan = blueprint(cut)
        total = predict(cut, plan, dp).total
        if total < memory_bytes or layers <= least:
            return cut, plan
        layers = max(least, min(layers - 1, int(layers * memory_bytes / total)))
        if isinstance(frequency := recipe.model.shape.get("linear_attention_freq"), int) and layers > frequency:
            layers -= layers % frequency


def run_recipe(spec: Spec, steps: int, memory_bytes: float, device: str = "cuda", length: int = 0) -> Record:
    """Train `steps` steps; losses, tokens/s, measured and predicted peak."""
    import torch

    from mbx.train.budget.predict import predict
    from mbx.train.recipe.catalogue import load_recipe
    from mbx.train.run.loop import train
    from mbx.train.run.prepare import prepare

    overrides = [*fixed(steps, device), *spec.overrides]
    overrides += narrowed(spec.recipe, overrides, spec.gpus)
    base = load_recipe(spec.recipe, overrides)
    dp = max(1, spec.gpus // (base.parallel.tp * base.parallel.pp * base.parallel.cp))
    batch = base.train.micro_batch * dp
    base = replace(base, train=replace(base.train, global_batch=batch))
    if length:
        base = replace(base, data=replace(base.data, length=length))
    recipe, _ = fitted(base, memory_bytes, dp)
    prepared = prepare(recipe)
    seen: list[tuple[float, float]] = []
    began = time.monotonic()
    outcome = train(prepared, live=False, on_step=lambda step: seen.append((step.tokens_per_s, step.step_s)))
    took = time.monotonic() - began
    peak = torch.cuda.max_memory_allocated() / GIB if device == "cuda" else None
    budget = predict(recipe, prepared.plan, dp)
    return {
        "layers": recipe.model.shape["num_layers"],
        "of_layers": base.model.shape["num_layers"],
        "length": recipe.data.length,
        "micro_batch": recipe.train.micro_batch,
        "axes": {axis: getattr(recipe.parallel, axis) for axis in ("tp", "pp", "ep", "etp")},
        "losses": [round(loss, 4) for loss in outcome.losses],
        "finite": all(map(math.isfinite, outcome.losses)),
        "tokens_per_s": statistics.median([rate for rate, _ in seen[WARM:] or seen]),
        "first_step_s": round(seen[0][1], 2),
        "peak_gib": peak,
        "predicted_gib": budget.total / GIB,
        "predicted_over_measured": budget.total / GIB / peak if peak else None,
        "phase": budget.phase,
        "parts_gib": {part: round(value / GIB, 3) for part, value in budget.parts.items()},
        "run_s": round(took, 1),
    }


def run_peft(spec: Spec, steps: int, memory_bytes: float, device: str = "cuda", length: int = 0) -> Record:
    """The same shape, layers, batch and ranks in Transformers with PEFT: bf16 base, fp32 adapters, AdamW, sdpa.

    It adapts what the recipe does: linears, and the parameters that hold all experts.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from mbx.tables import shipped
    from mbx.train.model.adapted import adapted
    from mbx.train.recipe.catalogue import load_recipe

    base = load_recipe(spec.recipe, [*fixed(steps, device), *spec.overrides])
    if length:
        base = replace(base, data=replace(base.data, length=length))
    recipe, plan = fitted(base, memory_bytes, 1)
    assert plan.table is not None, "the recipe's shape names no table"
    raw = plan.table.config.to_hf(plan.config)
    kind = shipped(plan.table.name).model_types[0]
    config = AutoConfig.for_model(kind, **raw, attn_implementation="sdpa")
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    lora = recipe.lora
    if lora.rank:
        names = {part.module for linear in adapted(lora, plan).values() for part in linear.parts}
        leaves = {name.rpartition(".")[2] for name in names}
        modules = [
            n
            for n, module in network.named_modules()
            if isinstance(module, torch.nn.Linear) and n.rpartition(".")[2] in leaves
        ]
        parameters = [n for n, _ in network.named_parameters() if n.rpartition(".")[2] in leaves]
        settings = LoraConfig(
            r=lora.rank, lora_alpha=int(lora.alpha), target_modules=modules, target_parameters=parameters
        )
        network = get_peft_model(network, settings)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if recipe.train.recompute == "full":
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if lora.rank:
            network.enable_input_require_grads()
    ids = torch.randint(0, plan.vocab, (recipe.train.micro_batch, recipe.data.length), device=device)
    took, losses = step_by_step(network, {"input_ids": ids, "labels": ids}, steps, device)
    peak = torch.cuda.max_memory_allocated() / GIB if device == "cuda" else None
    return {
        "layers": recipe.model.shape["num_layers"],
        "of_layers": base.model.shape["num_layers"],
        "length": recipe.data.length,
        "micro_batch": recipe.train.micro_batch,
        "targets": lora.targets if lora.rank else "every weight",
        "losses": [round(value, 4) for value in losses],
        "finite": all(map(math.isfinite, losses)),
        "tokens_per_s": ids.numel() / statistics.median(took[WARM:] or took),
        "first_step_s": round(took[0], 2),
        "peak_gib": peak,
    }


def step_by_step(
    network: Any, inputs: Mapping[str, torch.Tensor], steps: int, device: str
) -> tuple[list[float], list[float]]:
    """Seconds and losses of AdamW's steps on one batch under bf16 autocast."""
    import torch

    from mbx.models.transformers.grouped_values import repeated_heads

    network.train()
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-4)
    took, losses = [], []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with repeated_heads(network):
        for _ in range(steps):
            began = time.perf_counter()
            with torch.autocast(device, torch.bfloat16):
                loss = network(**inputs, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss))
            took.append(time.perf_counter() - began)
    return took, losses


def drawn(names: Sequence[str], seed: int, count: int) -> list[Spec]:
    """`count` random settings of recipes, from a seed: batch, length, recomputation, adapters, precision."""
    from mbx.train.recipe.catalogue import load_recipe

    stream = random.Random(seed)
    found: list[Spec] = []
    while len(found) < count:
        name = stream.choice(list(names))
        recipe = load_recipe(name)
        most = recipe.model.shape.get("model.max_sequence_length")
        length = stream.choice([512, 1024, 1536, 2048, 3072, 4096, 8192])
        changes = [
            f"train.micro_batch={stream.choice([1, 1, 2, 3, 4])}",
            f"data.length={min(length, most) if isinstance(most, int) else length}",
            f"train.recompute={stream.choice(['none', 'selective', 'full'])}",
        ]
        precision = stream.choice(["none", "none", "tensorwise", "delayed", "blockwise"])
        if recipe.lora.rank:
            changes.append(f"lora.rank={stream.choice([4, 8, 16, 32, 64, 128])}")
        if precision != "none" and not recipe.lora.dora:
            changes.append(f"fp8.recipe={precision}")
        found.append(Spec(name, tuple(changes)))
    return found
