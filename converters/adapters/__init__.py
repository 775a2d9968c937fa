"""Low-rank adapters as tensors: PEFT's and Megatron's spellings, the plans between them, and merging."""
