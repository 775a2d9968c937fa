"""Models with towers as Megatron-Bridge writes them: the provider of the whole, and what it takes from config.json.

The text model's fields stand in the `model` node as any other's do. Beside them a provider wants the towers' configs,
as objects of Transformers' classes, and token ids. Sources: the providers of Megatron-Bridge 0.6.2, and the
run_config.yaml files that it writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from converters.mcore.bridge_families import DEFAULT, MODELS, Family, LayerSpec, family_named
from converters.rows.expr import Value

Json = Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class Held:
    """A field of a provider that holds an object of the class `target`.

    The object has all keys of config.json below `at`, or of the whole where that is empty; where `keys` are named,
    those alone: a field of its own → the path of a key.
    """

    target: str
    at: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)

    def node(self, whole: Json) -> dict[str, Value]:
        """The object as a node of run_config.yaml."""
        if self.keys:
            return {"_target_": self.target, **_taken(whole, self.keys)}
        found = _at(whole, self.at) if self.at else whole
        return {"_target_": self.target, **(found if isinstance(found, Mapping) else {})}


@dataclass(frozen=True, slots=True)
class Towers:
    """A family whose provider builds a model with its towers.

    `held` are its fields that hold an object, `keys` those that are a plain value of config.json (a field → the path
    of a key; one that config.json leaves out is the provider's default), `constants` those that are the same for all.
    `text` is the type of its text model, where another model of the same Hugging Face class has no provider.
    """

    family: Family
    held: Mapping[str, Held]
    keys: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Value] = field(default_factory=dict)
    text: str = ""

    def fields(self, whole: Json) -> dict[str, Value]:
        """What the `model` node says of all that stands beside the text model, and of the text model for its sake."""
        held: dict[str, Value] = {name: held.node(whole) for name, held in self.held.items()}
        return {**held, **_taken(whole, self.keys), **self.constants}

    def builds(self, whole: Json) -> bool:
        """Whether it is the family of a model by its config.json."""
        return not self.text or _at(whole, "text_config.model_type") == self.text


def _at(whole: Json, path: str) -> Value:
    found: Value = whole
    for key in path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _taken(whole: Json, keys: Mapping[str, str]) -> dict[str, Value]:
    return {name: found for name, path in keys.items() if (found := _at(whole, path)) is not None}


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


def _turned(family: Family, held: Mapping[str, Held], keys: Mapping[str, str]) -> Towers:
    """A family whose positions have three axes; the sections of these are a field that only such a model has."""
    constants: Mapping[str, Value] = {"position_embedding_type": "mrope"}
    return Towers(replace(family, own=(*family.own, "mrope_section")), held, keys, constants)


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
    ),
    _turned(
        _family(
            "Qwen3VLMoeForConditionalGeneration",
            "qwen_vl.qwen3_vl_provider.Qwen3VLMoEModelProvider",
            "Qwen3MoeForCausalLM",
        ),
        _configs("qwen3_vl_moe", "Qwen3VLMoe", text=True),
        {**_QWEN_TOKENS, "head_dim": "text_config.head_dim"},
    ),
    _turned(
        _family(
            "Qwen3_5ForConditionalGeneration",
            "qwen_vl.qwen35_vl_provider.Qwen35VLModelProvider",
            "Qwen3_5ForCausalLM",
        ),
        _configs("qwen3_5", "Qwen3_5"),
        _QWEN_TOKENS,
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


def families_written(architectures: tuple[str, ...]) -> tuple[Family, ...]:
    """The families whose provider mbx may have named for a Hugging Face class: alone, and with its towers."""
    whole = (one.family for one in TOWERS if one.family.architecture in architectures)
    return (family_named(architectures) or DEFAULT, *whole)
