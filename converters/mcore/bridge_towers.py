"""Models with towers as Megatron-Bridge writes them: the provider of the whole, and what it takes from config.json.

The text model's fields stand in the `model` node as any other's do. Beside them a provider wants the towers' configs,
as objects of Transformers' classes, and token ids. Sources: the providers of Megatron-Bridge 0.6.2, and the
run_config.yaml files that it writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from converters.mcore.bridge_families import DEFAULT, MODELS, Family, LayerSpec, families_of, family_named
from converters.mcore.tower_fields import Held, Json, Towers
from converters.rows.expr import Value


def _family(architecture: str, provider: str, text: str, **changes: object) -> Family:
    """A family of models with towers whose text model is of the class `text`, but for `changes`."""
    alone = family_named((text,))
    assert alone is not None
    changed: dict[str, object] = {"architecture": architecture, "provider": MODELS + provider, "older": (), **changes}
    return replace(alone, **changed)  # type: ignore[arg-type]


_CONFIG = "transformers.models.{0}.configuration_{0}.{1}Config"
_ENDS = {f"{name}_token_id": f"text_config.{name}_token_id" for name in ("bos", "eos")}
_QWEN_TOKENS = {
    **_ENDS,
    **{name: name for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")},
}


def _turned(
    family: Family, held: Mapping[str, Held], keys: Mapping[str, str], within: str = "", **turns: Value
) -> Towers:
    """A family whose positions have three axes; the sections of these are a field that only such a model has."""
    constants: Mapping[str, Value] = {"position_embedding_type": "mrope"}
    own = replace(family, own=(*family.own, "mrope_section"))
    return Towers(own, held, keys, constants, turns=turns, within=within)


def _hearing(kind: str, classes: str, provider: str, text: str, keys: Mapping[str, str], **turns: Value) -> Towers:
    """A family that sees and hears: all of it in one config within the whole's, beside what speaks."""
    within = "thinker_config"
    held = {within: Held(_CONFIG.format(kind, f"{classes}Thinker"), within)}
    family = _family(f"{classes}ForConditionalGeneration", f"qwen_omni.{provider}", text)
    tokens = {name: f"{within}.{key}" for name, key in {**_HEARING, **keys}.items()}
    return _turned(family, held, tokens, f"{within}.", **turns)


#: Keys that both Omni models have under the provider's own names.
_HEARING = {
    name: name
    for name in """audio_start_token_id audio_end_token_id vision_start_token_id vision_end_token_id
    position_id_per_seconds seconds_per_chunk""".split()
}


def _configs(kind: str, classes: str, *, text: bool = False) -> dict[str, Held]:
    """The tower's config, and where a provider wants it the text model's, by module and by how its classes begin."""
    held = {"vision_config": Held(_CONFIG.format(kind, f"{classes}Vision"), "vision_config")}
    if text:
        held["hf_text_config"] = Held(_CONFIG.format(kind, f"{classes}Text"), "text_config")
    return held


