"""PEFT's adapter folders: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from pathlib import Path

from converters.errors import StorageError, UnsupportedError
from converters.tensors import StoredTensor
from mbx.formats.bin_weights import has_bin_weights, read_bin_file
from mbx.formats.checkpoint import Checkpoint, Spelling
from mbx.formats.hf import side_files
from mbx.formats.placement import Order, Placement
from mbx.formats.safetensors import read_header

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
#: The same as PEFT wrote it before safetensors, and still writes it where it is asked to.
PICKLE = "adapter_model.bin"


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
        file = next((name for name in (WEIGHTS, PICKLE) if (home / name).is_file()), None)
        if file is None:
            raise StorageError(
                f"`{home}` has `{CONFIG}`, and neither `{WEIGHTS}` nor `{PICKLE}`",
                hint="the factors lie in one of these: copy it beside, or download the adapter again",
            )
        if file == PICKLE:
            tensors = read_bin_file(home / PICKLE)
        else:
            header = read_header(home / WEIGHTS)
            tensors = {
                name: StoredTensor.whole(name, dtype, shape, WEIGHTS, header.data_start + at)
                for name, (dtype, shape, at, _) in header.tensors.items()
            }
        sides = tuple(side_files(home))
        return Checkpoint(
            path, "peft", "peft", home, tensors, root=home, hf=home, weight_files=(file,), side_files=sides
        )

    def place(self, order: Order) -> Placement:
        """A PEFT folder is laid out as a Hugging Face one."""
        raise UnsupportedError("a PEFT folder is made from an adapter checkpoint, not from a model")
