"""That `converters` and `mappings` are mbx's own: both are plain names, which other projects have at PyPI too."""

from __future__ import annotations

import os
from importlib.util import find_spec

_NAMES = ("converters", "mappings")
#: How the first line of either package's `__init__.py` begins.
_MARK = '"""mbx'


def check_own_packages() -> None:
    """ImportError, with the place, where another project's package lies before mbx's or was installed over it.

    Costs two looks along the path and two first lines: 0.2 ms.
    """
    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for name in _NAMES:
        found = find_spec(name)
        origin = (found.origin if found is not None else None) or ""
        if os.path.dirname(os.path.dirname(origin)) == home and _is_own(origin):
            continue
        where = f"`{name}` at {origin} is another project's package" if origin else f"mbx's `{name}` is not there"
        raise ImportError(
            f"{where}; install mbx into an environment of its own (`pipx install`, `uv tool install`), or uninstall "
            "the other project and install mbx again"
        )


def _is_own(origin: str) -> bool:
    try:
        with open(origin, encoding="utf-8", errors="replace") as file:
            return file.readline().startswith(_MARK)
    except OSError:
        return False
