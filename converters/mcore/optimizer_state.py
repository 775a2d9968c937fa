"""Names of an optimizer's state in torch_dist checkpoints, where it lies in the space of the model's parameters.

`optimizer.state.exp_avg.KEY` is a tensor of the shape of the weight `KEY`, cut as it is: the fp32 main parameter
(`param`, `fp32_param`) and each moment. Source: `sharded_param_state_fully_reshardable` of core/optimizer/
distrib_optimizer.py and `make_sharded_optimizer_tensor` of core/dist_checkpointing/optimizer.py.
"""

from __future__ import annotations

import re

_STATE = re.compile(r"((?:chained_\d+\.)?optimizer\.state\.([^.]+)\.)(.+)")


def weight_of(name: str) -> str:
    """The weight's key that a state belongs to; a name of no state is its own."""
    found = _STATE.fullmatch(name)
    return name if found is None else found[3]


def is_state(name: str) -> bool:
    """Whether a name is that of a state in the space of a parameter."""
    return _STATE.fullmatch(name) is not None


def renamed(name: str, weight: str) -> str:
    """`name`, a state's, with its weight under another key."""
    found = _STATE.fullmatch(name)
    return weight if found is None else found[1] + weight
