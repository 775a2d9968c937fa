"""What of Megatron Core trains a model: data-parallel wrapping, optimizers, schedules of passes, fused steps."""

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.fusions.fused_bias_dropout import bias_dropout_add_fused_train
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

__all__ = ["DistributedDataParallel", "DistributedDataParallelConfig", "Float16Module", "MegatronOptimizer"]
__all__ += ["OptimizerConfig", "bias_dropout_add_fused_train", "finalize_model_grads", "get_forward_backward_func"]
__all__ += ["get_megatron_optimizer"]
