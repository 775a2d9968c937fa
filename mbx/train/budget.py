"""Memory a rank will need, part by part, before anything runs.

Formulas count what Megatron Core 0.16 with Transformer Engine 2.11 keeps at the end of a forward pass, which is where
a step is largest; docs/training.md holds the derivation and the measured errors. Bytes throughout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from converters.errors import UnsupportedError
from converters.expr import Value
from mbx.train.model import Blueprint, as_int, gpu_config
from mbx.train.recipe import Recipe

GIB = 1 << 30
#: CUDA context, NCCL and cuBLAS handles on an H200: outside PyTorch's allocator, inside the GPU's memory.
CONTEXT = 600 << 20
#: cuBLAS workspaces that PyTorch (32 MiB) and Transformer Engine (32 MiB + 1 KiB) allocate on Hopper.
_WORKSPACE = 64 << 20
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, slots=True)
class Counts:
    """Parameters of one rank. `linears` are the decoder's products (what FP8 copies); `adapters` are LoRA's."""

    embedding: int
    output: int
    linears: int
    others: int
    adapters: int

    @property
    def base(self) -> int:
        """Everything but adapters."""
        return self.embedding + self.output + self.linears + self.others


@dataclass(frozen=True, slots=True)
class Budget:
    """Predicted bytes of the rank that needs most, by part; `total` compares with `max_memory_allocated`."""

    parts: Mapping[str, int]
    counts: Counts
    stage: int

    @property
    def total(self) -> int:
        """Bytes PyTorch's allocator will hand out at the peak."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class _Shape:
    """Sizes of a GPT decoder, read from a flat config."""

    hidden: int
    layers: int
    heads: int
    groups: int
    head: int
    ffn: int
    gated: bool
    bias: bool
    qkv_bias: bool
    qk_norm: bool
    norm_terms: int
    experts: int
    expert_ffn: int
    topk: int
    shared_ffn: int
    dense_layers: tuple[bool, ...]
    tied: bool
    positions: int


def _shape(config: Mapping[str, Value]) -> _Shape:
    if config.get("multi_latent_attention") or config.get("experimental_attention_variant"):
        raise UnsupportedError("the budget covers standard attention only, which this model does not have")
    if config.get("model.mcore_model") == "hybrid":
        raise UnsupportedError("the budget does not cover hybrid (Mamba) models")
    heads, hidden = as_int(config, "num_attention_heads"), as_int(config, "hidden_size")
    layers = as_int(config, "num_layers")

    def number(key: str, otherwise: int) -> int:
        value = config.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else otherwise

    ffn, experts = number("ffn_hidden_size", 4 * hidden), number("num_moe_experts", 0)
    frequency = config.get("moe_layer_freq", 1)
    if not experts:
        dense = (True,) * layers
    elif isinstance(frequency, list | tuple):
        dense = tuple(not flag for flag in frequency)
    else:
        dense = tuple(layer % int(str(frequency)) != 0 for layer in range(layers))
    return _Shape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        groups=number("num_query_groups", heads),
        head=number("kv_channels", hidden // heads),
        ffn=ffn,
        gated=bool(config.get("gated_linear_unit")),
        bias=bool(config.get("add_bias_linear", True)),
        qkv_bias=bool(config.get("add_qkv_bias")) or bool(config.get("add_bias_linear", True)),
        qk_norm=bool(config.get("qk_layernorm")),
        norm_terms=1 if config.get("normalization") == "RMSNorm" else 2,
        experts=experts,
        expert_ffn=number("moe_ffn_hidden_size", ffn),
        topk=number("moe_router_topk", 2),
        shared_ffn=number("moe_shared_expert_intermediate_size", 0),
        dense_layers=dense,
        tied=bool(config.get("model.share_embeddings_and_output_weights")),
        positions=as_int(config, "model.max_sequence_length")
        if config.get("model.position_embedding_type") == "learned_absolute"
        else 0,
    )


