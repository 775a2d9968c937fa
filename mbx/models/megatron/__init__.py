"""Megatron Core's side: a model's config, its layer specs, its weights, and a pass through it."""
