"""Make Megatron Core run without a GPU, for as long as a `with` block lasts.

Megatron Core asks CUDA for the current device, for RNG state and for causal masks even when every tensor lives on a
CPU. The patches stay inside one context manager: nothing is changed by importing this module, which imports torch and
megatron.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.fusions import fused_softmax
from megatron.core.tensor_parallel import random as mcore_random
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer import utils as mcore_utils
from megatron.core.transformer.moe import moe_utils


def _cpu_device() -> torch.device:
    return torch.device("cpu")


def _nothing(device: object = None) -> None:
    del device


def _no_stream(device: object = None) -> None:
    # A function of its own: torch.compile refuses one function that stands for two names of torch.
    del device


def _get_state(device: object = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    del device, clone, graph_safe
    return torch.get_rng_state()


def _set_state(new_state: torch.Tensor, device: object = None, graph_safe: bool = False) -> None:
    del device, graph_safe
    torch.set_rng_state(new_state)


def _causal_mask(sq: int) -> torch.Tensor:
    return torch.ones(sq, sq, dtype=torch.bool).triu(1)


def _window_mask(sq: int, skv: int, window_size: tuple[int, int]) -> torch.Tensor:
    # Inclusive window [i - left, i + right] around the query's own position, as megatron.core.transformer.utils
    # has it; True means masked.
    left, right = window_size
    inside = torch.ones(sq, skv, dtype=torch.bool).triu(skv - sq - left).tril(skv - sq + right)
    return ~inside


_MASKS: dict[str, Any] = {"get_default_causal_mask": _causal_mask, "get_sliding_window_causal_mask": _window_mask}


@contextlib.contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Let Megatron Core build, run, save and load models on a CPU; nests, and restores every attribute on exit.

    Patches process-wide names of torch and megatron.core: do not run GPU work in another thread meanwhile.
    The CUDA RNG is torch's CPU generator inside the block.
    """
    rng: dict[str, Any] = {"get_rng_state": _get_state, "set_rng_state": _set_state, "manual_seed": torch.manual_seed}
    with (
        patch.multiple(torch.cuda, current_device=_cpu_device, synchronize=_nothing, current_stream=_no_stream, **rng),
        patch.multiple(mcore_random, _get_cuda_rng_state=_get_state, _set_cuda_rng_state=_set_state),
        patch.multiple(mcore_utils, **_MASKS),
        patch.multiple(fused_softmax, **_MASKS),  # which holds its own references
        # Without Transformer Engine the name is never bound, and the router reads it; with it, the kernel needs CUDA.
        patch.object(moe_utils, "te_general_gemm", None, create=True),
        # 0.16.1 believes in Transformer Engine here whenever its stubs import, then tests isinstance(…, None).
        patch.object(multi_latent_attention, "HAVE_TE", False, create=True),
    ):
        yield
