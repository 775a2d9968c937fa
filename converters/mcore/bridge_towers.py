"""Models with towers as Megatron-Bridge writes them: the provider of the whole, and what it takes from config.json.

The text model's fields stand in the `model` node as any other's do. Beside them a provider wants the towers' configs,
as objects of Transformers' classes, and token ids. Sources: the providers of Megatron-Bridge 0.6.2, and the
run_config.yaml files that it writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from converters.mcore.bridge_families import DEFAULT, MODELS, Family, LayerSpec, families_of, family_named
from converters.rows.config_spelling import GENERIC_KEYS
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

    def said(self, node: Json) -> dict[str, Value]:
        """What config.json has of a node, by path; of keys that every config of Transformers has, none."""
        if self.keys:
            return {path: node[name] for name, path in self.keys.items() if node.get(name) is not None}
        start = f"{self.at}." if self.at else ""
        kept = {"model_type", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache"}
        left_out = (GENERIC_KEYS - kept) | {"_target_", "dtype"}
        return {start + name: value for name, value in node.items() if name not in left_out and value is not None}


@dataclass(frozen=True, slots=True)
class Towers:
    """A family whose provider builds a model with its towers.

    `held` are its fields that hold an object, `keys` those that are a plain value of config.json (a field → the path
    of a key; one that config.json leaves out is the provider's default), `constants` those that are the same for all.
    `text` is the type of its text model, where another model of the same Hugging Face class has no provider; `turns`
    is what a config.json says, beside their sections, of positions with three axes.
    """

    family: Family
    held: Mapping[str, Held]
    keys: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Value] = field(default_factory=dict)
    text: str = ""
    turns: Mapping[str, Value] = field(default_factory=dict)

    def fields(self, whole: Json) -> dict[str, Value]:
        """What the `model` node says of all that stands beside the text model, and of the text model for its sake."""
        held: dict[str, Value] = {name: held.node(whole) for name, held in self.held.items()}
        return {**held, **_taken(whole, self.keys), **self.constants}

    def whole(self, model: Mapping[str, object], text: Json) -> dict[str, Value]:
        """config.json of the model that a `model` node builds; `text` is what it says of the text model.

        Law: `fields` of it are those of the node.
        """
        around = {key: value for key, value in text.items() if key in _OF_BOTH or key.startswith("vision_config")}
        inner = {key: value for key, value in text.items() if key not in around}
        if (sections := inner.pop("mrope_section", None)) is not None:
            scaling = inner.get("rope_scaling")
            rule = scaling if isinstance(scaling, Mapping) else {"rope_type": "default"}
            inner["rope_scaling"] = {**rule, "mrope_section": sections, **self.turns}
        if self.text:
            inner["model_type"] = self.text
        out: dict[str, Value] = {}
        for name, held in self.held.items():
            if isinstance(node := model.get(name), Mapping):
                _put_all(out, held.said(node))
        stated = {path: value for name, path in self.keys.items() if (value := model.get(name)) is not None}
        _put_all(out, stated)  # type: ignore[arg-type]
        _put_all(out, {f"text_config.{key}": value for key, value in inner.items()} | around)
        return out

    def builds(self, whole: Json) -> bool:
        """Whether it is the family of a model by its config.json."""
        return not self.text or _at(whole, "text_config.model_type") == self.text


def _at(whole: Json, path: str) -> Value:
    found: Value = whole
    for key in path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _put_all(out: dict[str, Value], values: Mapping[str, Value]) -> None:
    """Put values into nested objects by their paths; an object joins the one that is there."""
    for path, value in values.items():
        *parents, key = path.split(".")
        at = out
        for parent in parents:
            inner = at.setdefault(parent, {})
            assert isinstance(inner, dict)
            at = inner
        old = at.get(key)
        at[key] = {**old, **value} if isinstance(old, Mapping) and isinstance(value, Mapping) else value


def _taken(whole: Json, keys: Mapping[str, str]) -> dict[str, Value]:
    return {name: found for name, path in keys.items() if (found := _at(whole, path)) is not None}


def _family(architecture: str, provider: str, text: str, **changes: object) -> Family:
    """A family of models with towers whose text model is of the class `text`, but for `changes`."""
    alone = family_named((text,))
    assert alone is not None
    changed: dict[str, object] = {"architecture": architecture, "provider": MODELS + provider, "older": (), **changes}
    return replace(alone, **changed)  # type: ignore[arg-type]


#: What a config.json says of the whole model.
_OF_BOTH = frozenset({"architectures", "model_type", "tie_word_embeddings"})
_CONFIG = "transformers.models.{0}.configuration_{0}.{1}Config"
_ENDS = {f"{name}_token_id": f"text_config.{name}_token_id" for name in ("bos", "eos")}
_QWEN_TOKENS = {
    **_ENDS,
    **{name: name for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")},
}


def _turned(family: Family, held: Mapping[str, Held], keys: Mapping[str, str], **turns: Value) -> Towers:
    """A family whose positions have three axes; the sections of these are a field that only such a model has."""
    constants: Mapping[str, Value] = {"position_embedding_type": "mrope"}
    return Towers(replace(family, own=(*family.own, "mrope_section")), held, keys, constants, turns=turns)


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
