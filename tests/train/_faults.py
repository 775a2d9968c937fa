"""Faults of a machine, planted where a run's files are written; and what is whole of what it left."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

from mbx.torchfile.dcp import read_index
from mbx.train.checkpoints import complete, store
from mbx.train.checkpoints.state import STATE


def full(*given: object, **named: object) -> object:
    """What every call answers on a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "planted")


def _on(name: str, when: Callable[[Path], bool]) -> tuple[object, str, object]:
    """A method of Path that fails for some paths."""
    before = getattr(Path, name)

    def method(self: Path, *given: object, **named: object) -> object:
        return full() if when(self) else before(self, *given, **named)

    return Path, name, method


_listdir = os.listdir


def _unlisted(path: str | Path = ".") -> list[str]:
    """What a folder of a checkpoint holds, on a disk that cannot be read."""
    return full() if Path(path).name.startswith("iter_") else _listdir(path)  # type: ignore[return-value]


def places() -> dict[str, tuple[object, str, object]]:
    """Where a checkpoint can fail, in the order in which it is written: what is replaced by what."""
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import common, filesystem_async

    saver = getattr(common, "TorchCommonSaveStrategy", None)
    return {
        "folder": _on("mkdir", lambda path: path.name.startswith("iter_")),
        "list": (os, "listdir", _unlisted),
        **({"common state": (saver, "save_common", full)} if saver else {}),
        "results": (os, "memfd_create", full),
        "tensors": (filesystem_async, "_write_item", full),
        "index": (filesystem_async.FileSystemWriterAsync, "finish", full),
        "metadata.json": (serialization, "save_config", full),
        "recipe": _on("write_text", lambda path: path.name == "recipe.json"),
        "side files": (shutil, "copyfile", full),
        "flush": (complete, "sync", full),
        "state": _on("write_text", lambda path: path.name == f"{Path(STATE).stem}.tmp"),
        "name": _on("rename", lambda path: path.name.startswith("iter_")),
        "tracker": (store, "write_whole", full),
    }


#: Those that a rank beside the main one can meet.
EVERYWHERE = ("results", "tensors")


class Planted:
    """One fault at a time."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def plant(self, place: str | None) -> None:
        """Let `place` fail, and what failed before work again."""
        self._stack.close()
        if place is not None:
            owner, name, fault = places()[place]
            self._stack.enter_context(patch.object(owner, name, fault))


def whole(folder: Path) -> bool:
    """Whether a checkpoint's state can be read, and every archive that its index names has the bytes it had."""
    json.loads((folder / STATE).read_text())
    entries = read_index(folder).storage_data.values()
    for entry in entries:
        with (folder / entry.relative_path).open("rb") as file:
            file.seek(entry.offset)
            with zipfile.ZipFile(io.BytesIO(file.read(entry.length))) as archive:
                if archive.testzip() is not None:
                    return False
    return bool(entries)


def lost(run: Path) -> list[str]:
    """What the metrics of a run say was not written."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["what"] for record in records if record["kind"] == "unwritten"]
