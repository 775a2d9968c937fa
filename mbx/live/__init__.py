"""Weights in and out of a running Megatron Core model, for reinforcement learning and for trainers.

    live = mbx.live.attach(chunks, "path/to/hf")
    for name, tensor in live.export():
        ...

torch and Megatron Core are imported when a name is used. docs/live.md shows it all.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mbx.live.attaching import attach
    from mbx.live.delta import Delta, Snapshot
    from mbx.live.held import Held
    from mbx.live.model import Live
    from mbx.live.routing import TensorSpec
    from mbx.live.sending import Bucket
    from mbx.live.transport import view_of

_HOMES = {
    "Bucket": "sending",
    "Delta": "delta",
    "Held": "held",
    "Live": "model",
    "Snapshot": "delta",
    "TensorSpec": "routing",
    "attach": "attaching",
    "view_of": "transport",
}

__all__ = ["Bucket", "Delta", "Held", "Live", "Snapshot", "TensorSpec", "attach", "view_of"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module `mbx.live` has no attribute `{name}`")
    return getattr(import_module(f"mbx.live.{_HOMES[name]}"), name)
