"""Transformers classes that compute the same function as one that Transformers lacks, or as a part of a larger model.

Each is a change of config.json, of names, and of one layer's tensors at a time, so that nothing grows with the model:

- DeciLM as Llama (the repository's `modeling_decilm.py`): a missing sublayer adds nothing to the residual, so does one
  whose last projection is zero; a narrower MLP is one padded with zero rows, since silu(0) · 0 = 0; fewer heads of
  keys and values are more of them, each repeated.
- Sarvam-MoE as GLM-4.5 (the repository's `modeling_sarvam_moe.py`): the same norms, router and shared experts;
  queries, keys and values apart, and the whole head rotated. Ling and Ring 2.0 likewise, a part of the head rotated
  (`modeling_bailing_moe_v2.py`).
- DeepSeekMoE as Qwen2-MoE (the repository's `modeling_deepseek.py`): a shared expert under σ(0) = ½, and doubled.
- Step-3.5 as the text model of Step-3.7 with a head behind it (`heads`): its experts' halves in one tensor.
- MiMo as Qwen2 and Kimi-K2 as DeepSeek-V3, which have the same decoder.
- A text model beside a vision tower as that text model alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from converters.rows.config_spelling import canonical

if TYPE_CHECKING:
    import torch

    Weights: TypeAlias = dict[str, torch.Tensor]
Config: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Twin:
    """How to read a checkpoint as a `model_type` that Transformers has, and what to say of it.

    `names` replaces parts of tensor names; tensors that begin as one of `without` are left out. `config` changes
    config.json, `layer` the tensors of one decoder layer, by names behind `model.layers.N.`. Of a `headless` type
    Transformers has no class with an output layer.
    """

    model_type: str
    note: str
    names: Mapping[str, str]
    without: tuple[str, ...] = ()
    config: Callable[[Config], dict[str, Any]] = dict
    layer: Callable[[Config, int, Weights], Weights] = lambda config, number, layer: layer
    headless: bool = False

    def register(self) -> None:
        """Make the class known to Transformers, where it has none of its own."""
        if self.headless:
            importlib.import_module("mbx.models.transformers.heads")

    def config_of(self, config: Config) -> dict[str, Any]:
        """config.json of the twin, without the repository's own code."""
        kept = {key: value for key, value in self.config(config).items() if key not in ("auto_map", "architectures")}
        return {**kept, "model_type": self.model_type}

    def name_of(self, name: str) -> str | None:
        """The twin's name of a tensor, None for one that it has not."""
        if name.startswith(self.without):
            return None
        for theirs, ours in self.names.items():
            name = name.replace(theirs, ours)
        return name

    def layer_of(self, config: Config, number: int, tensors: Weights) -> Weights:
        """The twin's tensors of decoder layer `number`, from the checkpoint's under the twin's names."""
        at = f"model.layers.{number}."
        own = {name.removeprefix(at): tensor for name, tensor in tensors.items()}
        return {at + name: tensor for name, tensor in self.layer(config, number, own).items()}


def _decilm_config(config: Config) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key != "block_configs"}
    width = max(map(_decilm_width, [config] * len(config["block_configs"]), config["block_configs"]))
    return {**kept, "intermediate_size": width, "num_key_value_heads": config["num_attention_heads"]}


