"""Which Hugging Face architecture a run_config of Megatron-Bridge is of: families by provider, layer spec and marks.

Bridge builds most families by one of two provider classes and tells them apart by the layer spec, or by nothing but
constants that its converter of a family sets. Sources: the packages of Megatron-Bridge 0.3.1, 0.4.0, 0.5.0 and 0.6.2,
and the run_config.yaml files that 0.3.1 and 0.6.2 write.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from converters.rows.expr import Value

MODELS = "megatron.bridge.models."
_GPT = f"{MODELS}gpt_provider.GPTModelProvider"
_LATENT = f"{MODELS}mla_provider.MLAModelProvider"


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """A function that makes layer specs, and the arguments that a run_config binds to it."""

    target: str
    bound: Mapping[str, Value] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The function's own name: modules moved between releases."""
        return self.target.rpartition(".")[2]

    @property
    def node(self) -> dict[str, Value]:
        """The spec as a node of run_config.yaml."""
        if self.bound:
            return {"_target_": self.target, "_args_": [], "_partial_": True, **self.bound}
        return {"_target_": self.target, "_call_": False}


_PLAIN = LayerSpec(f"{MODELS}gpt_provider.default_layer_spec")
_BLOCK = LayerSpec(
    "megatron.core.models.gpt.gpt_layer_specs.get_gpt_decoder_block_spec", {"use_transformer_engine": True}
)
_VARIANT = LayerSpec(
    "megatron.core.models.gpt.experimental_attention_variant_module_specs."
    "get_transformer_block_with_experimental_attention_variant_spec"
)
#: Specs of the same plain layers, one for each way to build them.
_PLAIN_NAMES = frozenset(
    """default_layer_spec transformer_engine_layer_spec transformer_engine_full_layer_spec local_layer_spec
    quantization_layer_spec modelopt_transformer_layer_spec""".split()
)


@dataclass(frozen=True, slots=True)
class Family:
    """A family as Megatron-Bridge writes it.

    `architecture` is its Hugging Face class. `provider` is the class that every release has, and `older` how the names
    of others begin that releases before wrote. `spec` makes its layers; None is the provider's own choice. `marks` are
    constants by which its converter tells it from others of the same provider and spec. `implied` are fields that the
    provider means without saying them, `own` those that it alone has.
    """

    architecture: str
    provider: str
    spec: LayerSpec | None = None
    older: tuple[str, ...] = ()
    marks: Mapping[str, Value] = field(default_factory=dict)
    implied: Mapping[str, Value] = field(default_factory=dict)
    own: tuple[str, ...] = ()

    def fits(self, model: Mapping[str, object]) -> bool:
        """Whether a `model` node has its layer spec and its marks; what the node does not say does not count."""
        marks = (model[mark] == value for mark, value in self.marks.items() if mark in model)
        return self._builds(_spec_name(model)) and all(marks)

    def may_be(self, model: Mapping[str, object]) -> bool:
        """Whether a `model` node of mbx can be of it: its provider, and its layer spec or one for each layer."""
        spec = _spec_name(model)
        if _provider_name(model) != self.provider.rpartition(".")[2]:
            return False
        return self._builds(spec) or (self.spec is _PLAIN and spec == _BLOCK.name)

    def _builds(self, spec: str | None) -> bool:
        if spec is None or self.spec is None:
            return True
        return spec in _PLAIN_NAMES if self.spec is _PLAIN else spec == self.spec.name


def _provider_name(model: Mapping[str, object]) -> str:
    return str(model.get("_target_")).rpartition(".")[2]


def _spec_name(model: Mapping[str, object]) -> str | None:
    spec = model.get("transformer_layer_spec")
    return str(spec.get("_target_")).rpartition(".")[2] if isinstance(spec, Mapping) else None


_WIDE_NORMS = {"model.qk_layernorm_over_heads": True}
_SCALED = {"model.scale_embeddings": True}
_SANDWICH = {**_SCALED, "model.post_layernorms": True}
#: Transformers norms the latent vectors by this epsilon whatever the config says; Bridge has one for all norms.
_LATENT_EPSILON = {"model.latent_layernorm_epsilon": 1e-6}

