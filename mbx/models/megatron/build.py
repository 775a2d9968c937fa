"""Build a Megatron Core model from a flat config (`mbx.models.megatron.config`)."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING

from converters.errors import LayoutError, UnsupportedError, UsageError
from converters.mcore.field_equality import is_idle
from converters.rows.expr import Value
from mbx.installed import core_release
from mbx.models.device import ONE_PROCESS, Spread
from mbx.models.megatron.config import (
    BESIDE_MAMBA_FIELDS,
    MODEL_PREFIX,
    OWN_FIELDS,
    WINDOWED_FIELDS,
    FlatConfig,
    mcore_version,
    number,
    refuse_unknown,
    transformer_config,
)

if TYPE_CHECKING:
    from torch import nn

    from mbx.models.megatron.core.config import TransformerConfig
    from mbx.models.megatron.gemma4 import LayerInputs
    from mbx.models.megatron.layer_kinds import Kinds

# Arguments of ours behind the same prefix: the model class, and what families add to a GPT model.
_LAYERS = """parallel_residual one_layernorm post_layernorms post_layernorms_only
qk_layernorm_over_heads""".split()
_SWITCHES = ("scale_embeddings", "biased_softmax_router", "layer_scalars", "gate_by_head")
_FAMILY = (*_LAYERS, *_SWITCHES, "rotary_base_local", "rotary_percent_local")
#: The argument that makes every layer of a hybrid model attention beside Mamba-2.
_BESIDE_MAMBA = "attention_beside_mamba"
# What the installed Megatron Core has no module for: tensors of it are left in the checkpoint.
_ABSENT = ("mtp_num_layers", "mtp_hybrid_override_pattern", "mtp_block_layers")
#: What tables call the pattern of a hybrid model's layers.
_PATTERN = "hybrid_override_pattern"
_PATTERN_FIELD = MODEL_PREFIX + _PATTERN
_NOT_CONSTRUCTOR = ("mcore_model", "latent_layernorm_epsilon", _BESIDE_MAMBA, *_ABSENT, *_FAMILY)


def build_model(
    config: FlatConfig,
    spread: Spread = ONE_PROCESS,
    *,
    use_te: bool = False,
    padded_vocab_size: int | None = None,
    vp_stage: int | None = None,
    streamed: bool = False,
) -> nn.Module:
    """Build this rank's GPTModel (or hybrid model) inside an initialised process group; weights are random.

    On a CPU, stay inside `megatron_on_cpu` for as long as the model is used. `padded_vocab_size` is the row count of
    the embedding, the true `model.vocab_size` by default; it must be a multiple of the spread's tp. `vp_stage` is the
    model chunk to build where the process group has virtual pipeline stages. The decoder layers of a `streamed` model
    have no weights until `eviction.make_room`.
    Raises what `transformer_config` raises, and `UnsupportedError` for a model this device or version cannot express.
    """
    from mbx.models.megatron.core.groups import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        raise UsageError(
            "no process group: Megatron Core builds models inside one",
            hint="enter `mbx.models.megatron.processes.process_group()` first",
        )
    kind = config.get(MODEL_PREFIX + "mcore_model", "gpt")
    if kind not in ("gpt", "hybrid"):
        raise UsageError(f"model.mcore_model must be `gpt` or `hybrid`, got {kind!r}")
    if kind == "hybrid" and not use_te:
        check_hybrid_without_te(config)
    built = transformer_config(config, spread, use_te=use_te)
    try:
        gpt = kind == "gpt"
        model_class, specs = (
            _gpt_parts(config, built, use_te, vp_stage) if gpt else _hybrid_parts(config, built, use_te, vp_stage)
        )
        if streamed:
            from mbx.models.megatron.eviction import evicting_specs

            specs = evicting_specs(specs)
        arguments = _model_arguments(config, model_class)
        arguments["vocab_size"] = _vocab_size(config, padded_vocab_size, spread.tp)
        arguments["pre_process"] = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        arguments["post_process"] = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        model: nn.Module = model_class(config=built, **specs, **arguments)
    except (ValueError, AssertionError, NotImplementedError, ImportError, AttributeError) as error:
        raise UnsupportedError(
            f"{mcore_version()} cannot build this model on {spread.device} "
            f"({'Transformer Engine' if use_te else 'local'} spec): {error}"
        ) from error
    if gpt or config.get(MODEL_PREFIX + _BESIDE_MAMBA):
        from mbx.models.megatron.family_hooks import add_family_hooks

        add_family_hooks(model, config)
    if gpt:
        if (inputs := _layer_inputs(config)) is not None:
            from mbx.models.megatron.gemma4 import connect

            connect(model, inputs)
        if config.get(MODEL_PREFIX + "qk_layernorm_over_heads"):
            # From here on it means that ranks of tensor parallelism each hold a whole such norm, whose gradients
            # `finalize_model_grads` sums; these are cut.
            built.qk_layernorm = False
    latent = config.get(MODEL_PREFIX + "latent_layernorm_epsilon")
    if isinstance(latent, float) and latent != built.layernorm_epsilon:
        from mbx.models.megatron.family_layers import set_latent_epsilon

        set_latent_epsilon(model, latent)
    if not gpt:
        from mbx.models.megatron.hybrid_layers import set_mixer_epsilon

        set_mixer_epsilon(model, built.layernorm_epsilon)
    return model.to(spread.device)


def check_hybrid_without_te(config: FlatConfig) -> None:
    """UnsupportedError for a hybrid model that the installed Megatron Core builds with Transformer Engine only."""
    if not (core_release().hybrid_without_te and config.get(_PATTERN_FIELD)):
        raise UnsupportedError(
            f"{mcore_version()} builds hybrid (Mamba) models with Transformer Engine only",
            hint="run this leg on a GPU with Transformer Engine and mamba-ssm installed",
        )


def _refuse_own(config: FlatConfig, fields: Iterable[str], built_without: str) -> None:
    """UnsupportedError that names those of `fields` that `config` has a use of."""
    if added := [f"`{name}`" for name in fields if not is_idle(name, config.get(name))]:
        raise UnsupportedError(f"{', '.join(added)}: {built_without} are built without")


def _gpt_parts(
    config: FlatConfig, built: TransformerConfig, use_te: bool, vp_stage: int | None
) -> tuple[type[nn.Module], dict[str, object]]:
    _refuse_own(config, (MODEL_PREFIX + _BESIDE_MAMBA, *BESIDE_MAMBA_FIELDS), "GPT models")
    from mbx.models.megatron.core.layers import GPTModel
    from mbx.models.megatron.specs import FamilyParts, gpt_block_spec, mtp_block_spec

    parts = FamilyParts(
        **{name: bool(config.get(MODEL_PREFIX + name)) for name in _LAYERS},
        kinds=_kinds(config),
        layer_inputs=_layer_inputs(config),
        softcapped=bool(config.get("attn_logit_softcapping")),
    )
    block = gpt_block_spec(built, use_te=use_te, parts=parts, vp_stage=vp_stage)
    return GPTModel, {
        "transformer_layer_spec": block,
        "mtp_block_spec": mtp_block_spec(built, block, use_te=use_te, vp_stage=vp_stage),
        "vp_stage": vp_stage,
    }


def _kinds(config: FlatConfig) -> Kinds | None:
    """What sets windowed layers apart, None where nothing does."""
    from mbx.models.megatron.layer_kinds import Kinds

    base, share, scale = (
        number(config, name)
        for name in ("model.rotary_base_local", "model.rotary_percent_local", "attention_value_scale")
    )
    width = None if config.get("multi_latent_attention") else number(config, "v_head_dim")
    fields = {name: config.get(f"windowed_{name}") for name in WINDOWED_FIELDS}
    kinds = Kinds(
        base,
        1.0 if share is None else share,
        {name: value for name, value in fields.items() if value is not None},
        None if width is None else int(width),
        scale,
        bool(config.get(MODEL_PREFIX + "gate_by_head")),
    )
    return None if kinds == Kinds() else kinds


def _layer_inputs(config: FlatConfig) -> LayerInputs | None:
    """What layers of Gemma 4 take from one another and from the tokens, None for another model."""
    if not config.get(MODEL_PREFIX + "layer_scalars"):
        return None
    from mbx.models.megatron.gemma4 import LayerInputs

    sizes = ("num_kv_shared_layers", "per_layer_input_size", "per_layer_vocab_size")
    shared, width, vocab = (int(number(config, name) or 0) if config.get(name) else 0 for name in sizes)
    wide, same = (bool(config.get(name)) for name in ("use_double_wide_mlp", "attention_k_eq_v"))
    return LayerInputs(shared, wide, same, width, vocab)


def _hybrid_parts(
    config: FlatConfig, built: TransformerConfig, use_te: bool, vp_stage: int | None
) -> tuple[type[nn.Module], dict[str, object]]:
    beside = bool(config.get(MODEL_PREFIX + _BESIDE_MAMBA))
    had = ("embedding_multiplier",) if beside else ()
    others = [*(MODEL_PREFIX + name for name in _FAMILY), *OWN_FIELDS, *(() if beside else BESIDE_MAMBA_FIELDS)]
    _refuse_own(config, [name for name in others if name not in had], "hybrid models")
    if vp_stage is not None:
        raise UnsupportedError(f"{mcore_version()} has no virtual pipeline stages for hybrid models")
    from mbx.models.megatron.core.hybrid import HybridModel, hybrid_stack_spec

    if beside:
        from mbx.models.megatron.beside_mamba import beside_mamba_spec, beside_of

        spec = beside_mamba_spec(built, beside_of(config), use_te=use_te)
        return HybridModel, {core_release().hybrid_spec: spec, core_release().hybrid_pattern: "*" * built.num_layers}
    spec = hybrid_stack_spec
    if not use_te:
        from mbx.models.megatron.hybrid_layers import local_hybrid_spec

        spec = local_hybrid_spec(built, str(config[_PATTERN_FIELD]))
    return HybridModel, {core_release().hybrid_spec: spec}


def _model_arguments(config: FlatConfig, model_class: type) -> dict[str, Value]:
    names = {k[len(MODEL_PREFIX) :]: v for k, v in config.items() if k.startswith(MODEL_PREFIX)}
    arguments = {k: v for k, v in names.items() if k not in _NOT_CONSTRUCTOR}
    if _PATTERN in arguments:
        arguments[core_release().hybrid_pattern] = arguments.pop(_PATTERN)
    accepted = set(inspect.signature(model_class).parameters)
    arguments = {k: v for k, v in arguments.items() if k in accepted or not is_idle(MODEL_PREFIX + k, v)}
    refuse_unknown([MODEL_PREFIX + k for k in sorted(set(arguments) - accepted)], model_class.__name__)
    missing = [MODEL_PREFIX + k for k in ("vocab_size", "max_sequence_length") if k not in arguments]
    if missing:
        raise UsageError(f"the config lacks {', '.join(missing)}")
    return arguments


def _vocab_size(config: FlatConfig, padded: int | None, tp: int) -> int:
    true = config[MODEL_PREFIX + "vocab_size"]
    if not isinstance(true, int):
        raise UsageError(f"model.vocab_size must be an integer, got {true!r}")
    rows = true if padded is None else padded
    if rows < true:
        raise UsageError(f"padded vocabulary of {rows} rows is smaller than the true one of {true}")
    if rows % tp:
        up = -(-rows // tp) * tp
        raise LayoutError(f"vocabulary of {rows} rows does not divide by tp {tp}", hint=f"pad it to {up} rows")
    return rows