def _decilm_width(config: Config, block: Config) -> int:
    """Width of a block's MLP: two thirds of the hidden size by its factor, up to a multiple of 256."""
    if block["ffn"]["no_op"]:
        return 0
    return -(-int(2 * block["ffn"]["ffn_mult"] * config["hidden_size"] / 3) // 256) * 256


def _decilm_layer(config: Config, number: int, layer: Weights) -> Weights:
    import torch

    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    width = _decilm_config(config)["intermediate_size"]
    shapes = {f"self_attn.{part}_proj.weight": (hidden, hidden) for part in "qkvo"}
    shapes |= {"mlp.gate_proj.weight": (width, hidden), "mlp.up_proj.weight": (width, hidden)}
    shapes["mlp.down_proj.weight"] = (hidden, width)
    out = {name: torch.zeros(shape) for name, shape in shapes.items()}
    out |= {f"{name}_layernorm.weight": torch.ones(hidden) for name in ("input", "post_attention")}
    for name, tensor in layer.items():
        if name in ("self_attn.k_proj.weight", "self_attn.v_proj.weight"):
            repeats = config["block_configs"][number]["attention"]["n_heads_in_group"]
            tensor = tensor.view(-1, hidden // heads, hidden).repeat_interleave(repeats, 0).reshape(hidden, hidden)
        rows, columns = (*tensor.shape, 1)[:2]
        out[name].view(len(out[name]), -1)[:rows, :columns] = tensor.view(rows, -1)
    return out


def _sarvam_config(config: Config) -> dict[str, Any]:
    renamed = {"n_routed_experts": config["num_experts"], "n_shared_experts": config["num_shared_experts"]}
    kept = {key: value for key, value in config.items() if key != "num_experts"}
    rotated = config.get("partial_rotary_factor", 1.0)
    return {**kept, **renamed, "partial_rotary_factor": rotated, "attention_bias": False}


def _sarvam_layer(config: Config, number: int, layer: Weights) -> Weights:
    del number
    groups = config["num_key_value_heads"] * config["head_dim"]
    sizes = [config["num_attention_heads"] * config["head_dim"], groups, groups]
    fused = layer.pop("attention.query_key_value.weight")
    parts = zip("qkv", fused.split(sizes), strict=True)  # type: ignore[no-untyped-call]
    return {**layer, **{f"self_attn.{part}_proj.weight": tensor for part, tensor in parts}}


def _deepseek_config(config: Config) -> dict[str, Any]:
    dense = list(range(config["first_k_dense_replace"]))
    width = config["n_shared_experts"] * config["moe_intermediate_size"]
    renamed = {"num_experts": config["n_routed_experts"], "shared_expert_intermediate_size": width}
    return {**config, **renamed, "mlp_only_layers": dense, "decoder_sparse_step": 1, "qkv_bias": False}


def _deepseek_layer(config: Config, number: int, layer: Weights) -> Weights:
    """A shared expert behind a gate of weight zero, which halves it, and twice as large for that."""
    import torch

    out = {name.replace("shared_experts.", "shared_expert."): tensor for name, tensor in layer.items()}
    if number >= config["first_k_dense_replace"]:
        out["mlp.shared_expert.down_proj.weight"] = 2 * out["mlp.shared_expert.down_proj.weight"]
        out["mlp.shared_expert_gate.weight"] = torch.zeros(1, config["hidden_size"])
    return out


def _step_layer(config: Config, number: int, layer: Weights) -> Weights:
    import torch

    del config, number
    if "moe.gate_proj.weight" not in layer:
        return layer
    gate, up, down = (layer.pop(f"moe.{part}_proj.weight") for part in ("gate", "up", "down"))
    return {**layer, "mlp.experts.gate_up_proj": torch.cat((gate, up), 1), "mlp.experts.down_proj": down}


def _minimax_layer(config: Config, number: int, layer: Weights) -> Weights:
    """Halves of gated MLPs in one tensor, and experts too, which the repository has apart."""
    import torch

    del config, number
    spelt = {"block_sparse_moe.e_score": "mlp.gate.e_score", "block_sparse_moe.": "mlp.", ".index_": ".indexer."}
    out: Weights = {}
    for name, tensor in layer.items():
        for theirs, ours in spelt.items():
            name = name.replace(theirs, ours)
        out[name] = tensor
    for name in [name for name in out if name.endswith("gate_proj.weight")]:
        halves = (out.pop(name), out.pop(name.replace("gate_proj", "up_proj")))
        out[name.replace("gate_proj", "gate_up_proj")] = torch.cat(halves)
    experts = range(sum(name.startswith("mlp.experts.") and name.endswith(".w2.weight") for name in out))
    if experts:
        w1, w2, w3 = ([out.pop(f"mlp.experts.{e}.w{part}.weight") for e in experts] for part in (1, 2, 3))
        out["mlp.experts.gate_up_proj"] = torch.cat((torch.stack(w1), torch.stack(w3)), 1)
        out["mlp.experts.down_proj"] = torch.stack(w2)
    return out


def _experts_last(config: Config, number: int, layer: Weights) -> Weights:
    """Experts [expert, out, in], which Qwen3-VL's repositories hold the other way round."""
    del number
    text = canonical(config)
    width = {"mlp.experts.gate_up_proj": text["hidden_size"], "mlp.experts.down_proj": text["moe_intermediate_size"]}
    turned = any(name in layer and layer[name].shape[-1] != size for name, size in width.items())
    return {name: tensor.transpose(1, 2) if turned and name in width else tensor for name, tensor in layer.items()}


def _text_alone(model_type: str, layer: Callable[[Config, int, Weights], Weights] | None = None) -> Twin:
    return Twin(
        model_type,
        f"Compared with Transformers' {model_type}, the text model alone",
        _INNER,
        _TOWERS,
        canonical,
        layer or (lambda config, number, layer: layer),
    )


def _as_said(config: Config) -> dict[str, Any]:
    """The text model's own config in its own spelling, over what is said around it: it turns by two rules."""
    return {**{key: value for key, value in config.items() if key != "text_config"}, **config["text_config"]}


#: How a text model's names begin inside a larger one, and alone.
_INNER = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "thinker.model.": "model.",
    "language_model.backbone.": "model.",
    "language_model.lm_head": "lm_head",
    "thinker.lm_head": "lm_head",
}
#: How names of all else begin.
_TOWERS = (
    *("vision_tower.", "vision_model.", "multi_modal_projector.", "mm_projector.", "visual.", "model.visual."),
    *("patch_merge_mlp.", "sound_encoder.", "sound_projection.", "mtp."),
    *("model.vision_tower.", "model.vision_model.", "model.multi_modal_projector."),
    *("model.embed_vision.", "model.audio_tower.", "model.embed_audio.", "mlp1."),
    *("thinker.visual.", "thinker.audio_tower.", "talker.", "token2wav.", "code2wav."),
)
_SARVAM_NAMES = {
    "model.word_embeddings": "model.embed_tokens",
    ".attention.dense": ".self_attn.o_proj",
    ".attention.query_layernorm": ".self_attn.q_norm",
    ".attention.key_layernorm": ".self_attn.k_norm",
    ".mlp.gate.expert_bias": ".mlp.gate.e_score_correction_bias",
}
#: Model type → its twin.
TWINS: Mapping[str, Twin] = {
    "nemotron-nas": Twin(
        "llama",
        "Compared with Transformers' llama, unequal layers filled up with zeros",
        {},
        config=_decilm_config,
        layer=_decilm_layer,
    ),
    "sarvam_moe": Twin(
        "glm4_moe",
        "Compared with Transformers' glm4_moe, which computes the same function",
        _SARVAM_NAMES,
        config=_sarvam_config,
        layer=_sarvam_layer,
    ),
    "bailing_moe_v2": Twin(
        "glm4_moe",
        "Compared with Transformers' glm4_moe, which computes the same function",
        _SARVAM_NAMES,
        config=_sarvam_config,
        layer=_sarvam_layer,
    ),
    "deepseek": Twin(
        "qwen2_moe",
        "Compared with Transformers' qwen2_moe, the gate of whose shared expert is open by half",
        {},
        config=_deepseek_config,
        layer=_deepseek_layer,
    ),
    "step3p5": Twin(
        "step3p5",
        "Compared with Transformers' step3p5, the text model of Step-3.7",
        {
            ".moe.gate.": ".mlp.gate.",
            ".moe.router_bias": ".mlp.gate.e_score_correction_bias",
            ".share_expert.": ".mlp.shared_experts.",
        },
        layer=_step_layer,
        headless=True,
    ),
    "mimo": Twin("qwen2", "Compared with Transformers' qwen2, which has the same decoder", {}, ("model.mtp_layers.",)),
    "kimi_k2": Twin("deepseek_v3", "Compared with Transformers' deepseek_v3, which has the same decoder", {}),
    "gemma3": _text_alone("gemma3_text"),
    "gemma4": replace(_text_alone("gemma4_text"), config=_as_said),
    "llama4": _text_alone("llama4_text"),
    "qwen3_5": _text_alone("qwen3_5_text"),
    "qwen3_5_moe": _text_alone("qwen3_5_moe_text"),
    # Under a text's positions, three rows alike, these turn as the plain models do.
    "qwen2_vl": _text_alone("qwen2"),
    "qwen2_5_vl": _text_alone("qwen2"),
    "qwen2_5_omni": _text_alone("qwen2"),
    "qwen3_vl": _text_alone("qwen3"),
    "qwen3_vl_moe": _text_alone("qwen3_moe", _experts_last),
    "qwen3_omni_moe": _text_alone("qwen3_moe"),
    "glm4v_moe": _text_alone("glm4_moe"),
    **dict.fromkeys(
        ("NemotronH_Nano_VL_V2", "NemotronH_Nano_Omni_Reasoning_V3", "NemotronH_Super_Omni_Reasoning_V3"),
        _text_alone("nemotron_h"),
    ),
    "kimi_k25": _text_alone("deepseek_v3"),
    "minimax_m3_vl": _text_alone("minimax_m3_vl_text", _minimax_layer),
}
#: Types of models around one of several text models.
_AROUND = ("mistral3", "internvl")


def twin_of(config: Config) -> Twin | None:
    """The twin to compare a checkpoint of this config.json with, None where Transformers has its class."""
    text = config.get("text_config")
    if config.get("model_type") in _AROUND and isinstance(text, Mapping):
        return _text_alone(str(text.get("model_type")))
    return TWINS.get(str(config.get("model_type")))
