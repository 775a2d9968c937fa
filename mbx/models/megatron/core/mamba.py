"""Megatron Core's Mamba-2 mixer, whose module needs triton to import."""

from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules

__all__ = ["MambaMixer", "MambaMixerSubmodules"]
