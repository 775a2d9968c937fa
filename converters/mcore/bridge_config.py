"""Megatron-Bridge's `run_config.yaml` and Megatron Core's config fields, both ways, as far as they describe a model.

A node with `_target_` stands for an object that Bridge would build; here it is plain data, and nothing is
imported for it. Sources: run_config.yaml files of Megatron-Bridge 0.3.1 and 0.6.2, and the loaders of 0.3.1 to 0.6.2,
which leave out fields that their classes do not have.
"""

from __future__ import annotations

from collections.abc import Mapping

from converters.errors import UsageError
from converters.mcore.bridge_families import DEFAULT, Family, family_named, spec_for
from converters.mcore.bridge_providers import SINCE_0_4, respelt, settled
from converters.mcore.bridge_towers import families_of_any, towers_of
from converters.mcore.field_equality import is_idle, listed
from converters.mcore.layout import Layout
from converters.mcore.megatron_args import FIELDS_OF_BOTH, MODEL_ARGUMENTS, TRAINING, is_plain, sizes_of_both
from converters.mcore.statement import NAME, completed, statement_of
from converters.rows.config_map import check_fields
from converters.rows.expr import Value

_ACTIVATIONS = {
    "silu": "torch.nn.functional.silu",
    "gelu": "torch.nn.functional.gelu",
    "gelu_tanh": "megatron.core.activations.fast_gelu",
    "squared_relu": "megatron.core.activations.squared_relu",
    "quick_gelu": "megatron.core.fusions.fused_bias_geglu.quick_gelu",
}
#: By the function's own name: some of Bridge's modules define the same function again.
_BY_TARGET = {target.rpartition(".")[2]: name for name, target in _ACTIVATIONS.items()}
_DTYPES = {"BF16": "torch.bfloat16", "F16": "torch.float16", "F32": "torch.float32"}
#: Fields that are a plain value wherever they are stated.
_STATED = ("num_query_groups", "num_moe_experts", "gated_linear_unit")
#: A field that says whether a model has a part, by which value where not by any, and how the fields of that part
#: begin; others mean nothing without.
_PARTS: tuple[tuple[str, Value, str], ...] = (
    *(("num_moe_experts", None, "moe_"), ("experimental_attention_variant", "gated_delta_net", "linear_")),
    ("experimental_attention_variant", "dsa", "dsa_"),
    *(("multi_latent_attention", None, "rotary_scaling_factor"), ("multi_latent_attention", None, "rope_type")),
)
#: What is said of YaRN alone.
_OF_YARN = ("beta_fast", "beta_slow", "original_max_position_embeddings")
_DIVISOR = "make_vocab_size_divisible_by"
_CHECKPOINT = "megatron.bridge.training.config.CheckpointConfig"
_TOKENIZER = "megatron.bridge.training.tokenizers.config.TokenizerConfig"
_CONTAINER = "megatron.bridge.training.config.ConfigContainer"


def config_of_run_config(run_config: Mapping[str, object]) -> dict[str, Value]:
    """Flat Megatron Core config of the `model` node, empty where there is none; UsageError for what no config has."""
    model = run_config.get("model")
    if not isinstance(model, Mapping):
        return {}
    out: dict[str, Value] = {}
    for field in FIELDS_OF_BOTH:
        if field in model and (value := _plain(model[field])) is not _OBJECT:
            out[field] = value
    out |= {field: _stated(model, field) for field in _STATED if field in model}
    for part, kind, start in _PARTS:
        if not out.get(part) or kind not in (None, out[part]):
            out = {field: value for field, value in out.items() if not field.startswith(start)}
    if out.get("rope_type") == "yarn" and out.get("rotary_scaling_factor") == 1:
        # The class's own default, where a folder has no scaling; by factor 1 nothing is scaled.
        out = {**{field: value for field, value in out.items() if field not in _OF_YARN}, "rope_type": "rope"}
    if not model.get("is_hybrid_model"):
        out = {field: value for field, value in out.items() if not field.startswith("mamba_")}
    own = {field for family in families_of_any(model) for field in family.own}
    out |= {field: _stated(model, field) for field in sorted(own) if field in model}
    if isinstance(node := model.get("activation_func"), Mapping):
        target = str(node.get("_target_"))
        out["activation_func"] = _BY_TARGET.get(target.rpartition(".")[2], target)
    out |= {f"model.{field}": _stated(model, field) for field in MODEL_ARGUMENTS if field in model}
    if "seq_length" in model:
        out["model.max_sequence_length"] = _stated(model, "seq_length")
    if not out.get("model.rope_scaling"):
        out.pop("model.rope_scaling_factor", None)
    out = settled(model, out)
    out = completed(out, run_config, "run_config.yaml")
    check_fields(out, "run_config.yaml")
    return out


class _Object:
    """Marks a node that stands for an object, of which nothing is read."""


_OBJECT: Value = _Object()  # type: ignore[assignment]


def _plain(node: object) -> Value:
    if isinstance(node, Mapping):
        args = node.get("_args_")
        return _plain(args[0]) if isinstance(args, list) and len(args) == 1 and is_plain(args[0]) else _OBJECT
    return node if is_plain(node) else _OBJECT  # type: ignore[return-value]


