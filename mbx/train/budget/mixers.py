"""What mixers of tokens keep for their backward pass: attention, latent attention, gated delta nets, Mamba.

Facts of Megatron Core 0.16.1 with Transformer Engine 2.11, flash-linear-attention 0.5 and mamba-ssm 2.3, read from
their sources. Bytes a token of a micro-batch; b is bytes an element.
"""

from __future__ import annotations

from mbx.installed import core_release
from mbx.train.budget.layers import Layer
from mbx.train.budget.load import Load

#: Tokens of a chunk of the gated delta rule, whose inverted triangles it keeps (fla/ops/gated_delta_rule/chunk.py).
_DELTA_CHUNK = 64


def mixer(load: Load, layer: Layer) -> float:
    """Bytes a token that a layer's mixer keeps, with the norm in front of it."""
    kinds = {"attention": _attention, "latent": _latent, "delta": _delta, "mamba": _mamba}
    return kinds[layer.mixer](load, layer) if layer.mixer else 0.0


def _attention(load: Load, layer: Layer) -> float:
    """A norm's input and output; rotated q and k, v, the attention's output and softmax statistics."""
    s, b, h = load.shape, load.b, layer.heads
    norms = s.hidden * (b + load.seen("linear_qkv", normed=True))
    key, value = (0, 0) if h.shares else (h.k, h.v)  # keys that are another layer's are rotated again
    core = (h.q + h.k + value + h.out) * b + 4.0 * h.count + ((h.q + key) * b if layer.qk_norm else 0)
    core += _behind(load, h.out, gated=s.output_gate)
    core += 4 * (h.v + h.groups) if value and s.norms_beside else 0  # a norm of values, in fp32
    if load.recipe.train.recompute == "selective":  # its inputs, v as a view of the whole product; no statistics
        core += (h.q + key) * b - 4 * h.count
        if not s.output_gate and not load.seen("linear_proj"):
            core -= h.out * b  # nobody else keeps the output
    return norms / load.cut + core / load.tp + _post_norm(load)


def _behind(load: Load, width: int, *, gated: bool) -> float:
    """What the output projection keeps beside the attention's output, which attention keeps as it is.

    FP8 products are told to keep that output and cast it again (`save_original_input`), but for delayed scaling. A
    gate keeps its own values and makes a new input of the projection.
    """
    if gated:
        return width * (load.b + load.seen("linear_proj"))
    return width * load.cast if load.recipe.fp8.recipe == "delayed" and not load.frozen else 0.0


def _post_norm(load: Load) -> float:
    """The input of a norm behind the sublayer; its output is added and forgotten."""
    return load.shape.hidden * load.b / load.cut if load.shape.post_norms else 0.0


def _latent(load: Load, layer: Layer) -> float:
    """A norm's input and output, the latents before and behind their norms, q, k, v, output and statistics."""
    s, b = load.shape, load.b
    assert s.latent is not None
    m = s.latent
    down = ("linear_q_down_proj" if m.q else "linear_q_proj", "linear_kv_down_proj")
    norms = s.hidden * (b + load.seen(*down))
    kept = b if s.qk_norm else 0
    norms += (m.kv + m.rotary) * kept + m.kv * load.seen("linear_kv_up_proj", normed=True)
    if m.q:
        norms += m.q * (kept + load.seen("linear_q_up_proj", normed=True))
    h = layer.heads
    norms += 4 * m.rotary * b  # cosines and sines that rotated q and k, which is not one kernel here
    core = (2 * h.q + 2 * h.out) * b + 4.0 * h.count + _behind(load, h.out, gated=False)
    if load.recipe.train.recompute == "selective":
        core -= 4 * h.count + (0 if load.seen("linear_proj") else h.out * b)
    return norms / load.cut + core / load.tp


def _delta(load: Load, layer: Layer) -> float:
    """A gated delta net (megatron/core/ssm/gated_delta_net.py).

    The convolution's input; normed q and k, repeated for the heads of v, with the statistics of their norms; v, the
    gate; beta, and g with what it is made of in fp32; a triangle a chunk; the rule's output, normed, gated.
    """
    s, b = load.shape, load.b
    assert s.delta is not None
    d = s.delta
    repeated = d.heads // d.key_heads
    norms = s.hidden * (b + load.seen("in_proj", normed=True))
    # behind the convolution's kernel nothing of its output but copies is kept
    rule = d.mixed * b * (1 if load.fuses_convolution else 2)
    if core_release().fla_convolution:  # which reads its input where the product is, and so keeps all of that
        rule += (d.value + 2 * d.heads) * b
    rule += 2 * d.key * b * (1 + repeated if repeated > 1 else 1) + 2 * 4 * d.key_heads
    rule += d.value * b + _DELTA_CHUNK * d.heads * b
    rule += d.heads * (b + 3 * 4)  # beta; alpha as softplus reads it, softplus, g summed up
    gate = d.value * b * 3 + 4 * d.heads  # rule's output, its norm, the gate; statistics
    return norms / load.cut + (rule + gate + d.value * load.seen("out_proj")) / load.tp


def _mamba(load: Load, layer: Layer) -> float:
    """A Mamba-2 mixer (megatron/core/ssm/mamba_mixer.py) on the kernel that computes most of it again.

    The whole input product, the scan's output before and behind its gate, the norm's statistics and output.
    """
    s, b = load.shape, load.b
    assert s.mamba is not None
    m = s.mamba
    norms = s.hidden * (b + load.seen("in_proj", normed=True))
    scan = m.rows * b + 2 * m.inner * b + 4 * m.groups + m.inner * load.seen("out_proj")
    return norms / load.cut + scan / load.tp
