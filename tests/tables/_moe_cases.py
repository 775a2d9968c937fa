"""The families of `test_families_moe.py`: which there are, their variants, and headers that reach every row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fixtures.by_hand import ernie_mtp
from fixtures.families import FAMILIES, Family
from fixtures.headers import hub_headers
from fixtures.index import Header
from fixtures.make_tiny import make, tiny_config
from mbx.formats.safetensors_folder import read_folder

Case = tuple[Mapping[str, Any], Mapping[str, Header]]

#: Families that Megatron Core runs on a CPU, and those that need a GPU.
ON_A_CPU = (
    "qwen3_moe",
    "gpt_oss",
    "mixtral",
    "qwen2_moe",
    "deepseek_v2",
    "deepseek_v2_lite",
    "deepseek_v3",
    "kimi_k2",
    "moonlight",
    "glm4_moe",
    "glm4_moe_air",
    "glm_4_7_flash",
    "dots1",
    "hy3",
    "exaone_moe",
    "exaone_moe_alone",
    "llama4_scout",
    "llama4_maverick",
    "olmoe",
    "minimax_m2",
    "minimax_m3",
    "ernie4_5_moe",
    "mimo_v2_flash",
    "gemma4_31b",
    "gemma4_e2b",
    "gemma4_26b",
)
ELSEWHERE = (
    *("lfm2", "lfm2_moe", "kimi_linear", "kimi_k3"),
    *("glm_5", "glm_5_2", "deepseek_v32"),
    "sarvam_moe",
    "bailing_moe_v2",
    "deepseek",
    "step_3_5_flash",
    "qwen3_next",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "nemotron_h",
    "nemotron_nano_v2",
    "nemotron_nano_v3",
    "nemotron_super",
    "falcon_h1_0_5b",
)
ALL = (*ON_A_CPU, *ELSEWHERE)
#: Families without a Transformers class, so without layout v5.
REMOTE_CODE = ("kimi_k2", "sarvam_moe", "bailing_moe_v2", "deepseek", "step_3_5_flash", "kimi_linear")
REMOTE_CODE += ("kimi_k3",)
LAYOUTS = [(name, layout) for name in ALL for layout in ("v4", "v5") if layout == "v4" or name not in REMOTE_CODE]
LAYOUTS += [("step_3_5_flash_with_heads", "v4")]

#: Config keys over a family's: paths that its own tiny config does not take.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe_dense_layer": ("qwen3_moe", {"mlp_only_layers": [1]}),
    "qwen3_moe_all_softmax": ("qwen3_moe", {"norm_topk_prob": False}),
    "qwen2_moe_dense_layer": ("qwen2_moe", {"decoder_sparse_step": 2}),
    "mixtral_window": ("mixtral", {"sliding_window": 8}),
    # Megatron Core ranks a group by its best topk // topk_group experts, Transformers by its best two.
    "deepseek_v3_one_a_group": ("deepseek_v3", {"num_experts_per_tok": 2}),
    "kimi_k2_by_class": ("kimi_k2", {"model_type": "deepseek_v3"}),
    "moonlight_with_heads": ("moonlight", {"num_nextn_predict_layers": 1}),
    "step_3_5_flash_with_heads": (
        "step_3_5_flash",
        {
            "layer_types": ["full_attention", *["sliding_attention"] * 4],
            "num_nextn_predict_layers": 1,
            "partial_rotary_factors": [0.5, *[1.0] * 4],
            "rope_theta": [5000000.0, *[10000.0] * 4],
            "swiglu_limits": [0.0, 0.0, 0.5, 0.25, 0.0],
            "swiglu_limits_shared": [0.75, 0.0, 0.0, 0.5, 0.0],
        },
    ),
    "glm_4_7_flash_with_heads": ("glm_4_7_flash", {"num_nextn_predict_layers": 1}),
    "glm_4_7_flash_whole_queries": ("glm_4_7_flash", {"q_lora_rank": None}),
    # Megatron Core's own constants of rotary scaling are not Scout's.
    "llama4_scout_unscaled": ("llama4_scout", {"rope_scaling": None}),
    "falcon_h1_normed": ("falcon_h1_0_5b", {"mamba_rms_norm": True}),
    "nemotron_mtp_mlp": (
        "nemotron_super",
        {"hybrid_override_pattern": "MEM*EM-M", "mtp_hybrid_override_pattern": "*-"},
    ),
}

#: Sparse attention, of which Megatron Core 0.16.1 builds no model: what it is without, latent attention.
WITHOUT_INDEXER = {
    "experimental_attention_variant": None,
    **dict.fromkeys(("dsa_indexer_topk_freq", "dsa_indexer_skip_topk_offset", "dsa_indexer_k_norm_epsilon"), None),
    "dsa_indexer_rope_interleaved": None,
}
#: Families, variants and layouts whose logits Transformers and Megatron Core both give on a CPU.
FORWARD = [
    *(
        (name, "v4")
        for name in """qwen3_moe qwen3_moe_dense_layer qwen3_moe_all_softmax gpt_oss mixtral
        mixtral_window qwen2_moe qwen2_moe_dense_layer deepseek_v2 deepseek_v3
        kimi_k2_by_class moonlight glm4_moe glm_4_7_flash glm_4_7_flash_whole_queries
        minimax_m3 dots1 hy3 exaone_moe_alone ernie4_5_moe mimo_v2_flash
        gemma4_31b gemma4_e2b gemma4_26b llama4_scout_unscaled llama4_maverick""".split()
    ),
    *(
        (name, "v5")
        for name in "minimax_m3 qwen3_moe mixtral deepseek_v2_lite glm4_moe_air glm_4_7_flash dots1".split()
    ),
]


def family(name: str) -> Family:
    """A tiny family, or a variant of one."""
    if name not in VARIANTS:
        return FAMILIES[name]
    base, keys = VARIANTS[name]
    return replace(FAMILIES[base], sizes={**FAMILIES[base].sizes, **keys})


def made(name: str, out: Path, layout: str = "v4") -> Path:
    """The tiny checkpoint of a family or variant, in two files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, name, family(name))
        return make(name, out, layout="v5" if layout == "v5" else "v4", shards=2)