#: Falcon-H1's: a multiplier at every turn, and mixers in a model that is not called hybrid.
_FALCON_H1 = tuple(
    """mamba_num_heads mamba_head_dim mamba_num_groups mamba_state_dim rmsnorm norm_before_gate embedding_multiplier
    attention_in_multiplier attention_out_multiplier key_multiplier ssm_in_multiplier ssm_out_multiplier
    ssm_multipliers mlp_multipliers lm_head_multiplier""".split()
)

FAMILIES = (
    Family(
        "LlamaForCausalLM",
        _GPT,
        _PLAIN,
        older=(
            *("LlamaModel", "Llama2Model", "Llama3Model", "Llama31Model", "Llama32Model", "CodeLlamaModel"),
            *("Llama31Nemotron70B", "Llama31NemotronNano"),
        ),
    ),
    Family("Qwen2ForCausalLM", _GPT, _PLAIN, older=("Qwen2Model", "Qwen25Model")),
    Family("Qwen3ForCausalLM", _GPT, _PLAIN, older=("Qwen3Model",)),
    Family("Qwen3MoeForCausalLM", _GPT, _PLAIN, older=("Qwen3MoEModel",)),
    Family("MiMoForCausalLM", _GPT, _PLAIN),
    Family("NemotronForCausalLM", _GPT, _PLAIN, older=("NemotronModel", "Nemotron3Model", "Nemotron4Model")),
    Family("GptOssForCausalLM", _GPT, _PLAIN, older=("GPTOSSProvider",)),
    Family(
        "OlmoeForCausalLM",
        _GPT,
        LayerSpec(f"{MODELS}olmoe.olmoe_provider.olmoe_layer_spec"),
        older=("OlMoEModel",),
        implied=_WIDE_NORMS,
    ),
    Family(
        "MiniMaxM2ForCausalLM",
        _GPT,
        LayerSpec(f"{MODELS}minimax_m2.minimax_m2_provider.minimax_m2_layer_spec"),
        implied=_WIDE_NORMS,
    ),
    Family(
        "Glm4MoeForCausalLM",
        _GPT,
        _BLOCK,
        older=("GLMMoEModel", "GLM45ModelProvider355B", "GLM45AirModel"),
        marks={"moe_router_bias_update_rate": 0, "mtp_loss_scaling_factor": 0.3},
    ),
    Family("Qwen3NextForCausalLM", _GPT, _VARIANT, older=("Qwen3NextModel",), marks={"moe_router_dtype": "fp32"}),
    Family("Qwen3_5ForCausalLM", _GPT, _VARIANT, marks={"num_moe_experts": None}),
    Family("Qwen3_5MoeForCausalLM", _GPT, _VARIANT, marks={"moe_router_dtype": None}),
    Family(
        "DeepseekV2ForCausalLM",
        _LATENT,
        _BLOCK,
        older=("DeepSeekV2",),
        marks={"make_vocab_size_divisible_by": 3200},
        implied=_LATENT_EPSILON,
    ),
    Family(
        "DeepseekV3ForCausalLM",
        _LATENT,
        _BLOCK,
        older=("DeepSeekV3", "MoonlightModel", "KimiK2Provider"),
        marks={"make_vocab_size_divisible_by": 1280},
        implied=_LATENT_EPSILON,
    ),
    Family(
        "GemmaForCausalLM",
        f"{MODELS}gemma.gemma_provider.GemmaModelProvider",
        _PLAIN,
        ("GemmaModel", "CodeGemma"),
        implied=_SCALED,
    ),
    Family(
        "Gemma2ForCausalLM",
        f"{MODELS}gemma.gemma2_provider.Gemma2ModelProvider",
        LayerSpec(f"{MODELS}gemma.gemma2_provider.gemma2_layer_spec"),
        older=("Gemma2Model",),
        implied=_SANDWICH,
    ),
    Family(
        "Gemma3ForCausalLM",
        f"{MODELS}gemma.gemma3_provider.Gemma3ModelProvider",
        LayerSpec(f"{MODELS}gemma.gemma3_provider.gemma3_layer_spec"),
        older=("Gemma3Model",),
        implied=_SANDWICH,
    ),
    Family(
        "MistralForCausalLM",
        f"{MODELS}mistral.mistral_provider.MistralModelProvider",
        _PLAIN,
        ("MistralSmall3Model",),
    ),
    Family(
        "DeciLMForCausalLM",
        f"{MODELS}llama_nemotron.llama_nemotron_provider.LlamaNemotronHeterogeneousProvider",
        older=("Llama31NemotronUltra", "Llama33NemotronSuper"),
    ),
    Family("SarvamMoEForCausalLM", f"{MODELS}sarvam.sarvam_provider.SarvamMoEModelProvider"),
    Family(
        "NemotronHForCausalLM",
        f"{MODELS}mamba.mamba_provider.MambaModelProvider",
        older=(
            *("HybridModelProvider", "NemotronHModel", "Nemotron3NanoProvider", "NemotronNanoModelProvider"),
            *("NemotronNano9Bv2Provider", "NemotronNano12Bv2Provider"),
        ),
    ),
    Family(
        "FalconH1ForCausalLM",
        f"{MODELS}falcon_h1.falconh1_provider.FalconH1ModelProvider",
        implied={"model.mcore_model": "hybrid", "model.attention_beside_mamba": True},
        own=_FALCON_H1,
    ),
    # Families that share provider and spec with one above; some have no table here.
    Family(
        "Exaone4ForCausalLM",
        _GPT,
        LayerSpec(f"{MODELS}exaone.exaone4.exaone4_provider.exaone4_layer_spec"),
        implied={"model.post_layernorms_only": True},
    ),
    Family(
        "Glm4MoeLiteForCausalLM",
        _LATENT,
        _BLOCK,
        marks={"moe_router_bias_update_rate": 0, "mtp_loss_scaling_factor": 0.3},
        implied=_LATENT_EPSILON,
    ),
    Family("GlmMoeDsaForCausalLM", _LATENT, _VARIANT),
    Family(
        "HYV3ForCausalLM",
        _GPT,
        _BLOCK,
        marks={"moe_router_bias_update_rate": 0, "moe_router_load_balancing_type": "none"},
    ),
    Family(
        "BailingMoeV2ForCausalLM",
        _GPT,
        _BLOCK,
        marks={"moe_router_pre_softmax": True, "moe_router_load_balancing_type": "none"},
    ),
)