def count(recipe: Recipe, plan: Blueprint, stage: int) -> Counts:
    """Parameters that a rank of pipeline `stage` holds, exactly as Megatron Core builds them."""
    s, p = _shape(plan.config), recipe.parallel
    first, last = stage == 0, stage == p.pp - 1
    per_stage = s.layers // p.pp
    mine = s.dense_layers[stage * per_stage : (stage + 1) * per_stage]
    rows = plan.padded_vocab // p.tp * s.hidden
    embedding = (rows + s.positions * s.hidden) if first else 0
    output = rows if last and (not s.tied or p.pp > 1) else 0
    qkv_rows, up = (s.heads + 2 * s.groups) * s.head, 2 if s.gated else 1
    attention = (qkv_rows * s.hidden + s.heads * s.head * s.hidden) // p.tp

    def mlp(ffn: int, tp: int) -> int:
        return (up + 1) * ffn * s.hidden // tp

    linears = others = 0
    for dense in mine:
        linears += attention
        others += 2 * s.norm_terms * s.hidden + (2 * s.norm_terms * s.head if s.qk_norm else 0)
        others += (qkv_rows // p.tp if s.qkv_bias else 0) + (s.hidden if s.bias else 0)
        if dense:
            linears += mlp(s.ffn, p.tp)
            others += (up * s.ffn // p.tp + s.hidden) if s.bias else 0
        else:
            linears += s.experts // p.ep * mlp(s.expert_ffn, p.etp) + (mlp(s.shared_ffn, p.tp) if s.shared_ffn else 0)
            others += s.experts * s.hidden
    others += s.norm_terms * s.hidden if last else 0
    return Counts(embedding, output, linears, others, _adapters(recipe, s, len(mine)))


def _adapters(recipe: Recipe, s: _Shape, layers: int) -> int:
    lora, tp = recipe.lora, recipe.parallel.tp
    if not lora.rank:
        return 0
    q, kv, up = s.heads * s.head, s.groups * s.head, 2 if s.gated else 1
    sizes = {  # A whole and B cut under a column-parallel base, the other way round under a row-parallel one
        "linear_qkv": (3 * s.hidden + (q + 2 * kv) // tp, (q + 2 * kv) // tp),
        "linear_proj": (q // tp + s.hidden, s.hidden),
        "linear_fc1": (up * (s.hidden + s.ffn // tp), up * s.ffn // tp),
        "linear_fc2": (s.ffn // tp + s.hidden, s.hidden),
    }
    return layers * sum(lora.rank * sizes[t][0] + (sizes[t][1] if lora.dora else 0) for t in lora.targets)


def predict(recipe: Recipe, plan: Blueprint, dp: int) -> Budget:
    """The budget of the pipeline stage that needs most."""
    stages = [_stage(recipe, plan, dp, stage) for stage in range(recipe.parallel.pp)]
    return max(stages, key=lambda budget: budget.total)


def _stage(recipe: Recipe, plan: Blueprint, dp: int, stage: int) -> Budget:
    c, s, p, t = count(recipe, plan, stage), _shape(plan.config), recipe.parallel, recipe.train
    size = _BYTES[t.precision]
    trained = c.adapters if recipe.lora.rank else c.base
    shared = dp * p.cp if p.distributed_optimizer else 1
    moments = 8 if recipe.optim.optimizer == "adam" else 0
    state = moments + (0 if t.precision == "fp32" else 4)  # the fp32 copy that is stepped
    fp8 = recipe.fp8.recipe != "none"
    tokens = t.micro_batch * recipe.data.length // p.cp
    in_flight = min(p.pp - stage, t.global_batch // (t.micro_batch * dp))  # micro-batches of 1F1B this stage holds
    layer = _layer_activations(recipe, s, tokens, fp8)
    layers = s.layers // p.pp
    stored = tokens * s.hidden * size // (p.tp if p.sequence_parallel else 1)
    full = t.recompute == "full"  # keeps each layer's input, and one layer whole while it is recomputed
    activations = in_flight * layers * (stored if full else layer) + (layer if full else 0)
    logits = 0
    if stage == p.pp - 1:
        # fused: logits become their gradient in place; else also an fp32 copy that becomes the softmax, and a
        # gradient beside it (megatron/core/tensor_parallel/cross_entropy.py)
        fused = {**gpu_config(plan.config), **plan.config}["cross_entropy_loss_fusion"]
        logits = tokens * plan.padded_vocab // p.tp * (size if fused else 2 * size + 4)
    parts = {
        "weights": (c.base + c.adapters) * size,
        "gradients": trained * 4,
        "optimizer": math.ceil(trained * state / shared),
        "fp8 copies": c.linears * 2 if fp8 else 0,
        "activations": activations,
        "logits": logits,
        "communication": _communication(recipe, s, tokens, size),
        "workspaces": _WORKSPACE,
    }
    return Budget({name: value for name, value in parts.items() if value}, c, stage)


def _layer_activations(recipe: Recipe, s: _Shape, tokens: int, fp8: bool) -> int:
    """What one layer keeps for its backward pass.

    Twice a norm's input and output; q, k, v and the attention's output; fc1's output and the activation's. FP8 keeps
    the inputs of the products in one byte an element.
    """
    p, size = recipe.parallel, _BYTES[recipe.train.precision]
    product = 1 if fp8 else size
    sequence = p.tp if p.sequence_parallel else 1
    q, kv, up = s.heads * s.head, s.groups * s.head, 2 if s.gated else 1
    norms = 2 * s.hidden * (size + product) // sequence
    attention = ((q + 2 * kv) * size + q * size + (q * product if fp8 else 0)) // p.tp + 4 * s.heads // p.tp
    if s.experts:
        width = s.topk * s.expert_ffn + s.shared_ffn
        routed = s.topk * s.hidden * (size + product)
        mlp = width * (up * size + product) // p.etp + routed
    else:
        mlp = s.ffn * (up * size + product) // p.tp
    if recipe.lora.rank and fp8:
        norms += 2 * s.hidden * size // sequence  # adapters read the products' inputs in bf16
        mlp += s.ffn * size // p.tp
    return tokens * (norms + attention + mlp)


def _communication(recipe: Recipe, s: _Shape, tokens: int, size: int) -> int:
    """Buffers of collectives: the gathered input of a product under sequence parallelism, stages' hand-over."""
    p = recipe.parallel
    gathered = 2 * tokens * s.hidden * size if p.tp > 1 and p.sequence_parallel else 0
    handed = 2 * tokens * s.hidden * size // (p.tp if p.sequence_parallel else 1) if p.pp > 1 else 0
    return gathered + handed


def suggestions(recipe: Recipe, plan: Blueprint, dp: int) -> list[tuple[str, int]]:
    """Single changes that would lower the peak, with the bytes each saves, most first."""
    import dataclasses

    here = predict(recipe, plan, dp).total
    r, found = recipe, []
    options: list[tuple[str, Recipe]] = []
    if r.train.recompute != "full":
        options.append(
            ("train.recompute=full", dataclasses.replace(r, train=dataclasses.replace(r.train, recompute="full")))
        )
    if r.train.micro_batch > 1:
        half = dataclasses.replace(r.train, micro_batch=r.train.micro_batch // 2)
        options.append((f"train.micro_batch={half.micro_batch}", dataclasses.replace(r, train=half)))
    if not r.lora.rank:
        options.append(("lora.rank=16", dataclasses.replace(r, lora=dataclasses.replace(r.lora, rank=16))))
    if r.fp8.recipe != "none":
        options.append(("fp8.recipe=none", dataclasses.replace(r, fp8=dataclasses.replace(r.fp8, recipe="none"))))
    for name, changed in options:
        try:
            saved = here - predict(changed, plan, dp).total
        except UnsupportedError:
            continue
        if saved > 0:
            found.append((name, saved))
    groups = plan.config.get("num_query_groups") or plan.config.get("num_attention_heads")
    if isinstance(groups, int) and groups % (2 * r.parallel.tp) == 0:
        doubled = dataclasses.replace(r, parallel=dataclasses.replace(r.parallel, tp=2 * r.parallel.tp))
        layout = dataclasses.replace(plan.layout, tp=2 * r.parallel.tp)
        saved = here - predict(doubled, dataclasses.replace(plan, layout=layout), dp).total
        found.append((f"parallel.tp={2 * r.parallel.tp}", saved))
    return sorted(found, key=lambda item: -item[1])


def lines(budget: Budget, tips: list[tuple[str, int]]) -> list[str]:
    """The budget as a table, in GiB."""
    width = max(len(name) for name in budget.parts)
    rows = [f"{name:<{width}}  {value / GIB:8.2f} GiB" for name, value in budget.parts.items()]
    rows.append(
        f"{'total':<{width}}  {budget.total / GIB:8.2f} GiB  (and about {CONTEXT / GIB:.1f} GiB of CUDA context)"
    )
    rows += [f"{name} would save {saved / GIB:.2f} GiB" for name, saved in tips]
    return rows
