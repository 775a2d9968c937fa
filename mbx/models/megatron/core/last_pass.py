"""What Megatron Core's modules keep of their last forward pass, and how a model that is done with lets go of it.

A dispatcher of experts keeps the probabilities that it multiplied by, with the graph behind them. That graph holds the
weights' gradient accumulators, whose hooks hold the data-parallel wrapper, which holds the model: a cycle through code
that Python's collector does not see, so that model, optimizer state and process groups would stay for good.
This file imports torch when it is imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

#: Objects that are no modules and that a layer of experts computes with.
_HELPERS = ("token_dispatcher", "_comm_manager")


def forget_last_pass(chunks: Iterable[nn.Module]) -> None:
    """Drop every tensor that has a past and is kept as an attribute; the model can still be run."""
    for chunk in chunks:
        for module in chunk.modules():
            for holder in _with_helpers(module):
                for name, value in list(vars(holder).items()):
                    if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                        setattr(holder, name, None)


def _with_helpers(holder: object) -> Iterator[object]:
    yield holder
    for name in _HELPERS:
        if (helper := vars(holder).get(name)) is not None:
            yield from _with_helpers(helper)
