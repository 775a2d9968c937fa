"""Megatron Core's hybrid (Mamba) models, whose modules need triton to import."""

from importlib import import_module
from typing import Any

from mbx.installed import core_release

_release = core_release()


def _named(place: tuple[str, str]) -> Any:
    module, name = place
    return getattr(import_module(module), name)


#: The class of hybrid models (MambaModel before 0.18, HybridModel since), and the spec of its layers.
HybridModel = _named(_release.hybrid_model)
hybrid_stack_spec = _named(_release.hybrid_stack)

#: The classes of its layers, and the one that holds their specs.
HybridStack, HybridStackSubmodules = hybrid_stack_spec.module, type(hybrid_stack_spec.submodules)

__all__ = ["HybridModel", "HybridStack", "HybridStackSubmodules", "hybrid_stack_spec"]
