"""From a blueprint to a built model: Megatron Core's module, its data-parallel wrapper, its optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from converters.rows.config_spelling import canonical
from converters.rows.expr import Value
from mbx.train.model.blueprint import Blueprint, as_int
from mbx.train.model.config import train_config
from mbx.train.model.experts import joins_experts
from mbx.train.model.fp8 import holds_casts
from mbx.train.model.muon import MUON, mark_tables, muon_fields
from mbx.train.model.parallel import Ranks, spread_of
from mbx.train.recipe.sections import Recipe

if TYPE_CHECKING:
    from torch import nn

    from mbx.models.megatron.core.training import DistributedDataParallel, MegatronOptimizer


def build(recipe: Recipe, plan: Blueprint, ranks: Ranks) -> list[nn.Module]:
    """This rank's model with random weights, on its device: `parallel.vpp` chunks, in order of depth."""
    return [_build_chunk(recipe, plan, ranks, stage) for stage in range(recipe.parallel.vpp)]


def _build_chunk(recipe: Recipe, plan: Blueprint, ranks: Ranks, stage: int) -> nn.Module:
    from mbx.formats.hf import read_config
    from mbx.models.megatron.build import build_model
    from mbx.models.megatron.core.groups import set_defaults_if_not_set_tensor_model_parallel_attributes
    from mbx.models.megatron.rotary import lend_frequencies

    model = build_model(
        train_config(recipe, plan, ranks),
        spread_of(recipe, ranks),
        use_te=ranks.te,
        padded_vocab_size=plan.padded_vocab,
        vp_stage=stage if recipe.parallel.vpp > 1 else None,
    )
    if plan.hf is not None:  # rotary constants that Megatron Core has no field for
        lend_frequencies(model, plan.hf, canonical(read_config(plan.hf)))
    if joins_experts(recipe, plan.config, ranks):
        from mbx.models.megatron.core.experts import join_experts

        join_experts(model)
    if recipe.parallel.tp > recipe.parallel.etp:
        _reduce_experts(model)
    for parameter in model.parameters():
        set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    if recipe.train.precision != "fp32":
        from mbx.models.megatron.core.training import Float16Module

        half: nn.Module = Float16Module(model.config, model)
        return half
    return model


def settle_frozen(recipe: Recipe, model: nn.Module, ranks: Ranks) -> None:
    """What can be spared once the weights of an adapter run are in their places."""
    if not (recipe.lora.rank and ranks.te):
        return
    from mbx.models.megatron.core.frozen import keep_casts, spare_gammas

    spare_gammas(model)
    if holds_casts(recipe):
        keep_casts(model, recipe.fp8.recipe)


def _reduce_experts(model: nn.Module) -> None:
    """Let gradients of experts be summed over the ranks of tensor parallelism that hold the same experts.

    Each of them sees its own tokens. Megatron Core 0.16 marks experts for that under expert parallelism only, and
    would step each rank's copy by the gradient of its own share.
    """
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]


def wrap(
    recipe: Recipe, model: nn.Module, ranks: Ranks, *, bucketed: bool = True, at_once: bool = False
) -> DistributedDataParallel:
    """Megatron Core's data-parallel wrapper: gradients in fp32 buckets, reduced as they come, or `at_once` at the end.

    Chunks of an interleaved pipeline behind the first are not `bucketed`: their reduction overlaps with the others'
    computation anyway (megatron/training/training.py).
    """
    from mbx.models.megatron.core.training import DistributedDataParallel, DistributedDataParallelConfig

    cuda = ranks.device == "cuda"
    num_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    overlap = recipe.parallel.overlap_grad_reduce and cuda and ranks.dp * recipe.parallel.cp > 1 and not at_once
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        use_distributed_optimizer=_distributed(recipe, ranks),
        overlap_param_gather=False,
        check_for_nan_in_grad=False,
        bucket_size=max(40_000_000, 1_000_000 * ranks.dp) if overlap and num_parameters else None,
    )
    return DistributedDataParallel(
        config=model.config, ddp_config=config, module=model, disable_bucketing=not bucketed
    )


def _distributed(recipe: Recipe, ranks: Ranks) -> bool:
    """The distributed optimizer cuts its state over data-parallel ranks; with one there is nothing to cut."""
    return recipe.parallel.distributed_optimizer and ranks.dp * recipe.parallel.cp > 1


def optimizer(recipe: Recipe, chunks: Sequence[DistributedDataParallel], ranks: Ranks) -> MegatronOptimizer:
    """Megatron Core's optimizer over the trainable parameters; biases and norms take no weight decay."""
    from mbx.models.megatron.core.training import OptimizerConfig, get_megatron_optimizer

    o, t, precision = recipe.optim, recipe.train, recipe.train.precision
    # Losses that are summed over tokens have gradients larger by their number than losses that are averaged.
    tokens = 2 ** int(math.log2(t.micro_batch * recipe.data.length)) if t.per_token_loss else 1
    config = OptimizerConfig(
        optimizer=o.optimizer,
        sgd_momentum=0.0,
        lr=o.lr,
        min_lr=o.min_lr,
        weight_decay=o.weight_decay,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        adam_eps=o.eps,
        clip_grad=o.clip,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        params_dtype=next(chunks[0].parameters()).dtype,
        use_distributed_optimizer=_distributed(recipe, ranks),
        initial_loss_scale=2.0**16 / tokens,
        **muon_fields(o),
    )
    if o.optimizer == MUON:
        mark_tables(chunks)
    return get_megatron_optimizer(config, list(chunks), use_gloo_process_groups=ranks.device == "cpu")


def unwrap(model: nn.Module) -> nn.Module:
    """The GPTModel inside DistributedDataParallel and Float16Module, which both call it `module`."""
    from torch import nn

    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model


def flops_per_token(config: Mapping[str, Value], length: int, vocab: int, lora: bool) -> float:
    """Floating-point operations of one token, forward and backward, matrix products only.

    Six per weight (arXiv 2001.08361), four where the weight is frozen, and `12 · layers · heads·dim · length / 2` of
    causal attention. Dense and MoE decoders.
    """
    hidden, layers, heads = (as_int(config, k) for k in ("hidden_size", "num_layers", "num_attention_heads"))
    head = config.get("kv_channels") or hidden // heads
    groups = config.get("num_query_groups") or heads
    assert isinstance(head, int) and isinstance(groups, int)
    attention = hidden * head * (heads + 2 * groups) + heads * head * hidden
    gate = 3 if config.get("gated_linear_unit") else 2
    ffn = config.get("moe_ffn_hidden_size") or config.get("ffn_hidden_size") or 4 * hidden
    active = config.get("moe_router_topk") if config.get("num_moe_experts") else 1
    assert isinstance(ffn, int) and isinstance(active, int)
    weights = layers * (attention + gate * hidden * ffn * active) + hidden * vocab
    return (4 if lora else 6) * weights + 6 * layers * heads * head * length


def first_microbatch(*chunks: nn.Module) -> Callable[[], None]:
    """A call for the start of every step, without which FP8 layers keep using the weights they cached.

    Layers whose weights are all frozen cast them once, in the first pass: Megatron Core's schedules, which would mark
    every layer, are given this call in place of theirs.
    """
    marked = [
        m
        for chunk in chunks
        for m in chunk.modules()
        if hasattr(m, "is_first_microbatch") and any(p.requires_grad for p in m.parameters(recurse=False))
    ]

    def mark() -> None:
        for module in marked:
            module.is_first_microbatch = True  # type: ignore[assignment]

    for chunk in chunks:
        chunk.set_is_first_microbatch = mark  # type: ignore[assignment]
    return mark