def with_key(config: Mapping[str, Any], key: str, value: object) -> dict[str, Any]:
    """A config with another value of a key, in that of its text model where it has one, and around it too."""
    text = config.get("text_config")
    if text is None:
        return {**config, key: value}
    return {**config, **({key: value} if key in config else {}), "text_config": {**text, key: value}}


def headers_of(name: str) -> Case:
    """Config and hub headers of a family or variant."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, name, family(name))
        config = tiny_config(name)
    return config, hub_headers(config, repository=family(name).reference)


def headers_in(folder: Path) -> dict[str, Header]:
    """Headers of a written checkpoint."""
    return {name: (tensor.dtype, tensor.shape) for name, tensor in read_folder(folder).tensors.items()}


#: Cases of one table: they reach all its rows together.
TABLES: dict[str, tuple[str, ...]] = {
    "qwen3_moe": ("qwen3_moe", "qwen3_moe_dense_layer"),
    "gpt_oss": ("gpt_oss",),
    "mixtral": ("mixtral",),
    "qwen2_moe": ("qwen2_moe", "qwen2_moe_dense_layer"),
    "olmoe": ("olmoe",),
    "deepseek_v2": ("deepseek_v2", "deepseek_v2_lite"),
    "deepseek_v3": ("deepseek_v3", "moonlight_with_heads"),
    "glm4_moe": ("glm4_moe", "glm4_moe_air"),
    "glm4_moe_lite": ("glm_4_7_flash", "glm_4_7_flash_with_heads", "glm_4_7_flash_whole_queries"),
    "glm_moe_dsa": ("glm_5", "glm_5_2"),
    "deepseek_v32": ("deepseek_v32",),
    "dots1": ("dots1",),
    "hy_v3": ("hy3",),
    "exaone_moe": ("exaone_moe",),
    "llama4": ("llama4_maverick", "llama4_scout"),
    "minimax_m2": ("minimax_m2",),
    "minimax_m3": ("minimax_m3",),
    "ernie4_5_moe": ("ernie4_5_moe",),
    "lfm2": ("lfm2",),
    "lfm2_moe": ("lfm2_moe",),
    "mimo_v2_flash": ("mimo_v2_flash",),
    "gemma4_text": ("gemma4_31b", "gemma4_e2b", "gemma4_26b"),
    "sarvam_moe": ("sarvam_moe",),
    "deepseek": ("deepseek",),
    "kimi_linear": ("kimi_linear",),
    "kimi_k3": ("kimi_k3",),
    "step3p5": ("step_3_5_flash", "step_3_5_flash_with_heads"),
    "bailing_moe_v2": ("bailing_moe_v2",),
    "qwen3_next": ("qwen3_next",),
    "qwen3_5": ("qwen3_5_text",),
    "qwen3_5_moe": ("qwen3_5_moe_text",),
    "falcon_h1": ("falcon_h1_0_5b", "falcon_h1_normed"),
    "nemotron_h": ("nemotron_nano_v3", "nemotron_h", "nemotron_super", "nemotron_mtp_mlp"),
}


#: What layout v5 calls tensors of some classes that are not experts.
_V5_NAMES = {
    "hy_v3": {"router.gate.": "gate.", "expert_bias": "e_score_correction_bias", "shared_mlp.": "shared_experts."},
    "exaone_moe": {"mlp.e_score_": "mlp.gate.e_score_"},
    "mimo_v2_flash": {"self_attn.attention_sink_bias": "self_attn.sinks"},
    "ernie4_5_moe": {"mlp.moe_statics.": "mlp.gate.moe_statics."},
}


def fused(case: Case) -> Case:
    """The case in layout v5's names: one tensor for all experts, and the prefixes of the class."""
    config, headers = case
    counts = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
    experts = next((config[k] for k in counts if k in config), 0)
    renamed: dict[str, Header] = {}
    for name, (dtype, shape) in headers.items():
        name = name.replace("block_sparse_moe.", "mlp.").replace("backbone.", "model.")
        for theirs, ours in _V5_NAMES.get(config["model_type"], {}).items():
            last = f"model.layers.{config['num_hidden_layers']}."
            name = name if name.startswith(last) else name.replace(theirs, ours)
        prefix, _, tail = name.partition(".experts.")
        number, _, matrix = tail.partition(".")
        if not number.isdigit() or name.startswith(("mtp.", f"model.layers.{config['num_hidden_layers']}.")):
            renamed[name] = (dtype, shape)
        elif number == "0":
            matrix = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.get(matrix[:2], matrix[: -len(".weight")])
            if matrix == "gate_proj":
                renamed[f"{prefix}.experts.gate_up_proj"] = (dtype, (experts, 2 * shape[0], *shape[1:]))
            elif matrix == "down_proj" or config["model_type"] == "nemotron_h":
                renamed[f"{prefix}.experts.{matrix}"] = (dtype, (experts, *shape))
    return config, renamed


