"""Megatron-Bridge beside `mbx.live`: its `AutoBridge`, of which only the models that are measured are registered.

Its package imports every model that it knows when it is imported, and with them libraries that exporting a text model
has no use for. Here the packages around are empty and the modules that do the work are Megatron-Bridge's own.
"""

from __future__ import annotations

import sys
import types
from importlib import import_module
from pathlib import Path
from typing import Any

#: Packages of Megatron-Bridge whose `__init__` imports all that is in them.
_AROUND = ("bridge", "bridge.models", "bridge.models.qwen", "bridge.training")
_MODELS = ("megatron.bridge.models.qwen.qwen3_moe_bridge",)


def auto_bridge(folder: Path) -> Any:
    """Its bridge of a folder with a config.json alone; ImportError where it is not installed."""
    if "megatron.bridge" not in sys.modules:
        import megatron

        root = next((Path(path) for path in megatron.__path__ if (Path(path) / "bridge").is_dir()), None)
        if root is None:
            raise ImportError("Megatron-Bridge is not installed")
        for name in _AROUND:
            package = types.ModuleType(f"megatron.{name}")
            package.__path__ = [str(root / name.replace(".", "/"))]
            sys.modules[package.__name__] = package
    found = import_module("megatron.bridge.models.conversion.auto_bridge")
    for name in _MODELS:
        import_module(name)
    from transformers import AutoConfig

    return found.AutoBridge.from_hf_config(AutoConfig.from_pretrained(folder))
