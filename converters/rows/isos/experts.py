"""Mixture of experts, and activations that go by several names."""

from __future__ import annotations

from collections.abc import Mapping

from converters.errors import UsageError
from converters.rows.expr import Value
from converters.rows.isos.base import Fields, layers_of, positive, whole


def moe_layers_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """Every `decoder_sparse_step`-th layer holds experts, those of `mlp_only_layers` never; 1 where all layers do."""
    step, only = hf.get("decoder_sparse_step"), hf.get("mlp_only_layers") or []
    every = 1 if step is None else whole(step, "decoder_sparse_step")
    if not isinstance(only, list) or every < 1:
        raise UsageError(f"config: decoder_sparse_step is {step!r} and mlp_only_layers is {only!r}")
    if every == 1 and not only:
        return {"moe_layer_freq": 1}
    layers = range(layers_of(hf, "num_hidden_layers"))
    return {"moe_layer_freq": [int(layer not in only and (layer + 1) % every == 0) for layer in layers]}


def moe_layers_to_hf(mcore: Mapping[str, Value]) -> Fields:
    """The step that needs the fewest exceptions says the same layers."""
    flags = mcore.get("moe_layer_freq")
    if not isinstance(flags, list):
        return {"decoder_sparse_step": 1, "mlp_only_layers": []}
    spellings: list[tuple[int, int, list[Value]]] = []
    for step in range(1, len(flags) + 1):
        stepped = [layer for layer in range(len(flags)) if (layer + 1) % step == 0]
        if {layer for layer, flag in enumerate(flags) if flag} <= set(stepped):
            only: list[Value] = [layer for layer in stepped if not flags[layer]]
            spellings.append((len(only), step, only))
    _, step, only = min(spellings, key=lambda spelling: spelling[:2])
    return {"decoder_sparse_step": step, "mlp_only_layers": only}


def moe_step_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """Llama 4: the layers of `moe_layers`, else every `interleave_moe_layer_step`-th; 1 where all layers are."""
    layers, listed, step = (
        layers_of(hf, "num_hidden_layers"),
        hf.get("moe_layers"),
        hf.get("interleave_moe_layer_step"),
    )
    every = 1 if step is None else whole(step, "interleave_moe_layer_step")
    if every < 1 or not (listed is None or isinstance(listed, list)):
        raise UsageError(f"config: interleave_moe_layer_step is {step!r} and moe_layers is {listed!r}")
    chosen = range(every - 1, layers, every) if listed is None else listed
    flags: list[Value] = [int(layer in chosen) for layer in range(layers)]
    return {"moe_layer_freq": 1 if all(flags) else flags}


def moe_step_to_hf(mcore: Mapping[str, Value]) -> Fields:
    """The step alone where it says the same layers, else the layers themselves."""
    flags = mcore.get("moe_layer_freq")
    if not isinstance(flags, list):
        return {"interleave_moe_layer_step": 1}
    chosen: list[Value] = [layer for layer, flag in enumerate(flags) if flag]
    for step in range(1, len(flags) + 1):
        if chosen == list(range(step - 1, len(flags), step)):
            return {"interleave_moe_layer_step": step}
    return {"interleave_moe_layer_step": 1, "moe_layers": chosen}


def moe_range_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """ERNIE 4.5: experts in every `moe_layer_interval`-th layer from `moe_layer_start_index` to `moe_layer_end_index`.

    An end of -1, or none, is the last layer.
    """
    layers = layers_of(hf, "num_hidden_layers")
    said = {"moe_layer_interval": 1, "moe_layer_start_index": 1, "moe_layer_end_index": -1}
    said |= {key: whole(hf[key], key) for key in said if hf.get(key) is not None}
    every, first, last = said.values()
    if every < 1:
        raise UsageError(f"config: moe_layer_interval is {every}, a number above 0 was expected")
    last = layers - 1 if last == -1 else last
    return {"moe_layer_freq": [int((n + 1) % every == 0 and first <= n <= last) for n in range(layers)]}


def moe_range_to_hf(mcore: Mapping[str, Value]) -> Fields:
    flags = mcore.get("moe_layer_freq")
    flags = flags if isinstance(flags, list) else [1] * layers_of(mcore, "num_layers")
    chosen = [layer for layer, flag in enumerate(flags) if flag] or [len(flags)]
    every = chosen[1] - chosen[0] if len(chosen) > 1 else 1
    said: Fields = {
        "moe_layer_interval": every,
        "moe_layer_start_index": chosen[0],
        "moe_layer_end_index": -1 if chosen[-1] + every >= len(flags) else chosen[-1],
    }
    if moe_range_to_mcore({**said, "num_hidden_layers": len(flags)})["moe_layer_freq"] != flags:
        raise UsageError(f"moe_layer_freq is {flags!r}; one run of layers at equal distances was expected")
    return said


def first_dense_to_mcore(value: Value, hf: Mapping[str, Value]) -> Value:
    """`first_k_dense_replace` ↔ mcore's flag per layer, always spelt out as Megatron-Bridge does."""
    dense = whole(value, "first_k_dense_replace")
    return [int(layer >= dense) for layer in range(layers_of(hf, "num_hidden_layers"))]


def first_dense_to_hf(value: Value, mcore: Mapping[str, Value]) -> Value:
    if value == 1:
        return 0
    if not isinstance(value, list) or value != sorted(value, key=lambda flag: whole(flag, "moe_layer_freq")):
        raise UsageError(f"config: moe_layer_freq is {value!r}; this architecture has its dense layers first")
    return value.count(0)


