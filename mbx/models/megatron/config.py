"""A TransformerConfig from a flat config: what a table says of a model, for one layout, dtype and device.

A flat config maps TransformerConfig field names to JSON values, and GPTModel constructor arguments under a `model.`
prefix. Nothing in it is dropped: a key the installed Megatron Core does not know is an error that names it, unless
it is off (None or False), which is how that Megatron Core is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, TypeAlias

from converters.errors import DeviceError, LayoutError, UnsupportedError, UsageError
from converters.rows.expr import Value
from converters.rows.isos.rope import YARN
from mbx.installed import core_release, core_version
from mbx.models.device import DTYPES, ONE_PROCESS, Spread

if TYPE_CHECKING:
    import torch

    from mbx.models.megatron.core.config import TransformerConfig

FlatConfig: TypeAlias = Mapping[str, Value]

MODEL_PREFIX = "model."
# Set by the layout, the dtype or the device, never by a model's config.
_OWNED = """tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size
expert_tensor_parallel_size params_dtype pipeline_dtype bf16 fp16 use_cpu_initialization transformer_impl""".split()
# Speed, not mathematics: kernels and dispatch that exist on CUDA only. A CPU build turns them off.
_CUDA_ONLY: dict[str, Value] = {
    **dict.fromkeys(
        """apply_rope_fusion bias_activation_fusion bias_dropout_fusion cross_entropy_loss_fusion fused_single_qkv_rope
        gradient_accumulation_fusion masked_softmax_fusion memory_efficient_layer_norm moe_grouped_gemm
        moe_permute_fusion moe_router_fusion moe_shared_expert_overlap persist_layer_norm
        use_fused_weighted_squared_relu""".split(),
        False,
    ),
    "moe_token_dispatcher_type": "allgather",
}
# Of YaRN's constants, those that no class has a default for.
_YARN_NEEDED = ("yarn_rotary_scaling_factor", "yarn_original_max_position_embeddings")
#: `windowed_NAME` is the field NAME in windowed layers.
WINDOWED_FIELDS = "num_attention_heads num_query_groups kv_channels softmax_type".split()
#: Fields of families that no Megatron Core has: `family_hooks` reads them from the flat config. `rope_dynamic_factor`
#: changes nothing before the end of the context, where sequences end here.
OWN_FIELDS = """attn_logit_softcapping final_logit_softcapping embedding_multiplier residual_multiplier logits_scaling
logit_scale llama_4_scaling_beta rope_dynamic_factor attention_value_scale
rope_proportion attention_k_eq_v num_kv_shared_layers use_double_wide_mlp per_layer_input_size
per_layer_vocab_size short_conv_layers short_conv_kernel_size swiglu_limits swiglu_limits_shared
kda_num_heads kda_head_dim kda_conv_kernel_dim kda_gate_lower_bound attn_res_block_size
lightning_indexer_layers index_n_heads index_head_dim index_block_size index_topk_blocks index_local_blocks""".split()
OWN_FIELDS += [f"windowed_{name}" for name in WINDOWED_FIELDS]
#: Fields of models with attention beside Mamba-2 in a layer.
BESIDE_MAMBA_FIELDS = """rmsnorm norm_before_gate attention_in_multiplier attention_out_multiplier key_multiplier
ssm_in_multiplier ssm_out_multiplier ssm_multipliers mlp_multipliers lm_head_multiplier""".split()
# Any of these lets stages hold different numbers of layers; mcore checks those itself.
_UNEVEN_STAGES = """num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage pipeline_model_parallel_layout
account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split""".split()
# MLA ignores GPTModel's rotary arguments and reads the config's; the same word must not mean two things.
_MLA_ROTARY = ("rotary_base", "rotary_percent")


def transformer_config(config: FlatConfig, spread: Spread = ONE_PROCESS, *, use_te: bool = False) -> TransformerConfig:
    """Turn a flat config into a TransformerConfig (MLATransformerConfig under `multi_latent_attention`).

    Dropout is 0 unless the config sets it (mcore's default of 0.1 belongs to no converted model). On a CPU, fusions
    and CUDA dispatchers are off whatever the config says; they change speed, not results.
    Raises `UnsupportedError` for a field this Megatron Core has not or a combination it refuses, `LayoutError` for a
    parallel layout that does not divide the model, `DeviceError` for Transformer Engine where there is none.
    """
    import torch

    from mbx.models.megatron.core import config as core

    dtype, on_cpu = spread.dtype, spread.device == "cpu"
    torch_dtype = dict(zip(DTYPES, (torch.float32, torch.bfloat16, torch.float16), strict=True))[dtype]
    _check_te(spread.device, use_te)
    _check_layout(config, spread)

    indexer = _indexer(config)
    mla = bool(config.get("multi_latent_attention"))
    config_class = core.MLATransformerConfig if mla else core.TransformerConfig
    if config.get("heterogeneous_block_specs"):
        config, config_class = _with_encoded_layers(config), core.HeterogeneousTransformerConfig
    known = {field.name for field in fields(config_class) if field.init}
    yarn = not mla and config.get(MODEL_PREFIX + "position_embedding_type") == "yarn"
    # GPTModel (0.16.1, position_embedding_type="yarn") reads these from the config, which does not declare them; what
    # a recipe leaves out (TOML has no null) is what Transformers takes for an absent key
    said = {field: config.get(field, default) for field, default in YARN.values()} if yarn else {}
    if yarn and (unsaid := [field for field in _YARN_NEEDED if said[field] is None]):
        raise UnsupportedError(f"position_embedding_type=yarn needs {' and '.join(unsaid)}")
    extra = {field: value for field, value in said.items() if field not in known}
    # fields with a dot are the model's arguments, or of what stands beside the text
    own = (*OWN_FIELDS, *BESIDE_MAMBA_FIELDS, *(() if mla else ("v_head_dim",)))
    values = {k: v for k, v in config.items() if "." not in k and k not in extra and k not in own}
    values = {k: v for k, v in values.items() if k in known or k in _OWNED or (v is not None and v is not False)}
    if mla:
        values.update(_mla_rotary(config))
    refuse_unknown(sorted(set(values) - known), "TransformerConfig")
    if owned := [name for name in _OWNED if name in values]:
        raise UsageError(
            f"{', '.join(f'`{name}`' for name in owned)} follow from the layout, dtype and device",
            hint="pass them as arguments instead of config keys",
        )
    if mla and values.get("softmax_scale") is not None:
        raise UnsupportedError(
            f"{mcore_version()} computes the softmax scale of MLA itself and ignores `softmax_scale`"
        )
    if values.get("moe_latent_size") is not None and not use_te:
        raise UnsupportedError(f"{mcore_version()} builds `moe_latent_size` with Transformer Engine only")
    if on_cpu and (low := next((name for name in ("fp8", "fp4") if values.get(name) is not None), None)):
        raise UnsupportedError(
            f"{low}={values[low]!r} needs a GPU with Transformer Engine", hint=f"build without {low}"
        )

    arguments: dict[str, object] = {
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        **indexer,
        **spread.sizes,
        **values,
    }
    if "activation_func" in values:
        arguments["activation_func"] = _activation(values["activation_func"])
    if values.get("window_size") is not None:
        arguments["window_size"] = _window(values["window_size"])
    for name in ("moe_layer_freq", "linear_attention_freq", "window_attn_skip_freq", "no_rope_freq"):
        pattern = arguments.get(name)
        if isinstance(pattern, Sequence) and not isinstance(pattern, str):
            arguments[name] = list(pattern)  # mcore tells a per-layer pattern by its being a list
    if on_cpu:
        arguments.update({name: value for name, value in _CUDA_ONLY.items() if name in known})
    else:
        arguments.setdefault("gradient_accumulation_fusion", False)  # True needs Apex
    arguments.update(
        params_dtype=torch_dtype,
        pipeline_dtype=torch_dtype,
        bf16=dtype == "bf16",
        fp16=dtype == "fp16",
        use_cpu_initialization=on_cpu,
        transformer_impl="transformer_engine" if use_te else "local",
    )
    try:
        built = config_class(**arguments)
    except (ValueError, AssertionError, NotImplementedError, ImportError) as error:
        raise UnsupportedError(f"{mcore_version()} refuses this config: {error}") from error
    for name, value in extra.items():
        setattr(built, name, value)
    return built


def _with_encoded_layers(config: FlatConfig) -> FlatConfig:
    """`block_configs`, which say each layer's widths, as the JSON text that Megatron Core reads them from."""
    layers = config.get("block_configs")
    if not isinstance(layers, list) or len(layers) != config.get("num_layers"):
        raise UsageError("`heterogeneous_block_specs` needs `block_configs`, one a layer")
    kept = {k: v for k, v in config.items() if k not in ("block_configs", "heterogeneous_block_specs")}
    return {**kept, "heterogeneous_layers_config_encoded_json": json.dumps({"block_configs": layers})}


def _mla_rotary(config: FlatConfig) -> dict[str, Value]:
    moved: dict[str, Value] = {}
    for name in _MLA_ROTARY:
        argument = config.get(MODEL_PREFIX + name)
        if argument is None:
            continue
        if config.get(name, argument) != argument:
            raise UsageError(f"`{name}` is {config[name]!r} but `model.{name}` is {argument!r}; MLA reads the former")
        moved[name] = argument
    if config.get(MODEL_PREFIX + "rope_scaling"):
        raise UnsupportedError(f"{mcore_version()} ignores `model.rope_scaling` under multi_latent_attention")
    return moved


def _indexer(config: FlatConfig) -> dict[str, Value]:
    """How sparse attention chooses unless the config says it; UnsupportedError where Megatron Core has none."""
    if config.get("experimental_attention_variant") != "dsa":
        return {}
    if not core_release().sparse_attention:
        raise UnsupportedError(f"{mcore_version()} cannot build this model's sparse attention; 0.19 can")
    # Turned by one orthogonal matrix, queries and keys have the same products; the package for it takes bf16 alone.
    return {"dsa_indexer_rotate_activation": False}


def _activation(name: Value) -> Callable[[torch.Tensor], torch.Tensor]:
    import torch.nn.functional as F

    from mbx.models.megatron.core.config import fast_gelu, quick_gelu, squared_relu

    functions: dict[object, Callable[[torch.Tensor], torch.Tensor]] = {
        **{"silu": F.silu, "gelu": F.gelu, "gelu_tanh": fast_gelu},
        **{"squared_relu": squared_relu, "quick_gelu": quick_gelu},
    }
    if not isinstance(name, str) or name not in functions:
        raise UnsupportedError(f"activation_func must be one of {', '.join(map(str, functions))}, got {name!r}")
    return functions[name]


def _window(value: Value) -> tuple[int, int]:
    if isinstance(value, Sequence) and len(value) == 2:
        left, right = value
        if isinstance(left, int) and isinstance(right, int):
            return left, right
    raise UsageError(f"window_size must be two integers [left, right] or null, got {value!r}")


def _check_te(device: str, use_te: bool) -> None:
    import importlib.util

    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device `cuda` is not available", hint="use device `cpu`")
    if use_te and (device == "cpu" or importlib.util.find_spec("transformer_engine") is None):
        raise DeviceError(
            "the Transformer Engine spec needs a GPU and the transformer_engine package",
            hint="use the local spec on a CPU",
        )


def _check_layout(config: FlatConfig, spread: Spread) -> None:
    tp, pp, ep = spread.tp, spread.pp, spread.ep
    for size, axis, field in ((tp, "tp", "num_attention_heads"), (ep, "ep", "num_moe_experts")):
        count = config.get(field)
        if size > 1 and (not isinstance(count, int) or count % size):
            raise LayoutError(f"{axis} {size} does not divide {field} {count}")
    layers = config.get("num_layers")
    if pp > 1 and not any(config.get(name) for name in _UNEVEN_STAGES) and isinstance(layers, int) and layers % pp:
        raise LayoutError(f"pp {pp} does not divide num_layers {layers}")


def refuse_unknown(names: list[str], owner: str) -> None:
    """UnsupportedError that names the fields `owner` has not, if there are any."""
    if names:
        raise UnsupportedError(
            f"{mcore_version()} has no {owner} field {', '.join(f'`{name}`' for name in names)}",
            hint="a newer megatron-core may have it, or the mapping table misspells it",
        )


def mcore_version() -> str:
    """The installed Megatron Core, as messages name it."""
    return f"megatron-core {core_version()}"


def number(config: FlatConfig, field: str) -> float | None:
    """A factor of the config, None where it does nothing."""
    value = config.get(field)
    if value is None or value is False:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UsageError(f"`{field}` must be a number above 0, got {value!r}")
    return float(value)
