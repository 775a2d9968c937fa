"""Megatron Core's hybrid (Mamba) models, whose modules need triton to import."""

from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
from megatron.core.models.mamba.mamba_model import MambaModel

__all__ = ["MambaModel", "mamba_stack_spec"]
