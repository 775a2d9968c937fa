"""Kernels of other packages that some layers need on a GPU: checked before anything is built, named as they compile.

Transformer Engine has none for gated delta nets and for Mamba; Megatron Core takes them from the packages below
(megatron/core/ssm/gated_delta_net.py, mamba_mixer.py, 0.16.1).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from converters.errors import DeviceError
from converters.rows.expr import Value
from mbx.extras import install_line
from mbx.installed import core_release


@dataclass(frozen=True, slots=True)
class Kernels:
    """A kind of layer, the modules that it imports, and the extra that brings them."""

    layers: str
    modules: tuple[str, ...]
    extra: str
    compiles: str


_DELTA = Kernels(
    "gated delta nets",
    ("fla",),
    "gated-delta-net",
    "Triton compiles the kernels of flash-linear-attention for these shapes",
)
_MAMBA = Kernels(
    "Mamba layers",
    ("mamba_ssm", "causal_conv1d", "einops"),
    "mamba",
    "Triton compiles the kernels of mamba-ssm for these shapes",
)


def unpacked_layers(config: Mapping[str, Value], *, te: bool) -> str | None:
    """What of a model keeps the examples of a row not apart, in words; None where all does.

    Some carry a state along the row; on a GPU (`te`) examples are told apart by Transformer Engine's kernels, which
    cap no scores.
    """
    if te and config.get("attn_logit_softcapping"):
        return "layers with capped scores"
    return next((kernels.layers for kernels in _needed(config)), None)


def _needed(config: Mapping[str, Value]) -> Iterator[Kernels]:
    if config.get("experimental_attention_variant") == "gated_delta_net":
        yield _DELTA
    if config.get("model.mcore_model") == "hybrid" and "M" in str(config.get("model.hybrid_override_pattern", "M")):
        yield _MAMBA


def fuses_convolution() -> bool:
    """Whether gated delta nets have a kernel for their convolution and its SiLU; PyTorch keeps what lies between."""
    return core_release().fla_convolution or find_spec("causal_conv1d") is not None


def check_kernels(config: Mapping[str, Value]) -> None:
    """DeviceError, with the command that installs them, where a model's kernels are not here."""
    for kernels in _needed(config):
        if missing := [name for name in kernels.modules if name not in sys.modules and find_spec(name) is None]:
            raise DeviceError(
                f"Megatron Core's {kernels.layers} need {', '.join(missing)}, not installed",
                hint=install_line(kernels.extra),
            )


def compiling(config: Mapping[str, Value]) -> str | None:
    """What a first step is busy with beside training, None where that is nothing to speak of."""
    return next(
        (
            f"the first step takes a minute or more: {k.compiles}, and keeps them for later runs"
            for k in _needed(config)
        ),
        None,
    )
