"""Megatron Core's Mamba-2 mixers and their layers, whose modules need triton to import."""

from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules

__all__ = ["MambaLayer", "MambaLayerSubmodules", "MambaMixer", "MambaMixerSubmodules"]
