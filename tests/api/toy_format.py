"""A format of its own, as a stranger would write one: a .npy file a tensor, and an index.json that names them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np

from converters.tensors import Chunk, StoredTensor, nbytes_of
from mbx import Checkpoint, Order, Placement

INDEX = "index.json"
KINDS = {"BF16": "<u2", "F32": "<f4"}  # NumPy has no bf16: its bits


class Npy:
    """Tensors under Megatron Core's keys."""

    name = title = "npy"
    spelling = "mcore"

    def find(self, path: Path) -> Path | None:
        """An index is what tells it."""
        here = [home for home in (path, path / "iter_0000000") if (home / INDEX).is_file()]
        return here[0] if here else None

    def open(self, path: Path, home: Path) -> Checkpoint:
        """Headers are of one size, so that the data begin where the index says."""
        tensors = {}
        for name, (file, dtype, shape, start) in json.loads((home / INDEX).read_text()).items():
            chunk = Chunk((0,) * len(shape), tuple(shape), file, start)
            tensors[name] = StoredTensor(name, dtype, tuple(shape), (chunk,))
        hf = home / "hf"
        return Checkpoint(path, "npy", "mcore", home, tensors, hf=hf if hf.is_dir() else None, root=path)

    def place(self, order: Order) -> Placement:
        """A file a tensor, whole."""
        tensors, sizes, headers, index = {}, {}, {}, {}
        for draft in order.plan.drafts:
            file = f"{draft.name}.npy"
            header = io.BytesIO()
            described = {"descr": KINDS[draft.dtype], "fortran_order": False, "shape": draft.shape}
            np.lib.format.write_array_header_1_0(header, described)
            headers[file] = header.getvalue()
            chunk = Chunk((0,) * len(draft.shape), draft.shape, file, len(headers[file]))
            tensors[draft.name] = StoredTensor(draft.name, draft.dtype, draft.shape, (chunk,))
            sizes[file] = len(headers[file]) + nbytes_of(draft.dtype, draft.shape)
            index[draft.name] = (file, draft.dtype, draft.shape, len(headers[file]))
        return Placement(tensors, sizes, headers=headers, texts={INDEX: json.dumps(index).encode()})
