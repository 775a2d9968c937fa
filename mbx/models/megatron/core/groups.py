"""Megatron Core's parallel groups, their random streams, and what moves between their ranks."""

from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel.layers import (
    set_defaults_if_not_set_tensor_model_parallel_attributes,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    get_expert_parallel_rng_tracker_name,
    model_parallel_cuda_manual_seed,
)
from megatron.core.utils import get_batch_on_this_cp_rank

__all__ = ["PackedSeqParams", "get_batch_on_this_cp_rank", "get_cuda_rng_tracker"]
__all__ += ["get_expert_parallel_rng_tracker_name", "mappings", "model_parallel_cuda_manual_seed", "parallel_state"]
__all__ += ["set_defaults_if_not_set_tensor_model_parallel_attributes", "set_tensor_model_parallel_attributes"]
