"""Mamba-2 mixers on a CPU: Megatron Core's own module, with the recurrence in torch in the place of the kernels.

Megatron Core imports triton for them, and 0.16.1 takes a CPU for a device that it builds no hybrid model on.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any
from unittest.mock import MagicMock, patch

from tests.gpu._mamba_reference import stand_in

#: Megatron Core's mixers, and what holds them here.
_MIXERS = ("megatron.core.ssm.mamba_mixer", "mbx.models.megatron.core.mamba", "mbx.models.megatron.beside_mamba")


def _triton() -> dict[str, Any]:
    """A package whose `jit` leaves functions as they are: those of inference, which nothing calls here."""
    triton, language = types.ModuleType("triton"), MagicMock()
    triton.jit, triton.language = (lambda function: function), language  # type: ignore[attr-defined]
    return {"triton": triton, "triton.language": language}


@contextlib.contextmanager
def mamba_on_cpu() -> Iterator[None]:
    """Build and run mixers on a CPU for as long as the block lasts, in training as well."""
    import mbx.models.megatron.core.layers  # the door: nothing of PyTorch's compiler may see the lent package
    from mbx.models.megatron import build
    from mbx.train.run import prepare

    if not getattr(sys.modules.get(_MIXERS[0]), "HAVE_MAMBA_SSM", False):
        for name in _MIXERS:  # imported without the kernels they stay without
            sys.modules.pop(name, None)
        lent = _triton() if find_spec("triton") is None else {}
        sys.modules.update(lent)
        try:
            stand_in()
            import mbx.models.megatron.core.hybrid  # noqa: F401
        finally:
            for name in lent:
                del sys.modules[name]
    nothing = lambda *_, **__: None  # noqa: E731
    checks = patch.multiple(prepare, check_local=nothing, check_kernels=nothing)
    with patch.object(build, "check_hybrid_without_te", nothing), checks:
        yield
