"""mbx moves model weights between Hugging Face and Megatron Core, and proves that nothing was lost.

    import mbx

    with mbx.open("ckpt") as ckpt:
        ckpt.as_hf().read("model.embed_tokens.weight", slice(0, 8), to="torch")

docs/api.md shows it all. What is named here is loaded when it is first used: `import mbx` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from mbx.own_packages import check_own_packages
from mbx.version import __version__

check_own_packages()

if TYPE_CHECKING:
    from converters.codecs.calibration import Calibration
    from converters.errors import (
        Cancelled,
        CoverageError,
        DeviceError,
        LayoutError,
        MbxError,
        StorageError,
        TableError,
        UnsupportedError,
        UsageError,
    )
    from converters.mcore.layout import Layout
    from converters.pruning.choosing import Importance, Pruning
    from converters.rows.coverage import Waivers
    from mbx.api import convert, diff, inspect, integrity, merge, open, plan, prune, reshard, verify
    from mbx.api.measures import calibrate, importance
    from mbx.formats.checkpoint import Checkpoint
    from mbx.formats.placement import Order, Placement
    from mbx.formats.registry import Format, register
    from mbx.formats.tensors import NamedTensors, Spec
    from mbx.run.job import Job, Options

#: Where each name is found.
_HOMES = {
    "converters.codecs.calibration": ("Calibration",),
    "converters.errors": (
        *("Cancelled", "CoverageError", "DeviceError", "LayoutError", "MbxError", "StorageError", "TableError"),
        *("UnsupportedError", "UsageError"),
    ),
    "converters.mcore.layout": ("Layout",),
    "converters.pruning.choosing": ("Importance", "Pruning"),
    "converters.rows.coverage": ("Waivers",),
    "mbx.api": ("convert", "diff", "inspect", "integrity", "merge", "open", "plan", "prune", "reshard", "verify"),
    "mbx.api.measures": ("calibrate", "importance"),
    "mbx.formats.checkpoint": ("Checkpoint",),
    "mbx.formats.placement": ("Order", "Placement"),
    "mbx.formats.registry": ("Format", "register"),
    "mbx.formats.tensors": ("NamedTensors", "Spec"),
    "mbx.run.job": ("Job", "Options"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Calibration",
    "Cancelled",
    "Checkpoint",
    "CoverageError",
    "DeviceError",
    "Format",
    "Importance",
    "Job",
    "Layout",
    "LayoutError",
    "MbxError",
    "NamedTensors",
    "Options",
    "Order",
    "Placement",
    "Pruning",
    "Spec",
    "StorageError",
    "TableError",
    "UnsupportedError",
    "UsageError",
    "Waivers",
    "__version__",
    "calibrate",
    "convert",
    "diff",
    "importance",
    "inspect",
    "integrity",
    "merge",
    "open",
    "plan",
    "prune",
    "register",
    "reshard",
    "verify",
]


#: Modules that are reached as attributes.
_MODULES = ("compat", "live")


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return import_module(f"mbx.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module `mbx` has no attribute `{name}`")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