#: What is written for families that Megatron-Bridge does not convert, and whose layers its plain provider builds.
DEFAULT = Family("", _GPT, _PLAIN)


def families_of(model: Mapping[str, object]) -> tuple[Family, ...]:
    """The families that a `model` node can be of; empty where its provider or its layer spec is none that is known."""
    name = _provider_name(model)
    exact = [family for family in FAMILIES if family.provider.rpartition(".")[2] == name]
    if not exact:
        begins = [(max(map(len, found)), family) for family in FAMILIES if (found := _beginnings(family, name))]
        longest = max((length for length, _ in begins), default=0)
        exact = [family for length, family in begins if length == longest]
    return tuple(family for family in exact if family.fits(model))


def spec_for(family: Family, config: Mapping[str, Value]) -> LayerSpec | None:
    """The layer spec to write for a model of a family; plain layers of which some have experts need one for each."""
    mixed = isinstance(freq := config.get("moe_layer_freq"), list) and len(set(map(str, freq))) > 1
    every = isinstance(freq, int) and freq > 1
    return _BLOCK if family.spec is _PLAIN and config.get("num_moe_experts") and (mixed or every) else family.spec


def _beginnings(family: Family, name: str) -> list[str]:
    return [part for part in family.older if name.startswith(part)]


def family_named(architectures: tuple[str, ...]) -> Family | None:
    """The family of a Hugging Face class, None where Megatron-Bridge has none."""
    return next((family for family in FAMILIES if family.architecture in architectures), None)


def shown(model: Mapping[str, object]) -> str:
    """What a `model` node says of its family, in a few words."""
    spec = _spec_name(model)
    return f"`{_provider_name(model)}`" + ("" if spec is None else f" with `{spec}`")
