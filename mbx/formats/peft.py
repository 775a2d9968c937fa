"""PEFT's adapter folders: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from pathlib import Path

from converters.errors import StorageError, UnsupportedError
from converters.tensors import StoredTensor
from mbx.formats.bin_weights import has_bin_weights
from mbx.formats.checkpoint import Checkpoint, Spelling
from mbx.formats.hf import side_files
from mbx.formats.placement import Order, Placement
from mbx.formats.safetensors import read_header

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


class Peft:
    """The format of PEFT's folders, of which a model's own weights are no part."""

    name = "peft"
    title = "peft adapter"
    spelling: Spelling = "peft"

    def find(self, path: Path) -> Path | None:
        """The folder itself, where it has an adapter_config.json and no weights of a whole model."""
        if not (path / CONFIG).is_file():
            return None
        whole = has_bin_weights(path) or any(p.name != WEIGHTS for p in path.glob("*.safetensors"))
        return None if whole else path

    def open(self, path: Path, home: Path) -> Checkpoint:
        """Open a folder; nothing but headers is read."""
        if not (home / WEIGHTS).is_file():
            old = (home / "adapter_model.bin").is_file()
            raise StorageError(
                f"`{home}` has no `{WEIGHTS}`",
                hint="load adapter_model.bin with PEFT and save it again: newer versions write safetensors"
                if old
                else None,
            )
        header = read_header(home / WEIGHTS)
        tensors = {
            name: StoredTensor.whole(name, dtype, shape, WEIGHTS, header.data_start + at)
            for name, (dtype, shape, at, _) in header.tensors.items()
        }
        sides = tuple(side_files(home))
        return Checkpoint(
            path, "peft", "peft", home, tensors, root=home, hf=home, weight_files=(WEIGHTS,), side_files=sides
        )

    def place(self, order: Order) -> Placement:
        """A PEFT folder is laid out as a Hugging Face one."""
        raise UnsupportedError("a PEFT folder is made from an adapter checkpoint, not from a model")
