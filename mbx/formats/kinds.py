"""What kind of folder a path is, told from file names alone, and the command that takes that kind."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Kind = Literal["hf", "mcore", "peft"]

HF_CONFIG = "config.json"
PEFT_CONFIG = "adapter_config.json"
TRACKER = "latest_checkpointed_iteration.txt"
#: Files of an iteration's folder, one of which every Megatron format has.
_OF_ITERATION = (".metadata", "metadata.json", "common.pt")


def kind_of(path: Path) -> Kind | None:
    """Hugging Face, Megatron Core or PEFT; None where nothing tells. A checkpoint of adapters is a Megatron one."""
    if (path / PEFT_CONFIG).is_file():
        return "peft"
    if (path / TRACKER).is_file() or any((path / name).is_file() for name in _OF_ITERATION):
        return "mcore"
    if (path / HF_CONFIG).is_file():
        return "hf"
    return "mcore" if any(path.glob("mp_rank_*")) else None


def found_instead(path: Path) -> str | None:
    """What `path` is, with a command that takes it: a hint for a command that needs another kind."""
    kind = kind_of(path)
    if kind == "peft":
        return (
            f"an adapter: `mbx convert adapter-to-mcore {path} DST`, or `mbx convert merge BASE {path} DST` "
            "with the model that it adapts"
        )
    if kind == "mcore":
        return f"a Megatron checkpoint: `mbx convert mcore-to-hf {path} DST` converts it"
    if kind == "hf":
        return f"a Hugging Face folder: `mbx convert hf-to-mcore {path} DST` converts it"
    return None
