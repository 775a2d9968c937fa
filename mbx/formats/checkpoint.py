"""The first idea as an object: a checkpoint of any format, opened: named global tensors that can be read by region."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from converters.codecs import quantization_of
from converters.mcore.layout import Layout
from converters.rows.expr import Value
from converters.stored import read_box
from converters.tensors import Shape, StoredTensor
from mbx.formats.files import MANIFEST, MANIFEST_BYTES, SCALED, WAIVED_KEYS, FileSource
from mbx.formats.tensors import NamedTensors, Spec
from mbx.untrusted.small_files import read_json

#: Whose names tensors go by: Hugging Face's, Megatron Core's canonical keys (torch_dist's), or PEFT's.
Spelling = Literal["hf", "mcore", "peft"]


@dataclass(frozen=True)
class Checkpoint(NamedTensors):
    """An opened checkpoint: headers are read, tensors are not. Every format answers with one.

    `path` is what was named, `home` the folder that the files of `tensors` are relative to, `root` the folder with
    Megatron's tracker (`home` where there is none). `format` is a format's name, `spelling` whose names the tensors
    have. `writer` is the tool that made it, `core` the releases of Megatron Core that write so (`0.19 or newer`), as
    far as that shows. `config` is the config.json among its files, empty where there is none; `hf` the folder that it
    and the other Hugging Face side files lie in. `allowed_keys` are keys of it that whoever opened this waives.

    Of Hugging Face folders: `weight_files` and `side_files` by name; `passed_over` are weight files with copies of
    tensors that do not count, and an index that does not, `notes` what a user should know of them.

    Of Megatron checkpoints: `model_class` is the class whose tensors are stored, `gpt` or `hybrid`; a HybridModel that
    has a GPTModel's form comes under that one's keys, with its args. `objects` are the `_extra_state` objects,
    `num_objects` counts all. `args` are the attributes of Megatron-LM's Namespace, `common` what else the common state
    holds, `run_config` is Megatron-Bridge's; each None where there is none. `layout` is the one the files were written
    under, as far as they tell. `left_out` says in words what else is stored, `other_state` counts it by kind as
    (tensors, bytes); `state` are the optimizer's tensors by stored name, of torch_dist checkpoints alone.
    """

    path: Path
    format: str
    spelling: Spelling
    home: Path
    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Value] = field(default_factory=dict)
    writer: str | None = None
    core: str | None = None
    model_class: str | None = None
    root: Path = Path()
    hf: Path | None = None
    allowed_keys: tuple[str, ...] = ()
    weight_files: tuple[str, ...] = ()
    passed_over: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    side_files: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()
    num_objects: int = 0
    args: Mapping[str, object] | None = None
    common: Mapping[str, object] | None = None
    layout: Layout | None = None
    run_config: Mapping[str, object] | None = None
    left_out: tuple[str, ...] = ()
    other_state: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    state: Mapping[str, StoredTensor] = field(default_factory=dict)

    def names(self) -> tuple[str, ...]:
        """Names of all tensors as `spelling` has them."""
        return tuple(self.tensors)

    def as_hf(self, *, mapping: str | None = None) -> NamedTensors:
        """The same model under Hugging Face's names, whatever lies on the disk; values of a codec are decoded.

        `mapping` is a table of your own. Raises what a conversion would: UnsupportedError where no table knows the
        architecture, CoverageError where tensors or settings are left over.
        """
        from mbx.formats.views import hf_view

        if self.spelling == "hf" and quantization_of(self.config) is None:
            return self
        return hf_view(self, mapping)

    def as_mcore(self, *, mapping: str | None = None) -> NamedTensors:
        """The same model under Megatron Core's canonical keys, layers and experts stacked as torch_dist has them."""
        from mbx.formats.views import mcore_view

        return self if self.spelling == "mcore" else mcore_view(self, mapping)

    @property
    def architecture(self) -> str | None:
        """The model's class or type, by config.json or else by Megatron's sidecars; None where nothing says it."""
        from mbx.formats.architecture import architecture_name

        return architecture_name(self)

    def _spec(self, name: str) -> Spec | None:
        tensor = self.tensors.get(name)
        return None if tensor is None else Spec(name, tensor.dtype, tensor.shape)

    def _read(self, name: str, offsets: Shape, sizes: Shape) -> npt.NDArray[np.uint8]:
        return read_box(self.tensors[name], self.source, offsets, sizes)

    @property
    def iteration(self) -> Path:
        """The folder of a Megatron checkpoint's tensors, `iter_*`."""
        return self.home

    @cached_property
    def waived_keys(self) -> tuple[str, ...]:
        """Unknown keys of config.json that were waived: now, or by the conversion that made this checkpoint."""
        waived = self._manifest.get("waived")
        keys = waived.get(WAIVED_KEYS) if isinstance(waived, dict) else None
        recorded = [str(key) for key in keys] if isinstance(keys, list) else []
        return tuple(dict.fromkeys((*self.allowed_keys, *recorded)))

    @cached_property
    def scaled(self) -> tuple[str, ...]:
        """Tensors that the export which made this folder scaled the channels of, which leaves the model the same."""
        found = self._manifest.get(SCALED)
        return tuple(map(str, found)) if isinstance(found, list) else ()

    @cached_property
    def _manifest(self) -> Mapping[str, object]:
        """What mbx wrote of how it made this checkpoint; empty where it did not."""
        folders = dict.fromkeys((self.path, self.home, self.home.parent))
        made = next((folder / MANIFEST for folder in folders if (folder / MANIFEST).is_file()), None)
        found = {} if made is None else read_json(made, MANIFEST_BYTES)
        return found if isinstance(found, dict) else {}

    def allowing(self, keys: Iterable[str]) -> Checkpoint:
        """The same, with more keys of its config.json waived."""
        return replace(self, allowed_keys=tuple(dict.fromkeys((*self.allowed_keys, *keys))))

    @cached_property
    def source(self) -> FileSource:
        """Reads the files of `tensors`, from any thread; `close` ends it."""
        return FileSource(self.home)

    def close(self) -> None:
        """Close the files that were read; they open again when they are read again."""
        if "source" in self.__dict__:
            self.source.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def files(self) -> Iterator[Path]:
        """Every file that holds tensors."""
        yield from sorted({self.home / chunk.file for tensor in self.tensors.values() for chunk in tensor.chunks})
