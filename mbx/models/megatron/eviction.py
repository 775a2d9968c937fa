"""Decoder layers of Megatron Core that hold weights only while they run.

A spec's layer class is replaced by a subclass of it that lets go of its parameters when it is built, so that building
a model takes the memory of one layer. Everything else of the layer stays: attributes, buffers, its place in the stack.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any, cast

from mbx.installed import core_release

if TYPE_CHECKING:
    from torch import nn

    from mbx.models.megatron.core.layers import ModuleSpec

_PARKED = "mbx_parked_shapes"


def evict(layer: nn.Module) -> None:
    """Let go of the layer's parameters; their shapes are remembered."""
    layer.__dict__[_PARKED] = {name: p.shape for name, p in layer.named_parameters()}
    for parameter in layer.parameters():
        parameter.data = parameter.data.new_empty(0)


def make_room(layer: nn.Module) -> None:
    """Give an evicted layer parameters again, with whatever the memory holds."""
    shapes = layer.__dict__.pop(_PARKED)
    for name, parameter in layer.named_parameters():
        parameter.data = parameter.data.new_empty(shapes[name])


def is_evicted(layer: nn.Module) -> bool:
    """Whether the layer has no weights now."""
    return _PARKED in layer.__dict__


def evicting_specs(specs: dict[str, object]) -> dict[str, object]:
    """The layer specs of a GPTModel (changed in place) or hybrid model, with layers that evict themselves."""
    hybrid = core_release().hybrid_spec
    if hybrid in specs:
        stack = deepcopy(cast("ModuleSpec", specs[hybrid]))
        for kind in [name for name in vars(stack.submodules) if name.endswith("_layer")]:
            setattr(stack.submodules, kind, _evicting(getattr(stack.submodules, kind)))
        return {**specs, hybrid: stack}
    block = cast("Any", specs["transformer_layer_spec"])
    block.layer_specs = [_evicting(spec) for spec in block.layer_specs]
    return specs


def _evicting(spec: ModuleSpec | type) -> ModuleSpec | type:
    if isinstance(spec, type):
        return spec  # a bare class is mcore's way to say that there is no such layer
    changed = deepcopy(spec)
    base: Any = spec.module

    class Evicting(base):  # type: ignore[misc]  # the base is Megatron Core's own choice
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            evict(self)

        def sharded_state_dict(self, *arguments: Any, **keywords: Any) -> dict[str, object]:
            """As the layer's own; nothing while it has no weights."""
            if is_evicted(self):
                return {}
            return cast("dict[str, object]", super().sharded_state_dict(*arguments, **keywords))

    Evicting.__name__, Evicting.__qualname__ = base.__name__, base.__qualname__
    changed.module = Evicting
    return changed
