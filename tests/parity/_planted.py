"""Plants defects: edits a tensor of a torch_dist checkpoint in place, or a mapping table."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mappings import table_text
from mbx.formats.files import FileSource
from mbx.formats.registry import open_megatron as open_torch_dist
from mbx.run.job import Options, plan_hf_to_mcore, run

Bits = NDArray[np.uint16]


def convert(source: Path, target: Path, mapping: str | None = None) -> Path:
    run(plan_hf_to_mcore(source, target, Options(mapping=mapping, sync=False)))
    return target


def edit(checkpoint: Path, name: str, change: Callable[[Bits, tuple[int, ...]], Bits]) -> None:
    """Replace every chunk of the 16-bit tensor `name` by `change(values, offsets of the chunk)`."""
    opened = open_torch_dist(checkpoint)
    source = FileSource(opened.iteration)
    for chunk in opened.tensors[name].chunks:
        start = source.data_start(chunk)
        path = opened.iteration / chunk.file
        raw = bytearray(path.read_bytes())
        size = int(np.prod(chunk.sizes)) * 2
        before = np.frombuffer(bytes(raw[start : start + size]), np.uint16).reshape(chunk.sizes)
        after = np.ascontiguousarray(change(before.copy(), chunk.offsets))
        assert after.shape == before.shape and after.dtype == before.dtype
        raw[start : start + size] = after.tobytes()
        path.write_bytes(raw)
    source.close()


def table_with(name: str, folder: Path, old: str, new: str) -> str:
    """A user's own table: the shipped one with one text replaced."""
    text = table_text(name)
    assert old in text
    path = folder / f"own_{name}.toml"
    path.write_text(text.replace(old, new), encoding="utf-8")
    return str(path)


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target
