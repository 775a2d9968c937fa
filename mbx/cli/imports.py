"""Libraries that a command loads without what it has no use for."""

from __future__ import annotations

import os

_THREADS = "OPENBLAS_NUM_THREADS"


def import_numpy() -> None:
    """Load NumPy with linear algebra of one thread: mbx moves bytes, and multiplies next to nothing.

    OpenBLAS otherwise starts a thread a processor, each with 40 MiB of address space, which a hard limit on memory
    counts, and with a spin of some milliseconds. It reads the variable when it is loaded and never again, so that
    child processes and what else this one loads see the user's own.
    """
    if _THREADS in os.environ:
        return
    os.environ[_THREADS] = "1"
    try:
        import numpy  # noqa: F401
    finally:
        del os.environ[_THREADS]
