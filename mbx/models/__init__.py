"""Real Megatron Core behind four doors: a CPU context, a builder, a loader and a forward pass.

Everything here imports torch, megatron and transformers inside its functions, so that importing it costs nothing.
"""
