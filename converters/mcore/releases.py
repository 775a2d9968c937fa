"""What a release of Megatron Core makes of checkpoints and configs, in one place: plain data, one value a release.

Nothing below or above asks for a version: code takes the fact that it needs from the release it is given. Sources: the
package of that release, and checkpoints of Megatron-LM and Megatron-Bridge with it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from converters.rows.expr import Value


@dataclass(frozen=True, slots=True)
class FusedNorm:
    """A norm that Transformer Engine fuses into the `linear` behind it, within a layer.

    `own` begins its names as a module of its own; `atom` is the first part of a linear that is stored in parts. In a
    model with modules called `apart_beside` it stays one of its own, whatever its layer has.
    """

    own: str
    linear: str
    atom: str = ""
    apart_beside: str = ""

    @property
    def fused(self) -> str:
        """How its names within the linear begin."""
        return f"{self.linear}.layer_norm_"

    @property
    def witness(self) -> str:
        """The parameter whose presence in a layer shows that the norm is fused there."""
        return f"{self.linear}.weight{self.atom}"


@dataclass(frozen=True, slots=True)
class Release:
    """Facts of one release; `gpt` and `hybrid` are the kinds of models, as tables call them.

    Names: `prediction_layer` is the layer within a prediction head (`mtp.layers.N.`) in torch_dist, by kind, and
    `plain_prediction_layer` in a rank's own state_dict of a `gpt` model; `final_norm` the last norm's, by kind.
    `module_order` is the order in which a layer registers its modules.

    States: Transformer Engine backs `te_linears`, by their last name, and every norm but `torch_norms`; each has an
    `_extra_state` beside its weights. `head_core_state`: the attention core of a prediction layer has one too.
    `output_state`: kinds whose output layer has one.

    Stacking: decoder layers of `stacked_kinds` are one tensor each, unless one of `layer_patterns` says that they
    differ, or one of `apart` is set.

    The common state beside the tensors says `checkpoint_version`, and by `content_metadata` how state dicts were
    sharded: `singleton_local_shards` off keeps a gated fc1 as one `[gate; up]` tensor. It lies in `common_file`, or
    where that is None in an object among the tensors; a release reads both kinds of what came before it. `defaults`
    say what a config's field is where its writer does not state it.

    Python: `hybrid_model` and `hybrid_stack` are (module, name) of the hybrid model's class and its layer spec, which
    the class takes as the argument `hybrid_spec`, and the pattern of layers as `hybrid_pattern`; `hybrid_without_te`
    says that its attention and MLP layers can be Megatron Core's own, `sparse_attention` that a GPT model's layers
    can attend to tokens that an indexer chooses, as models do that are published. `model_class` is the kind that a
    transformer is built as where nobody asks for the other. `async_save` are the arguments that make
    `dist_checkpointing.save` write beside a run without further packages.

    Memory: `wide_balance` says that an auxiliary loss holds sigmoid scores in fp32, `fla_convolution` that a gated
    delta net's convolution is flash-linear-attention's, and not causal-conv1d's where that is installed.

    Optimizers: `muon` says that its Muon calls emerging-optimizers as the published ones (0.2 and newer) are called.
    """

    version: str
    prediction_layer: Mapping[str, str]
    plain_prediction_layer: str
    final_norm: Mapping[str, str]
    fused_norms: tuple[FusedNorm, ...]
    module_order: tuple[str, ...]
    te_linears: frozenset[str]
    torch_norms: tuple[str, ...]
    head_core_state: bool
    output_state: frozenset[str]
    stacked_kinds: frozenset[str]
    layer_patterns: tuple[str, ...]
    apart: tuple[str, ...]
    checkpoint_version: float
    content_metadata: Mapping[str, bool]
    defaults: Mapping[str, Value]
    common_file: str | None
    hybrid_model: tuple[str, str]
    hybrid_stack: tuple[str, str]
    hybrid_spec: str
    hybrid_pattern: str
    hybrid_without_te: bool
    sparse_attention: bool
    model_class: str
    wide_balance: bool
    fla_convolution: bool
    muon: bool
    async_save: Mapping[str, str] = field(default_factory=dict)

    @property
    def number(self) -> tuple[int, ...]:
        """`version` as numbers, to be compared."""
        return numbers(self.version)

    def common_state(self, iteration: int) -> dict[str, object]:
        """What the common state of every checkpoint says."""
        return {
            "checkpoint_version": self.checkpoint_version,
            "iteration": iteration,
            "content_metadata": dict(self.content_metadata),
        }

    def kind_of(self, keys: Collection[str]) -> str:
        """The kind of the model whose torch_dist keys these are, by its last norm; `gpt` where none says."""
        for kind, norm in self.final_norm.items():
            if f"{norm}.weight" in keys or any(key.endswith(f"language_model.{norm}.weight") for key in keys):
                return kind
        return "gpt"


#: The module of sparse attention, which reads what a latent attention's norm makes, as its projections do.
_INDEXER = ".core_attention.indexer."

RELEASE_0_16 = Release(
    version="0.16",
    # A hybrid model of 0.16 has no prediction heads: its name is the one of the releases that have.
    prediction_layer={"gpt": "transformer_layer", "hybrid": "mtp_model_layer"},
    plain_prediction_layer="transformer_layer",
    final_norm={"gpt": "decoder.final_layernorm", "hybrid": "decoder.final_norm"},
    fused_norms=(
        FusedNorm("input_layernorm.", "self_attention.linear_qkv"),
        FusedNorm("input_layernorm.", "self_attention.in_proj"),
        FusedNorm("input_layernorm.", "self_attention.in_proj", ".query"),
        FusedNorm("pre_mlp_layernorm.", "mlp.linear_fc1"),
        FusedNorm("self_attention.q_layernorm.", "self_attention.linear_q_up_proj", apart_beside=_INDEXER),
        FusedNorm("self_attention.kv_layernorm.", "self_attention.linear_kv_up_proj", apart_beside=_INDEXER),
        FusedNorm("norm.", "mixer.in_proj", ".z"),
        FusedNorm("norm.", "mixer.in_proj"),
    ),
    module_order=tuple(
        """input_layernorm self_attention.core_attention self_attention.linear_proj self_attention.out_proj
        self_attention.linear_qkv self_attention.in_proj self_attention.conv1d self_attention.out_norm
        self_attention.linear_q_proj self_attention.linear_q_down_proj self_attention.linear_q_up_proj
        self_attention.linear_kv_down_proj self_attention.linear_kv_up_proj self_attention.q_layernorm
        self_attention.k_layernorm self_attention.kv_layernorm mixer.in_proj mixer.conv1d mixer.norm mixer.out_proj
        pre_mlp_layernorm mlp.router mlp.fc1_latent_proj mlp.fc2_latent_proj mlp.experts mlp.linear_fc1
        mlp.linear_fc2 mlp.shared_experts""".split()
    ),
    te_linears=frozenset(
        """linear_qkv linear_proj linear_fc1 linear_fc2 linear_q_proj linear_q_down_proj linear_q_up_proj
        linear_kv_down_proj linear_kv_up_proj in_proj out_proj eh_proj fc1_latent_proj fc2_latent_proj
        linear_wq_b linear_wk linear_weights_proj linear_q linear_kv added_linear_qkv added_linear_proj""".split()
    ),
    torch_norms=("mixer.norm",),
    # Two by accident: prediction layers are first saved by the default rule, so their attention core keeps a state
    # that decoder layers drop, and hybrid models do not drop the output layer's.
    head_core_state=True,
    output_state=frozenset({"hybrid"}),
    stacked_kinds=frozenset({"gpt", "dit"}),
    layer_patterns=("moe_layer_freq", "linear_attention_freq"),
    apart=("heterogeneous_block_specs", "hetereogenous_dist_checkpoint"),  # sic
    checkpoint_version=3.0,
    content_metadata={"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    defaults={
        # of MLATransformerConfig, where Megatron-LM has no arguments, or leaves them None
        **{"original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0, "rope_type": "yarn"},
        **{"model.rotary_base": 10000, "model.rotary_percent": 1.0, "model.rope_scaling_factor": 8.0},
    },
    common_file="common.pt",
    hybrid_model=("megatron.core.models.mamba.mamba_model", "MambaModel"),
    hybrid_stack=("megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"),
    hybrid_spec="mamba_stack_spec",
    hybrid_pattern="hybrid_override_pattern",
    hybrid_without_te=False,
    sparse_attention=False,
    model_class="gpt",
    wide_balance=False,
    fla_convolution=False,
    muon=False,
)
#: Hybrid models got heads, and with them the module another name; the keys of GPT models kept theirs. Heads are saved
#: by their own rule alone. The argument of asynchronous saving is new.
RELEASE_0_17 = replace(
    RELEASE_0_16,
    version="0.17",
    plain_prediction_layer="mtp_model_layer",
    head_core_state=False,
    hybrid_pattern="hybrid_layer_pattern",
    wide_balance=True,
    async_save={"async_strategy": "mcore"},
)
#: MambaModel became a thin subclass of HybridModel.
RELEASE_0_18 = replace(
    RELEASE_0_17,
    version="0.18",
    hybrid_model=("megatron.core.models.hybrid.hybrid_model", "HybridModel"),
    hybrid_stack=("megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"),
    hybrid_spec="hybrid_stack_spec",
    hybrid_without_te=True,
    fla_convolution=True,
    muon=True,
)
#: The common state moved among the tensors. GPTModel warns that it is deprecated; Megatron-LM still trains it. Sparse
#: attention became that of DeepSeek-V3.2 and GLM-5: its indexer got an epsilon and a rotation of its own, layers share
#: choices, and fp32 is taken where before there was bf16 alone.
RELEASE_0_19 = replace(RELEASE_0_18, version="0.19", common_file=None, sparse_attention=True)

RELEASES = (RELEASE_0_16, RELEASE_0_17, RELEASE_0_18, RELEASE_0_19)
#: The release that torch_dist checkpoints are written for: what it asks for, every later one finds as well.
CURRENT = RELEASE_0_16
#: Every name of the layer within a prediction head.
PREDICTION_LAYERS = frozenset(
    name for release in RELEASES for name in (*release.prediction_layer.values(), release.plain_prediction_layer)
)


def numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version such as `0.19.2rc1`; empty where it begins with none."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return () if found is None else (int(found[1]), int(found[2]))


def release_of(version: str) -> Release:
    """The newest known release that is no newer than `version`; the oldest where it is older than all."""
    wanted = numbers(version)
    return next((one for one in reversed(RELEASES) if one.number <= wanted), RELEASES[0])


def is_known(version: str) -> bool:
    """Whether a release of its own describes `version`."""
    return any(one.number == numbers(version) for one in RELEASES)


def written_by(common: str | None = None, names: Iterable[str] = ()) -> str | None:
    """The releases that write a checkpoint so, such as `0.19 or newer`, by two signs; None where neither tells them.

    `common` is where its common state lies (`common.pt`, or `""` among the tensors); `names` are of a rank's own
    state_dict, whose prediction heads name their layer.
    """
    heads = {name.split(".")[3] for name in names if name.startswith("mtp.layers.") and name.count(".") > 3}
    fits = [
        one.version
        for one in RELEASES
        if (common is None or common == (one.common_file or ""))
        and (not heads & PREDICTION_LAYERS or one.plain_prediction_layer in heads)
    ]
    if len(fits) in (0, len(RELEASES)):
        return None
    return f"{fits[-1]} or older" if fits[0] == RELEASES[0].version else f"{fits[0]} or newer"
