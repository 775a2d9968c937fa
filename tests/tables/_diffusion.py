"""What Megatron-Bridge's diffusion models compute, in plain torch from a checkpoint's tensors, rank by rank.

An oracle for tests alone: Bridge's modules ask for Transformer Engine and a GPU. Each rank gets its part of a weight
as Megatron Core's column- and row-parallel linears cut it, and its heads alone; parts are summed or put side by side
where Bridge does. Shapes are [batch, sequence, width].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

State = Mapping[str, Tensor]
#: Cosines and sines of the angles that pairs of neighbouring channels turn by: [sequence, 1, width of a head].
Turn = tuple[Tensor, Tensor]
_EPSILON = 1e-6


def stored_state(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a torch_dist checkpoint in fp32, by torch's own reader."""
    reader = dcp.FileSystemReader(checkpoint / "iter_0000000")
    entries = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return {name: tensor.float() for name, tensor in tensors.items()}


def below(state: State, prefix: str, entry: int | None = None) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by the rest; one `entry` of each where they are stacked."""
    found = {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}
    return found if entry is None else {name: tensor[entry] for name, tensor in found.items()}


def linear(x: Tensor, own: State, name: str) -> Tensor:
    """A linear that every rank has whole."""
    return F.linear(x, own[f"{name}.weight"], own[f"{name}.bias"])


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=_EPSILON)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, _EPSILON)


def turned(x: Tensor, turn: Turn | None) -> Tensor:
    """Neighbouring channels of each head turned: [batch, sequence, heads, width of a head]."""
    if turn is None:
        return x
    pairs = x.unflatten(-1, (-1, 2))
    quarter = torch.stack((-pairs[..., 1], pairs[..., 0]), -1).flatten(-2)
    return x * turn[0] + quarter * turn[1]


def sinusoids(at: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of a time: [batch, width]."""
    rates = torch.exp(-math.log(10000) * torch.arange(width // 2) / (width // 2))
    return torch.cat((torch.cos(at[:, None] * rates), torch.sin(at[:, None] * rates)), -1)


@dataclass(frozen=True)
class Ranks:
    """Tensor-parallel ranks of a model with `heads` heads."""

    count: int
    heads: int

    def fused(self, x: Tensor, own: State, name: str, parts: int) -> list[list[Tensor]]:
        """What each rank's rows of a fused projection give: `parts` for each head in turn, each with heads apart."""
        weights, biases = own[f"{name}.weight"].chunk(self.count), own[f"{name}.bias"].chunk(self.count)
        return [
            list(F.linear(x, weight, bias).unflatten(-1, (self.heads // self.count, parts, -1)).unbind(-2))
            for weight, bias in zip(weights, biases, strict=True)
        ]

    def over_heads(self, parts: list[Tensor], weight: Tensor) -> list[Tensor]:
        """A norm over all heads at once, which ranks gather for it."""
        whole = torch.cat(parts, 2)
        return list(rms(whole.flatten(2), weight).unflatten(2, whole.shape[2:]).chunk(self.count, 2))

    def columns(self, parts: list[Tensor], weight: Tensor) -> Tensor:
        """The sum of what each rank's columns make of its part."""
        cut = weight.chunk(self.count, 1)
        return sum((F.linear(part, own) for part, own in zip(parts, cut, strict=True)), torch.zeros(()))

    def mlp(self, x: Tensor, own: State, name: str = "mlp") -> Tensor:
        first, bias = own[f"{name}.linear_fc1.weight"].chunk(self.count), own[f"{name}.linear_fc1.bias"]
        inner = [
            F.gelu(F.linear(x, w, b), approximate="tanh") for w, b in zip(first, bias.chunk(self.count), strict=True)
        ]
        return self.columns(inner, own[f"{name}.linear_fc2.weight"]) + own[f"{name}.linear_fc2.bias"]


def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of each head to all positions, heads together again."""
    q, k, v = (part.transpose(1, 2) for part in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def wan_block(x: Tensor, time: Tensor, text: Tensor, turn: Turn, own: State, ranks: Ranks) -> Tensor:
    """A layer of WanModel: `time` is [batch, 6, width]."""
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (own["adaLN.modulation"] + time).chunk(6, 1)
    attention = below(own, "full_self_attention.")
    parts = ranks.fused(norm(x) * (1 + scale) + shift, attention, "linear_qkv", 3)
    query = ranks.over_heads([part[0] for part in parts], attention["q_layernorm.weight"])
    key = ranks.over_heads([part[1] for part in parts], attention["k_layernorm.weight"])
    made = [attended(turned(q, turn), turned(k, turn), part[2]) for q, k, part in zip(query, key, parts, strict=True)]
    x = x + gate * (ranks.columns(made, attention["linear_proj.weight"]) + attention["linear_proj.bias"])
    cross = below(own, "cross_attention.")
    seen = F.layer_norm(x, x.shape[-1:], own["norm3.weight"], own["norm3.bias"], _EPSILON)
    asked = [part[0] for part in ranks.fused(seen, cross, "linear_q", 1)]
    given = ranks.fused(text, cross, "linear_kv", 2)
    query = ranks.over_heads(asked, cross["q_layernorm.weight"])
    key = ranks.over_heads([part[0] for part in given], cross["k_layernorm.weight"])
    made = [attended(q, k, part[1]) for q, k, part in zip(query, key, given, strict=True)]
    x = x + ranks.columns(made, cross["linear_proj.weight"]) + cross["linear_proj.bias"]
    return x + mlp_gate * ranks.mlp(norm(x) * (1 + mlp_scale) + mlp_shift, own)


def wan(state: State, video: Tensor, time: Tensor, text: Tensor, turn: Turn, ranks: Ranks) -> Tensor:
    """WanModel up to its patches: [batch, patches, channels and pixels of one]."""
    conv = state["patch_embedding.weight"]
    x = F.conv3d(video, conv, state["patch_embedding.bias"], stride=tuple(conv.shape[2:])).flatten(2).transpose(1, 2)
    inner = sinusoids(time, state["time_embedder.linear_1.weight"].shape[1])
    embedded = linear(F.silu(linear(inner, state, "time_embedder.linear_1")), state, "time_embedder.linear_2")
    steps = linear(F.silu(embedded), state, "time_proj").unflatten(1, (6, -1))
    context = linear(F.gelu(linear(text, state, "text_embedding.0"), approximate="tanh"), state, "text_embedding.2")
    for layer in range(len(state["decoder.layers.adaLN.modulation"])):
        x = wan_block(x, steps, context, turn, below(state, "decoder.layers.", layer), ranks)
    shift, scale = (state["head.modulation"] + embedded[:, None]).chunk(2, 1)
    return linear(norm(x) * (1 + scale) + shift, state, "head.head")


def flux_turn(ids: Tensor, axes: list[int]) -> Turn:
    """FLUX's angles of positions [sequence, axes]."""
    angles = [
        ids[:, i, None].double() / 10000 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
        for i, width in enumerate(axes)
    ]
    whole = torch.cat(angles, -1).float().repeat_interleave(2, -1)[:, None]
    return torch.cos(whole), torch.sin(whole)


def _joint(parts: list[list[Tensor]], own: State, of: str = "") -> list[list[Tensor]]:
    """Queries and keys of each rank behind their norms."""
    norms = (own[f"{of}q_layernorm.weight"], own[f"{of}k_layernorm.weight"])
    return [[*(rms(one, weight) for one, weight in zip(part[:2], norms, strict=True)), part[2]] for part in parts]


def flux_double(
    x: Tensor, text: Tensor, vector: Tensor, turn: Turn, own: State, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """An MMDiTLayer: image and text side by side, and one attention of both."""
    image = linear(F.silu(vector), own, "adaln.linear")[:, None].chunk(6, -1)
    words = linear(F.silu(vector), own, "adaln_context.linear")[:, None].chunk(6, -1)
    attention = below(own, "self_attention.")
    mine = _joint(ranks.fused(norm(x) * (1 + image[1]) + image[0], attention, "linear_qkv", 3), attention)
    added = ranks.fused(norm(text) * (1 + words[1]) + words[0], attention, "added_linear_qkv", 3)
    made, length = [], text.shape[1]
    for one, other in zip(_joint(added, attention, "added_"), mine, strict=True):
        query, key, value = (torch.cat(both, 1) for both in zip(one, other, strict=True))
        made.append(attended(turned(query, turn), turned(key, turn), value))
    seen = ranks.columns([part[:, length:] for part in made], attention["linear_proj.weight"])
    read = ranks.columns([part[:, :length] for part in made], attention["added_linear_proj.weight"])
    x = x + image[2] * (seen + attention["linear_proj.bias"])
    text = text + words[2] * (read + attention["added_linear_proj.bias"])
    x = x + image[5] * ranks.mlp(norm(x) * (1 + image[4]) + image[3], own)
    return x, text + words[5] * ranks.mlp(norm(text) * (1 + words[4]) + words[3], own, "context_mlp")


def flux_single(x: Tensor, vector: Tensor, turn: Turn, own: State, ranks: Ranks) -> Tensor:
    """A FluxSingleTransformerBlock: attention and MLP of one input, whose outputs are added."""
    shift, scale, gate = linear(F.silu(vector), own, "adaln.linear")[:, None].chunk(3, -1)
    inner = norm(x) * (1 + scale) + shift
    attention = below(own, "self_attention.")
    parts = _joint(ranks.fused(inner, attention, "linear_qkv", 3), attention)
    made = [attended(turned(q, turn), turned(k, turn), v) for q, k, v in parts]
    return x + gate * (ranks.mlp(inner, own) + ranks.columns(made, attention["linear_proj.weight"]))


def flux(state: State, given: Mapping[str, Tensor], axes: list[int], ranks: Ranks) -> Tensor:
    """Flux: what diffusers' model is `given` by its arguments' names."""

    def embedded(inner: Tensor, name: str) -> Tensor:
        return linear(F.silu(linear(inner, state, f"{name}.in_layer")), state, f"{name}.out_layer")

    x, text = (
        linear(given["hidden_states"], state, "img_embed"),
        linear(given["encoder_hidden_states"], state, "txt_embed"),
    )
    width = state["timestep_embedding.time_embedder.in_layer.weight"].shape[1]
    vector = embedded(sinusoids(given["timestep"] * 1000, width), "timestep_embedding.time_embedder")
    vector = vector + embedded(given["pooled_projections"], "vector_embedding")
    if "guidance" in given:
        vector = vector + embedded(sinusoids(given["guidance"] * 1000, width), "guidance_embedding")
    turn = flux_turn(torch.cat((given["txt_ids"], given["img_ids"])), axes)
    numbers = {kind: len({n.split(".")[1] for n in state if n.startswith(f"{kind}.")}) for kind in _KINDS}
    for block in range(numbers["double_blocks"]):
        x, text = flux_double(x, text, vector, turn, below(state, f"double_blocks.{block}."), ranks)
    length, x = text.shape[1], torch.cat((text, x), 1)
    for block in range(numbers["single_blocks"]):
        x = flux_single(x, vector, turn, below(state, f"single_blocks.{block}."), ranks)
    scale, shift = linear(F.silu(vector), state, "norm_out.adaLN_modulation.1")[:, None].chunk(2, -1)
    return linear(norm(x[:, length:]) * (1 + scale) + shift, state, "proj_out")


_KINDS = ("double_blocks", "single_blocks")
