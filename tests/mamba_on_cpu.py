"""Mamba-2 mixers on a CPU: Megatron Core's own module, with the recurrence in torch in the place of the kernels.

Megatron Core imports triton for them, and 0.16.1 takes a CPU for a device that it builds no hybrid model on.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any
from unittest.mock import MagicMock, patch

from tests.gpu._mamba_reference import stand_in


def _triton() -> dict[str, Any]:
    """A package whose `jit` leaves functions as they are: those of inference, which nothing calls here."""
    triton, language = types.ModuleType("triton"), MagicMock()
    triton.jit, triton.language = (lambda function: function), language  # type: ignore[attr-defined]
    return {"triton": triton, "triton.language": language}


@contextlib.contextmanager
def mamba_on_cpu() -> Iterator[None]:
    """Build and run mixers on a CPU for as long as the block lasts."""
    import mbx.models.megatron.core.layers  # the door: nothing of PyTorch's compiler may see the lent package
    from mbx.models.megatron import build

    if "megatron.core.ssm.mamba_mixer" not in sys.modules:
        lent = {} if "triton" in sys.modules else _triton()
        sys.modules.update(lent)
        try:
            stand_in()
            import mbx.models.megatron.core.hybrid  # noqa: F401
        finally:
            for name in lent:
                del sys.modules[name]
    with patch.object(build, "check_hybrid_without_te", lambda config: None):
        yield
