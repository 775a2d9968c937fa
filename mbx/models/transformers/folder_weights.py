"""A folder's tensors as a reference model takes them: decoded where a codec stores them, cast where declared.

Imports torch when imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from converters.codecs import quantization_of
from converters.codecs.decode import Encoded, decoded_view
from converters.protocols import Source
from converters.rows.expr import Value
from converters.tensors import StoredTensor
from mbx.formats.checkpoint import Checkpoint
from mbx.formats.tensors import NamedTensors
from mbx.formats.views import ViewSource, hf_view
from mbx.models.stored import read_rows, read_whole
from mbx.models.transformers.equivalents import twin_of
from mbx.models.transformers.reading import FolderReading
from mbx.models.transformers.reference import decoding, uneven_blocks
from mbx.text import plural


class FolderWeights:
    """What `folder` stores, by the names that a model without quantisation has, under `reading`.

    Transformers decodes MXFP4, and FP8 in blocks that divide a weight, by its own code (`arguments` of
    `from_pretrained`, with the stored parts as the state): that proves the codec along with the table. What it would
    compute with, or cannot read without another library, is decoded here, as the other legs decode it, and `note`
    says so. Either way a value is rounded to the dtype that a conversion decodes it to.

    Of a Megatron checkpoint, with the config of its model, it is what an export would store plainly; `mapping` is a
    table of your own.
    """

    def __init__(self, folder: Checkpoint, reading: FolderReading, mapping: str | None = None) -> None:
        self.reading, self.folder = reading, folder
        self.source: Source = folder.source
        self.by_mbx: Mapping[str, Encoded] = {}
        self.tensors: Mapping[str, StoredTensor] = folder.tensors
        self.arguments: dict[str, Any] = {}
        self._decoded: NamedTensors = folder
        if folder.spelling == "hf":
            self._as_stored(folder)
        else:
            made = ViewSource(hf_view(folder, mapping))
            self.source, self.tensors = made, made.tensors

    def _as_stored(self, folder: Checkpoint) -> None:
        """Tell which of a folder's tensors Transformers decodes, and which are decoded here."""
        quantization = quantization_of(folder.config)
        plain, encoded = decoded_view(folder.tensors, quantization)
        own = bool(encoded) and twin_of(folder.config) is None and not self.reading.casts.keys() & encoded.keys()
        by_transformers = own and _by_transformers(quantization or {}, folder.tensors, encoded)
        self.by_mbx = {} if by_transformers else encoded
        self.tensors = folder.tensors if by_transformers else plain
        self.arguments = decoding(folder.path) if by_transformers else {}
        self._decoded = folder.as_hf() if self.by_mbx else folder

    @property
    def plain(self) -> bool:
        """Whether the model has plain weights, though its config may say that they were quantised."""
        return bool(self.by_mbx) or self.folder.spelling != "hf"

    @property
    def note(self) -> str:
        """What mbx decodes, in a few words; empty where it decodes nothing."""
        names = sorted({whole.codec.name for whole in self.by_mbx.values()})
        return f"; {plural(len(self.by_mbx), 'tensor')} decoded by mbx ({', '.join(names)})" if names else ""

    def whole(self, tensor: StoredTensor) -> torch.Tensor:
        """All of `tensor`, one of `tensors`."""
        if tensor.name in self.by_mbx:
            return self.reading.rounded(tensor, self._decoded.read(tensor.name, to="torch"))
        return self.reading.rounded(tensor, read_whole(tensor, self.source))

    def rows(self, tensor: StoredTensor, runs: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Rows of `tensor`, one of `tensors`, in `runs` of (first, count): [rows of all runs, *rest]."""
        if tensor.name in self.by_mbx:
            parts = [self._decoded.read(tensor.name, slice(at, at + count), to="torch") for at, count in runs]
            return self.reading.rounded(tensor, torch.cat(parts))
        return self.reading.rounded(tensor, read_rows(tensor, self.source, runs))

    def settled(self, model: torch.nn.Module) -> None:
        """Round what Transformers decoded, in place, to the bf16 that a conversion decodes it to."""
        if not self.arguments:
            return
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name not in self.tensors or name + "_scale_inv" in self.tensors:
                    parameter.copy_(parameter.bfloat16())

    def close(self) -> None:
        """Close the folder's files."""
        self.folder.close()


def _by_transformers(
    quantization: Mapping[str, Value], stored: Mapping[str, StoredTensor], encoded: Mapping[str, Encoded]
) -> bool:
    """Whether Transformers decodes all of `encoded` by itself, on a CPU and to the values that are meant."""
    method = quantization.get("quant_method")
    if method == "mxfp4":
        return True
    blocks = all(whole.codec.name == "fp8_block" and f"{name}_scale_inv" in stored for name, whole in encoded.items())
    return method == "fp8" and blocks and uneven_blocks(quantization, stored) is None
