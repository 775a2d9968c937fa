"""Packages that a library is to think not installed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def hidden(package: str) -> Iterator[None]:
    """Without `package` for what is imported meanwhile: Transformers then takes its own torch code, on any device."""
    there = sys.modules.pop(package, None)
    sys.modules[package] = None  # type: ignore[assignment]  # reads as "not installed"
    try:
        yield
    finally:
        del sys.modules[package]
        if there is not None:
            sys.modules[package] = there
