"""A checkpoint under the other side's names: what a conversion would write, read by region and written nowhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from converters.codecs import quantization_of
from converters.codecs.decode import decoded_view
from converters.engine.plan import Plan
from converters.engine.planned import PlannedTensors
from converters.errors import UsageError
from converters.mcore.flavours import in_flavour, usual_of
from converters.mcore.layout import Layout
from converters.planning.exporter import Origin, plan_export
from converters.planning.importer import plan_import
from converters.planning.pairing import pair_by_name
from converters.protocols import Source
from converters.tensors import Chunk, Shape, StoredTensor, nbytes_of
from mbx.formats import hf
from mbx.formats.architecture import architecture_of, table_of
from mbx.formats.kept import fitting_kept, not_written
from mbx.formats.tensors import NamedTensors, Spec

if TYPE_CHECKING:
    from mbx.formats.checkpoint import Checkpoint

_MAX_MEMORY = 1 << 30


class View(NamedTensors):
    """The tensors that `plan` makes of a checkpoint; all threads' reads take `max_memory` together."""

    def __init__(self, plan: Plan, opened: Checkpoint, max_memory: int = _MAX_MEMORY) -> None:
        self.plan = plan
        self._made = PlannedTensors(plan, opened.source, max_memory)

    def names(self) -> tuple[str, ...]:
        """Names of all tensors, in the order of the plan."""
        return tuple(self._made.drafts)

    def _spec(self, name: str) -> Spec | None:
        draft = self._made.drafts.get(name)
        return None if draft is None else Spec(name, draft.dtype, draft.shape)

    def _read(self, name: str, offsets: Shape, sizes: Shape) -> npt.NDArray[np.uint8]:
        return self._made.read(name, offsets, sizes)


class ViewSource:
    """A view's tensors as a storage that is read by byte: each is a file of its own, and one chunk of that.

    A read makes the rows that it touches.
    """

    def __init__(self, view: View) -> None:
        self.view = view
        specs = (view._spec(name) for name in view.names())
        self.tensors = {
            s.name: StoredTensor.whole(s.name, s.dtype, s.shape, s.name, 0) for s in specs if s is not None
        }

    def data_start(self, chunk: Chunk) -> int:
        """Nothing stands before the data."""
        return chunk.start

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `start` of a tensor on."""
        tensor = self.tensors[file]
        row = max(1, nbytes_of(tensor.dtype, tensor.shape[1:]))
        first, last = start // row, -(-(start + len(buffer)) // row)
        offsets, sizes = ((first, *(0 for _ in tensor.shape[1:])), (last - first, *tensor.shape[1:]))
        made = self.view._read(file, offsets, sizes) if tensor.shape else self.view._read(file, (), ())
        skip = start - first * row
        buffer[:] = made.reshape(-1)[skip : skip + len(buffer)].data


def hf_view(opened: Checkpoint, mapping: str | None = None) -> View:
    """A checkpoint's tensors under Hugging Face's names, decoded where a codec stores them.

    Raises what the conversion would: UnsupportedError without a table, CoverageError for tensors left over.
    """
    if opened.spelling == "hf":
        plain, encoded = decoded_view(opened.tensors, quantization_of(opened.config))
        return View(replace(pair_by_name(plain, plain).plan, encoded=encoded), opened)
    _require_model(opened)
    found = architecture_of(opened, mapping)
    files = None if found.reference is None else hf.recorded_layout(found.reference)
    quantization = quantization_of(found.config)
    if files is not None and quantization is not None:
        files = hf.decoded_layout(files, quantization)
    recorded = None if files is None else {n: tensor for file in files for n, tensor in file.tensors.items()}
    kept = fitting_kept(opened.home, found.reference, recorded)
    fields = found.table.config.to_mcore(found.config)
    plan = plan_export(found.table, fields, opened.tensors, Origin(recorded, kept))
    if recorded is not None:
        not_written(plan, found.config, recorded, kept)
    return View(plan, opened)


def hf_tensors(opened: Checkpoint, mapping: str | None = None) -> tuple[Mapping[str, StoredTensor], Source]:
    """A checkpoint's tensors under Hugging Face's names, decoded, and what reads them; raises what `hf_view` does."""
    if opened.spelling == "hf" and quantization_of(opened.config) is None:
        return opened.tensors, opened.source
    view = ViewSource(hf_view(opened, mapping))
    return view.tensors, view


def mcore_view(opened: Checkpoint, mapping: str | None = None) -> View:
    """A Hugging Face checkpoint's tensors under Megatron Core's keys, stacked as a torch_dist checkpoint has them.

    Raises what the conversion would: UnsupportedError without a table, CoverageError for tensors left over.
    """
    _require_model(opened)
    table = table_of(opened, opened.config, mapping)
    table = in_flavour(table, usual_of(table))
    return View(plan_import(table, opened.config, opened.tensors, Layout()), opened)


def _require_model(opened: Checkpoint) -> None:
    if opened.spelling == "peft":
        raise UsageError(
            f"`{opened.path}` is an adapter: its tensors have names of their own",
            hint="merge it into its base first",
        )
