"""Megatron Core's datasets of packed token files."""

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

__all__ = ["BlendedMegatronDatasetBuilder", "GPTDataset", "GPTDatasetConfig", "MockGPTDataset", "NullTokenizer"]
