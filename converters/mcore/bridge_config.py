"""Megatron-Bridge's `run_config.yaml` and Megatron Core's config fields, both ways, as far as they describe a model.

A node with `_target_` stands for an object that Bridge would build; here it is plain data, and nothing is
imported for it. Source: run_config.yaml files of Megatron-Bridge 0.3.1.
"""

from __future__ import annotations

from collections.abc import Mapping

from converters.errors import UsageError
from converters.mcore.bridge_providers import settled
from converters.mcore.layout import Layout
from converters.mcore.megatron_args import FIELDS_OF_BOTH, MODEL_ARGUMENTS, is_plain, sizes_of_both
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
#: Fields of models that GPTModelProvider does not build.
_OTHER_PROVIDERS = """multi_latent_attention experimental_attention_variant heterogeneous_block_specs
block_configs""".split()
#: Fields that are a plain value wherever they are stated.
_STATED = ("num_query_groups", "num_moe_experts", "gated_linear_unit")
#: A field that says whether a model has a part, and how the fields of that part begin; others mean nothing without.
_PARTS = (
    *(("num_moe_experts", "moe_"), ("experimental_attention_variant", "linear_")),
    *(("multi_latent_attention", "rotary_scaling_factor"), ("multi_latent_attention", "rope_type")),
)
_PROVIDER = "megatron.bridge.models.gpt_provider.GPTModelProvider"
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
    for part, start in _PARTS:
        if not out.get(part):
            out = {field: value for field, value in out.items() if not field.startswith(start)}
    if not model.get("is_hybrid_model"):
        out = {field: value for field, value in out.items() if not field.startswith("mamba_")}
    if isinstance(node := model.get("activation_func"), Mapping):
        target = str(node.get("_target_"))
        out["activation_func"] = _BY_TARGET.get(target.rpartition(".")[2], target)
    out |= {f"model.{field}": _stated(model, field) for field in MODEL_ARGUMENTS if field in model}
    if "seq_length" in model:
        out["model.max_sequence_length"] = _stated(model, "seq_length")
    if not out.get("model.rope_scaling"):
        out.pop("model.rope_scaling_factor", None)
    out = settled(model, out)
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
    divisor = model.get("make_vocab_size_divisible_by") if model.get("should_pad_vocab") else 1
    return divisor if isinstance(divisor, int) and not isinstance(divisor, bool) and divisor > 0 else None


def run_config_of(
    config: Mapping[str, Value],
    layout: Layout,
    rows: int | None,
    dtype: str,
    tokenizer: str | None,
    format: str = "torch_dist",
) -> dict[str, object] | None:
    """A run_config that Megatron-Bridge's loader reads, None for a kind of model whose provider is not known here.

    `rows` are the stored embedding's, `dtype` the weights' storage dtype; `tokenizer` is a hub name or a folder.
    """
    if config.get("model.mcore_model", "gpt") != "gpt" or any(config.get(field) for field in _OTHER_PROVIDERS):
        return None
    if config.get("activation_func") not in _ACTIVATIONS or dtype not in _DTYPES:
        return None
    size = config.get("model.vocab_size")
    padded = isinstance(size, int) and layout.padded_vocab(size) == rows
    fields = [field for field in (*FIELDS_OF_BOTH, *_STATED) if field in config]
    model: dict[str, object] = {"_target_": _PROVIDER, **{field: config[field] for field in fields}}
    model |= {f: config[f"model.{f}"] for f in MODEL_ARGUMENTS if f"model.{f}" in config}
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
    }
    checkpoint = {"_target_": _CHECKPOINT, "ckpt_format": format, "fully_parallel_save": True}
    checkpoint |= {"save_optim": False, "save_rng": False}
    out: dict[str, object] = {"_target_": _CONTAINER, "checkpoint": checkpoint, "model": model}
    if tokenizer is not None:
        node = {"_target_": _TOKENIZER, "tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": tokenizer}
        out["tokenizer"] = node
    return out
