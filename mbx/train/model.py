"""From a recipe to a built model: its config, its table, Megatron Core's module, its optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converters.errors import LayoutError, StorageError, UsageError
from converters.expr import Value
from converters.layout import Layout
from converters.layout import check as check_layout
from converters.table import Table
from mbx.train.parallel import Ranks
from mbx.train.recipe import Recipe

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer
    from torch import nn
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What is known of the model before it is built.

    `config`: flat Megatron Core config, the recipe's changes included. `hf`: the Hugging Face folder, if the recipe
    names one, and `table` its mapping table. `padded_vocab`: rows of the embedding.
    """

    config: Mapping[str, Value]
    table: Table | None
    hf: Path | None
    layout: Layout

    @property
    def vocab(self) -> int:
        """True vocabulary size."""
        return as_int(self.config, "model.vocab_size")

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding, padding included."""
        return self.layout.padded_vocab(self.vocab)


def as_int(config: Mapping[str, Value], key: str) -> int:
    """An integer of a flat config; UsageError where it is absent or not one."""
    value = config.get(key)
    if not isinstance(value, int):
        raise UsageError(f"the model's config lacks the integer `{key}`, got {value!r}")
    return value


def blueprint(recipe: Recipe) -> Blueprint:
    """Read the model's config from its folder, or take the recipe's shape; UsageError where they do not fit."""
    from mbx.io import hf
    from mbx.registry import table_for

    m = recipe.model
    folder = Path(m.path) if m.path else None
    table: Table | None = None
    config: dict[str, Value]
    if folder is not None:
        if not folder.is_dir():
            raise StorageError(
                f"model.path `{folder}` is no folder", hint="model.path=DIR names a Hugging Face folder"
            )
        raw = hf.read_config(folder)
        table = table_for(raw, m.mapping or None)
        config = table.config.to_mcore(raw)
    elif m.shape:
        config = dict(m.shape)
    else:
        raise UsageError(f"recipe `{recipe.name}` has no model", hint="model=DIR names a Hugging Face folder")
    config.update(recipe.model.config)
    layout = Layout(recipe.parallel.tp, recipe.parallel.pp, recipe.model.vocab_divisor)
    check_layout(layout, config)
    positions = as_int(config, "model.max_sequence_length")
    if recipe.data.length > positions:
        raise UsageError(f"data.length {recipe.data.length} exceeds the model's {positions} positions")
    if recipe.data.length % recipe.parallel.tp and recipe.parallel.sequence_parallel:
        raise LayoutError(
            f"data.length {recipe.data.length} does not divide by tp {recipe.parallel.tp} (sequence parallel)"
        )
    if recipe.data.length % (2 * recipe.parallel.cp) and recipe.parallel.cp > 1:
        raise LayoutError(f"data.length {recipe.data.length} is not a multiple of 2 x cp {recipe.parallel.cp}")
    return Blueprint(config, table, folder, layout)


def load_tokenizer(plan: Blueprint) -> PreTrainedTokenizerBase:
    """The folder's tokenizer; UsageError where it has none."""
    if plan.hf is None:
        raise UsageError("this kind of data needs a tokenizer", hint="model=DIR names a folder that has one")
    from transformers import AutoTokenizer

    if not any((plan.hf / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise UsageError(f"`{plan.hf}` has no tokenizer", hint="copy tokenizer.json and tokenizer_config.json there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(plan.hf, local_files_only=True)
    except (OSError, ValueError) as error:
        raise StorageError(f"the tokenizer of `{plan.hf}` cannot be read: {error}") from error
    if len(tokenizer) > plan.vocab:
        raise UsageError(f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {plan.vocab}")
    return tokenizer


def train_config(recipe: Recipe, plan: Blueprint, ranks: Ranks) -> dict[str, Value]:
    """The flat config the trainer builds from: the model's, and what the recipe says of parallelism and precision."""
    from mbx.train.fp8 import fp8_config

    config = {**(gpu_config(plan.config) if ranks.te else {}), **plan.config}
    p, tr = recipe.parallel, recipe.train
    config["calculate_per_token_loss"] = tr.per_token_loss
    config["context_parallel_size"] = p.cp
    config["deterministic_mode"] = tr.deterministic
    if p.tp > 1 and p.sequence_parallel and ranks.device == "cuda":
        config["sequence_parallel"] = True
    if tr.recompute == "full":
        config |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif tr.recompute == "selective":
        config |= {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return config | fp8_config(recipe.fp8)


def gpu_config(config: Mapping[str, Value]) -> dict[str, Value]:
    """Fused kernels for a GPU with Transformer Engine: same mathematics, less memory and traffic.

    What the model's config or the recipe says about them wins.
    """
    fused: dict[str, Value] = {
        "bias_dropout_fusion": True,
        "cross_entropy_loss_fusion": True,  # one kernel that turns logits into their gradient in place
        "cross_entropy_fusion_impl": "te",
    }
    if config.get("gated_linear_unit") and config.get("activation_func") == "silu":
        fused["bias_activation_fusion"] = True
    if config.get("model.position_embedding_type") == "rope" and not config.get("multi_latent_attention"):
        fused["apply_rope_fusion"] = True
    return fused


def build(recipe: Recipe, plan: Blueprint, ranks: Ranks) -> nn.Module:
    """This rank's model with random weights, on its device."""
    from megatron.core.tensor_parallel.layers import set_defaults_if_not_set_tensor_model_parallel_attributes

    from mbx.mcore.build import build_model

    p = recipe.parallel
    model = build_model(
        train_config(recipe, plan, ranks),
        tp=p.tp,
        pp=p.pp,
        ep=p.ep,
        etp=p.etp,
        dtype=recipe.train.precision,
        device=ranks.device,
        use_te=ranks.te,
        padded_vocab_size=plan.padded_vocab,
    )
    for parameter in model.parameters():
        set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    if recipe.train.precision != "fp32":
        from megatron.core.transformer.module import Float16Module

        half: nn.Module = Float16Module(model.config, model)
        return half
    return model


def wrap(recipe: Recipe, model: nn.Module, ranks: Ranks) -> DistributedDataParallel:
    """Megatron Core's data-parallel wrapper: gradients in fp32 buckets, reduced as they come."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    cuda = ranks.device == "cuda"
    num_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    overlap = recipe.parallel.overlap_grad_reduce and cuda and ranks.dp * recipe.parallel.cp > 1
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        use_distributed_optimizer=_distributed(recipe, ranks),
        overlap_param_gather=False,
        check_for_nan_in_grad=False,
        bucket_size=max(40_000_000, 1_000_000 * ranks.dp) if overlap and num_parameters else None,
    )
    return DistributedDataParallel(config=model.config, ddp_config=config, module=model)


def _distributed(recipe: Recipe, ranks: Ranks) -> bool:
    """The distributed optimizer cuts its state over data-parallel ranks; with one there is nothing to cut."""
    return recipe.parallel.distributed_optimizer and ranks.dp * recipe.parallel.cp > 1


def optimizer(recipe: Recipe, model: DistributedDataParallel, ranks: Ranks) -> MegatronOptimizer:
    """Megatron Core's Adam over the trainable parameters; biases and norms take no weight decay."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    o, precision = recipe.optim, recipe.train.precision
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
        params_dtype=next(model.parameters()).dtype,
        use_distributed_optimizer=_distributed(recipe, ranks),
        initial_loss_scale=2.0**16,
    )
    return get_megatron_optimizer(config, [model], use_gloo_process_groups=ranks.device == "cpu")


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


def parameters_of(model: nn.Module) -> Iterator[tuple[str, int, bool]]:
    """Name, elements and trainability of every parameter."""
    for name, parameter in model.named_parameters():
        yield name, parameter.numel(), parameter.requires_grad


def first_microbatch(model: nn.Module) -> Callable[[], None]:
    """A call for the start of every step, without which FP8 layers keep using the weights they cached."""
    marked = [m for m in model.modules() if hasattr(m, "is_first_microbatch")]

    def mark() -> None:
        for module in marked:
            module.is_first_microbatch = True  # type: ignore[assignment]

    return mark


def human(count: float) -> str:
    """`1.24B`, `168M`: a number of parameters."""
    power = min(4, max(0, int(math.log10(max(1.0, count)) // 3)))
    return f"{count / 1000**power:.3g}{('', 'K', 'M', 'B', 'T')[power]}"