def cases(table: str) -> list[Case]:
    """Headers that reach every row of `table`: both layouts, a repeated head, buffers that are recomputed."""
    found: list[Case] = []
    for name in TABLES[table]:
        plain = headers_of(name)
        found.append(plain)
        if (
            table not in ("gemma4_text", "gpt_oss", "qwen3_5", "llama4", "minimax_m3")
            and name not in REMOTE_CODE
            and "dense" not in name
        ):
            found.append(per_expert(plain) if table == "qwen3_5_moe" else fused(plain))
    config, headers = found[0]
    found.append((with_key(config, "tie_word_embeddings", True), headers))
    if "lm_head.weight" not in headers and "model.embed_tokens.weight" in headers:
        with_head = {**headers, "lm_head.weight": headers["model.embed_tokens.weight"]}
        found += [({**config, "tie_word_embeddings": tied}, with_head) for tied in (True, False)]
    if table == "gemma4_text":
        config, headers = headers_of("gemma4_e2b")
        unread = (("k_proj", (4, 4)), ("v_proj", (4, 4)), ("k_norm", (4,)))
        beside = {f"model.layers.5.self_attn.{name}.weight": ("BF16", shape) for name, shape in unread}
        found.append((config, {**headers, **beside}))
    if table == "ernie4_5_moe":
        beside = ernie_mtp(dict(config), {name: shape for name, (_, shape) in headers.items()})
        found.append((config, {**headers, **{name: ("BF16", shape) for name, shape in beside.items()}}))
    if table in ("deepseek_v2", "deepseek_v3"):
        count = config["num_hidden_layers"] + config.get("num_nextn_predict_layers", 0)
        buffers = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": ("F32", (2,)) for n in range(count)}
        found.append((config, {**headers, **buffers}))
    return found


def per_expert(case: Case) -> Case:
    """The case with every expert in tensors of its own."""
    config, headers = case
    split: dict[str, Header] = {}
    for name, (dtype, shape) in headers.items():
        prefix, _, matrix = name.rpartition(".")
        if matrix not in ("gate_up_proj", "down_proj"):
            split[name] = (dtype, shape)
            continue
        for expert in range(shape[0]):
            halves = ("gate_proj", "up_proj") if matrix == "gate_up_proj" else ("down_proj",)
            rows = shape[1] // len(halves)
            split |= {f"{prefix}.{expert}.{half}.weight": (dtype, (rows, *shape[2:])) for half in halves}
    return config, split