def mlp_layers_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """`mlp_layer_types`, or as many dense layers first as `first_k_dense_replace` says (1 where it is absent).

    K-EXAONE says the same by `is_moe_layer` and `first_last_k_dense_replace`, MiMo-V2-Flash by a list of
    `moe_layer_freq`; all that is said must agree.
    """
    kinds = hf.get("mlp_layer_types")
    if kinds is not None and (not isinstance(kinds, list) or set(map(str, kinds)) - {"dense", "sparse"}):
        raise UsageError(f"config: mlp_layer_types is {kinds!r}; layers are dense or sparse")
    said: dict[str, Value] = {}
    for key in ("first_k_dense_replace", "first_last_k_dense_replace"):
        if (dense := hf.get(key)) is not None:
            said[key] = first_dense_to_mcore(dense, hf)
    for key in ("is_moe_layer", "moe_layer_freq"):
        if isinstance(listed := hf.get(key), list):
            said[key] = [int(bool(flag)) for flag in listed]
    if isinstance(kinds, list):
        said["mlp_layer_types"] = [int(kind == "sparse") for kind in kinds]
    flags = next(iter(said.values()), None) or first_dense_to_mcore(1, hf)
    if any(other != flags for other in said.values()):
        raise UsageError("config: " + ", and ".join(f"{key} is {hf[key]!r}" for key in said))
    return {"moe_layer_freq": flags}


def mlp_layers_to_hf(mcore: Mapping[str, Value]) -> Fields:
    """The layers themselves, and their count where it says the same."""
    flags = mcore.get("moe_layer_freq")
    if not isinstance(flags, list):
        flags = [1] * layers_of(mcore, "num_layers")
    kinds: Fields = {"mlp_layer_types": ["sparse" if flag else "dense" for flag in flags]}
    dense_first = [0] * flags.count(0) + [1] * flags.count(1) == flags
    return {**kinds, "first_k_dense_replace": flags.count(0)} if dense_first else kinds


def shared_experts_to_mcore(value: Value, hf: Mapping[str, Value]) -> Value:
    """Number of shared experts ↔ the width of all of them together, None where there is none."""
    count = whole(value or 0, "shared experts")
    return count * whole(hf.get("moe_intermediate_size"), "moe_intermediate_size") or None


def shared_experts_to_hf(value: Value, mcore: Mapping[str, Value]) -> Value:
    width = int(positive(mcore.get("moe_ffn_hidden_size"), "moe_ffn_hidden_size"))
    return whole(value or 0, "moe_shared_expert_intermediate_size") // width


def greedy_groups_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """DeepSeek-V2's `topk_method`: only `group_limited_greedy` looks at expert groups."""
    method = hf.get("topk_method")
    if method not in ("greedy", "group_limited_greedy"):
        raise UsageError(f"config: topk_method is {method!r}; known here are greedy and group_limited_greedy")
    limited = method == "group_limited_greedy"
    return {
        "moe_router_num_groups": hf.get("n_group") if limited else None,
        "moe_router_group_topk": hf.get("topk_group") if limited else None,
    }


def greedy_groups_to_hf(mcore: Mapping[str, Value]) -> Fields:
    groups, top = mcore.get("moe_router_num_groups"), mcore.get("moe_router_group_topk")
    if groups is None:
        return {"topk_method": "greedy", "n_group": 1, "topk_group": 1}
    return {"topk_method": "group_limited_greedy", "n_group": groups, "topk_group": top}


def inexpressible_groups(mcore: Mapping[str, Value]) -> list[str]:
    """Where Megatron Core ranks groups of experts by other scores than the model was trained with, in one line.

    Megatron Core sums a group's best `moe_router_topk // moe_router_group_topk` (`group_limited_topk` of 0.16.1);
    Transformers takes the best one under softmax scores (DeepSeek-V2) and the best two under sigmoid ones
    (DeepSeek-V3, GLM-4.5). Weights convert all the same; a forward pass sends tokens to other experts.
    """
    groups, chosen, topk = (mcore.get(f"moe_router_{name}") for name in ("num_groups", "group_topk", "topk"))
    if not (isinstance(groups, int) and isinstance(chosen, int) and isinstance(topk, int)) or not 0 < chosen < groups:
        return []
    trained, ranked = 1 if mcore.get("moe_router_score_function") == "softmax" else 2, topk // chosen
    if ranked == trained:
        return []
    return [
        f"each of {groups} groups of experts is ranked by its best {trained} in Transformers, and by its best "
        f"{ranked} in Megatron Core (moe_router_topk {topk} // moe_router_group_topk {chosen})"
    ]


def gelu_tanh_to_mcore(hf: Mapping[str, Value]) -> Fields:
    """Gemma's activation: `hidden_activation` wins over `hidden_act`, whose "gelu" always meant the tanh form."""
    name = hf.get("hidden_activation") or hf.get("hidden_act") or "gelu"
    if name not in ("gelu", "gelu_pytorch_tanh"):
        raise UsageError(f"config: the activation is {name!r}; this architecture covers only 'gelu_pytorch_tanh'")
    return {"activation_func": "gelu_tanh"}


def gelu_tanh_to_hf(mcore: Mapping[str, Value]) -> Fields:
    return {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
