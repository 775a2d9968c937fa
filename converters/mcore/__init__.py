"""How Megatron Core names, stacks, cuts and places its parameters, and what its sidecars say of a model."""
