"""Doors to Megatron Core: the only modules that import `megatron`, each named for what it gives.

A door imports it, and torch, when it is imported itself; others open one where they need it, inside a function.
What a release calls elsewhere, or builds otherwise, is settled here.
"""

from collections.abc import Callable
from unittest.mock import patch

import torch


def _uncompiled(function: Callable[..., object] | None = None, **_: object) -> object:
    """What stands in for torch.compile, called or as a decorator: the function as it is."""
    return function if function is not None else lambda decorated: decorated


# Megatron Core hands its small functions to torch.compile as it is imported. Where there is no GPU to fuse them for,
# that loads PyTorch's compiler, half of the time that the import takes, and the first call needs a C++ compiler.
if torch.cuda.is_available():
    import megatron.core
else:
    with patch.object(torch, "compile", _uncompiled):
        import megatron.core  # noqa: F401
