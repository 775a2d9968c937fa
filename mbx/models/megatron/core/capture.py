"""What Megatron Core and Transformer Engine do on the processor in a pass, and a CUDA graph cannot record.

Both save the random streams before dropout and put them back behind it; without dropout that changes nothing and is
left out. The fused loss looks whether its gradient is 1, unless the config says that whole passes are recorded. This
file imports torch and megatron when it is imported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from unittest.mock import patch

from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer import enums
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

#: How a release's config says that whole passes are recorded: a scope up to 0.18, an implementation since.
_SCOPES = getattr(enums, "CudaGraphScope", None)
_WHOLE: dict[str, object] = {"cuda_graph_impl": "full_iteration"}
if _SCOPES is not None and "full_iteration" in _SCOPES.__members__:
    _WHOLE = {"cuda_graph_scope": [_SCOPES.full_iteration]}


@contextlib.contextmanager
def recordable(models: Sequence[nn.Module], config: TransformerConfig) -> Iterator[None]:
    """Inside, a pass of models without dropout waits for nothing and exchanges no random stream."""

    def unchanged(*_: object, **__: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    # Transformer Engine's attention holds the method itself, from when it was built
    holders = [m for model in models for m in model.modules() if hasattr(m, "attention_dropout_ctx")]
    with contextlib.ExitStack() as stack:
        for name, value in _WHOLE.items():
            stack.enter_context(patch.object(config, name, value))
        stack.enter_context(patch.object(get_cuda_rng_tracker(), "fork", unchanged))
        for module in holders:
            stack.enter_context(patch.object(module, "attention_dropout_ctx", unchanged))
        yield
