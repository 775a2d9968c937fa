"""mbx moves model weights between Hugging Face and Megatron Core, and proves that nothing was lost."""

__version__ = "0.1.0"
