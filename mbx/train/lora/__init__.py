"""LoRA and DoRA on Megatron Core models."""
