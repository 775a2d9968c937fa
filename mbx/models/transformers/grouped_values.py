"""Gated delta nets of Transformers on a flash-linear-attention whose kernels know one number of heads.

Transformers 5 hands the kernel as many query and key heads as the model has, and the value heads, of which there are
more in every Qwen3-Next and Qwen3.5. Kernels before 0.5 take the one number for the other and read past the tensors
(seen with 0.4.1 on an H200: losses are NaN). Megatron Core repeats queries and keys itself.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    import torch
    from torch import nn

#: What Transformers' modules call, which stands for flash-linear-attention's kernel where that is installed.
_CALLED = "torch_chunk_gated_delta_rule"
#: How a kernel that tells value heads from others calls their number in its documentation.
_VALUE_HEADS = "HV"


@contextlib.contextmanager
def repeated_heads(model: nn.Module) -> Iterator[None]:
    """Run `model`'s gated delta nets on queries and keys repeated to the number of value heads, where the installed
    kernel needs that."""
    homes = {sys.modules[type(module).__module__] for module in model.modules()}
    with contextlib.ExitStack() as undo:
        for home in homes if _takes_one_number() else ():
            if (called := getattr(home, _CALLED, None)) is not None:
                undo.enter_context(patch.object(home, _CALLED, repeating(called)))
        yield


def repeating(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The gated delta `rule` of query and key [b, s, heads, k] and value [b, s, more heads, v]."""

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **others: Any) -> Any:
        times = value.shape[2] // key.shape[2]
        return rule(query.repeat_interleave(times, 2), key.repeat_interleave(times, 2), value, *rest, **others)

    return run


def _takes_one_number() -> bool:
    """Whether flash-linear-attention is installed and documents one number of heads alone."""
    if importlib.util.find_spec("fla") is None:
        return False
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return _VALUE_HEADS not in (inspect.getdoc(chunk_gated_delta_rule) or "")
