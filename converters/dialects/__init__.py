"""How one Megatron Core flavour spells the canonical parameter names."""
