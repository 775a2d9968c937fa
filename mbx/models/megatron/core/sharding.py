"""Megatron Core's distributed checkpoints: sharded tensors, and how they are saved and loaded."""

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    apply_factory_merges,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint

__all__ = ["CheckpointingException", "ShardedObject", "ShardedTensor", "ShardedTensorFactory"]
__all__ += ["apply_factory_merges", "apply_swiglu_sharded_factory", "dict_list_map_inplace", "dist_checkpointing"]
__all__ += ["ensure_metadata_has_dp_cp_group", "extract_matching_values", "extract_sharded_tensors_and_factories"]
__all__ += ["is_main_replica", "load_preprocess"]
__all__ += ["make_sharded_tensors_for_checkpoint", "nested_values"]