TOWERS = (
    _turned(
        _family(
            "Qwen2_5_VLForConditionalGeneration",
            "qwen_vl.qwen25_vl_provider.Qwen25VLModelProvider",
            "Qwen2ForCausalLM",
        ),
        _configs("qwen2_5_vl", "Qwen2_5_VL"),
        {**_QWEN_TOKENS, "vision_token_id": "vision_token_id"},
    ),
    _turned(
        _family(
            "Qwen3VLForConditionalGeneration",
            "qwen_vl.qwen3_vl_provider.Qwen3VLModelProvider",
            "Qwen3ForCausalLM",
        ),
        _configs("qwen3_vl", "Qwen3VL", text=True),
        _QWEN_TOKENS,
        mrope_interleaved=True,
    ),
    _turned(
        _family(
            "Qwen3VLMoeForConditionalGeneration",
            "qwen_vl.qwen3_vl_provider.Qwen3VLMoEModelProvider",
            "Qwen3MoeForCausalLM",
        ),
        _configs("qwen3_vl_moe", "Qwen3VLMoe", text=True),
        {**_QWEN_TOKENS, "head_dim": "text_config.head_dim"},
        mrope_interleaved=True,
    ),
    _turned(
        _family(
            "Qwen3_5ForConditionalGeneration",
            "qwen_vl.qwen35_vl_provider.Qwen35VLModelProvider",
            "Qwen3_5ForCausalLM",
        ),
        _configs("qwen3_5", "Qwen3_5"),
        _QWEN_TOKENS,
        mrope_interleaved=True,
    ),
    _turned(
        _family(
            "Qwen3_5MoeForConditionalGeneration",
            "qwen_vl.qwen35_vl_provider.Qwen35VLMoEModelProvider",
            "Qwen3_5MoeForCausalLM",
            marks={"moe_router_dtype": "fp32"},
        ),
        _configs("qwen3_5_moe", "Qwen3_5Moe"),
        _QWEN_TOKENS,
        mrope_interleaved=True,
    ),
    _turned(
        _family(
            "Glm4vMoeForConditionalGeneration",
            "glm_vl.glm_45v_provider.GLM45VModelProvider",
            "Glm4MoeForCausalLM",
        ),
        _configs("glm4v_moe", "Glm4vMoe"),
        {
            "eos_token_id": "text_config.eos_token_id",
            **{f"{kind}_token_id": f"{kind}_token_id" for kind in ("image", "video")},
            **{
                f"{kind}_{end}_token_id": f"{kind}_{end}_token_id"
                for kind in ("image", "video")
                for end in ("start", "end")
            },
        },
    ),
    _hearing(
        "qwen2_5_omni",
        "Qwen2_5Omni",
        "qwen25_omni_provider.Qwen25OmniModelProvider",
        "Qwen2ForCausalLM",
        {f"{kind}_token_id": f"{kind}_token_index" for kind in ("image", "video", "audio")},
    ),
    _hearing(
        "qwen3_omni_moe",
        "Qwen3OmniMoe",
        "qwen3_omni_provider.Qwen3OmniModelProvider",
        "Qwen3MoeForCausalLM",
        {
            **{f"{kind}_token_id": f"{kind}_token_id" for kind in ("image", "video", "audio")},
            **{name: f"vision_config.{name}" for name in ("patch_size", "temporal_patch_size", "spatial_merge_size")},
        },
        mrope_interleaved=True,
    ),
    Towers(
        _family(
            "Gemma3ForConditionalGeneration",
            "gemma_vl.gemma3_vl_provider.Gemma3VLModelProvider",
            "Gemma3ForCausalLM",
        ),
        {
            "vision_config": Held(
                "transformers.models.siglip.configuration_siglip.SiglipVisionConfig", "vision_config"
            ),
            "vision_projector_config": Held(
                f"{MODELS}gemma_vl.modeling_gemma3_vl.Gemma3VLMultimodalProjectorConfig",
                keys={"input_size": "vision_config.hidden_size", "hidden_size": "text_config.hidden_size"},
            ),
        },
        {
            "mm_tokens_per_image": "mm_tokens_per_image",
            "image_token_id": "image_token_index",
            "vision_start_token_id": "boi_token_index",
            "vision_end_token_id": "eoi_token_index",
        },
    ),
    Towers(
        _family(
            "Mistral3ForConditionalGeneration",
            "ministral3.ministral3_provider.Ministral3ModelProvider",
            "MistralForCausalLM",
            spec=LayerSpec(f"{MODELS}ministral3.ministral3_provider.ministral_layer_spec"),
        ),
        {"hf_config": Held("transformers.models.mistral3.configuration_mistral3.Mistral3Config")},
        {"image_token_id": "image_token_index"},
        text="ministral3",
    ),
)


def towers_of(architectures: tuple[str, ...], whole: Json) -> Towers | None:
    """The family of a model with towers by its Hugging Face classes and its config.json; None where there is none."""
    return next((one for one in TOWERS if one.family.architecture in architectures and one.builds(whole)), None)


def towers_in(model: Mapping[str, object]) -> Towers | None:
    """The family that the provider of a `model` node builds towers of; None where it builds none."""
    return next((one for one in TOWERS if one.family.may_be(model) and one.family.fits(model)), None)


def families_of_any(model: Mapping[str, object]) -> tuple[Family, ...]:
    """The families that a `model` node can be of, with towers or without."""
    towers = towers_in(model)
    return families_of(model) or (() if towers is None else (towers.family,))


def families_written(architectures: tuple[str, ...]) -> tuple[Family, ...]:
    """The families whose provider mbx may have named for a Hugging Face class: alone, and with its towers."""
    whole = (one.family for one in TOWERS if one.family.architecture in architectures)
    return (family_named(architectures) or DEFAULT, *whole)
