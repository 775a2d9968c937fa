"""Low-rank adapters as folders: PEFT's, Megatron's, and the base models they are merged into."""