def _stated(model: Mapping[str, object], field: str) -> Value:
    """A field that is always a plain value; UsageError where it is an object."""
    if (value := _plain(model[field])) is _OBJECT:
        raise UsageError(f"run_config.yaml: `model.{field}` is {model[field]!r}; a plain value was expected")
    return value


def vocab_divisor_of(run_config: Mapping[str, object]) -> int | None:
    """make_vocab_size_divisible_by, where the vocabulary was padded at all."""
    model = run_config.get("model")
    if not isinstance(model, Mapping):
        return None
    divisor = model.get(_DIVISOR) if model.get("should_pad_vocab") else 1
    return divisor if isinstance(divisor, int) and not isinstance(divisor, bool) and divisor > 0 else None


def run_config_of(
    config: Mapping[str, Value],
    layout: Layout,
    rows: int | None,
    dtype: str,
    tokenizer: str | None,
    format: str = "torch_dist",
    architectures: tuple[str, ...] = (),
    whole: Mapping[str, Value] | None = None,
) -> dict[str, object] | None:
    """A run_config that Megatron-Bridge's loader reads, None for a kind of model that none of its providers builds.

    `rows` are the stored embedding's, `dtype` the weights' storage dtype; `tokenizer` is a hub name or a folder.
    `architectures` are the model's Hugging Face classes; `whole` is its config.json where its towers are stored too.
    Law: `config_of_run_config` of it agrees in every field.
    """
    towers = None if whole is None else towers_of(architectures, whole)
    family = family_named(architectures) if whole is None else towers and towers.family
    if family is None and (whole is not None or not is_plain_gpt(config)):
        return None
    if config.get("activation_func") not in _ACTIVATIONS or dtype not in _DTYPES:
        return None
    model = _model_node(config, layout, rows, dtype, family or DEFAULT)
    if towers is not None and whole is not None:
        model |= towers.fields(whole)
    checkpoint = {"_target_": _CHECKPOINT, "ckpt_format": format, "fully_parallel_save": True}
    checkpoint |= {"save_optim": False, "save_rng": False}
    out: dict[str, object] = {"_target_": _CONTAINER, "checkpoint": checkpoint, "model": model}
    if tokenizer is not None:
        node = {"_target_": _TOKENIZER, "tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": tokenizer}
        out["tokenizer"] = node
    out[NAME] = statement_of(architectures, config, config_of_run_config(out))
    return out


def is_plain_gpt(config: Mapping[str, Value]) -> bool:
    """Whether Bridge's plain provider builds all of a model: every field that is not idle is one that it has."""
    known = {*FIELDS_OF_BOTH, *_STATED, "activation_func", *(f"model.{f}" for f in MODEL_ARGUMENTS)}
    others = {name: value for name, value in config.items() if name not in known and name not in TRAINING}
    if config.get("multi_latent_attention") or config.get("experimental_attention_variant"):
        return False
    return all(is_idle(name, value) for name, value in others.items())


def _model_node(
    config: Mapping[str, Value], layout: Layout, rows: int | None, dtype: str, family: Family
) -> dict[str, object]:
    """The `model` node: every field that the family's provider has, in its own words."""
    size = config.get("model.vocab_size")
    padded = isinstance(size, int) and layout.padded_vocab(size) == rows
    model: dict[str, object] = {"_target_": family.provider, SINCE_0_4: None}
    model |= {field: config[field] for field in (*FIELDS_OF_BOTH, *_STATED, *family.own) if field in config}
    model |= {f: config[f"model.{f}"] for f in MODEL_ARGUMENTS if f"model.{f}" in config}
    layers = config.get("num_layers")
    for pattern in ("moe_layer_freq", "linear_attention_freq"):
        if config.get(pattern) not in (None, 1) and isinstance(layers, int):
            model[pattern] = listed(pattern, config[pattern], layers)
    model |= {
        "activation_func": {"_call_": False, "_target_": _ACTIVATIONS[str(config["activation_func"])]},
        "seq_length": config.get("model.max_sequence_length"),
        "vocab_size": size if padded else rows,
        "should_pad_vocab": padded,
        **sizes_of_both(layout),
        "num_layers_in_first_pipeline_stage": layout.first_stage,
        "num_layers_in_last_pipeline_stage": layout.last_stage,
        "params_dtype": {"_call_": False, "_target_": _DTYPES[dtype]},
        "bf16": dtype == "BF16",
        "fp16": dtype == "F16",
        "perform_initialization": False,
        **respelt(family.provider, config),
    }
    # What tells the family from its neighbours; a divisor of the vocabulary means nothing where nothing is padded.
    free = TRAINING if padded else {*TRAINING, _DIVISOR}
    marks = {mark: value for mark, value in family.marks.items() if mark not in model or mark in free}
    if config.get("experimental_attention_variant"):
        model["hetereogenous_dist_checkpoint"] = True  # sic: a key a layer
    if (spec := spec_for(family, config)) is not None:
        model["transformer_layer_spec"] = spec.node
    return {**model, **marks}
