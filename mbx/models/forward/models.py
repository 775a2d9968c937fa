"""The two sides of a forward comparison: Transformers' model of a folder, Megatron Core's of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from converters.errors import UsageError
from converters.mcore.keys import EMBEDDING
from converters.protocols import Source
from converters.rows.expr import Value
from converters.rows.isos import inexpressible_rope
from converters.tensors import StoredTensor
from mbx.formats.files import FileSource
from mbx.formats.registry import open_hf
from mbx.models.device import Spread, is_main
from mbx.models.pictures import Seen
from mbx.models.prompts import Batch
from mbx.models.trace import Trace
from mbx.models.transformers.reading import AS_IT_IS, FolderReading

if TYPE_CHECKING:
    from mbx.models.megatron.weights import StoredWeights


@dataclass(frozen=True, slots=True)
class TransformersModel:
    """Transformers' model of a Hugging Face folder, read as `reading` says."""

    path: Path
    reading: FolderReading = AS_IT_IS
    title: str = field(default="Transformers", init=False)

    def padding(self, vocab: int) -> int:
        """No rows: Transformers' loss runs over the vocabulary alone."""
        del vocab
        return 0

    @property
    def note(self) -> str:
        """As which class Transformers runs a model that it has none for, and what mbx decodes; empty for neither."""
        from mbx.models.transformers.folder_weights import FolderWeights
        from mbx.models.transformers.pictures import compared_as

        folder = open_hf(self.path)
        twin = compared_as(folder.config)
        return ("" if twin is None else f"; {twin.note}") + FolderWeights(folder, self.reading).note

    def trace(self, batches: Sequence[Batch], vocab: int, spread: Spread, seen: Sequence[Seen | None] = ()) -> Trace:
        """The pass, on rank 0; an empty trace elsewhere. What a tower sees is its own, whatever another has `seen`."""
        del vocab, seen
        if not is_main():
            import torch

            return Trace({}, lambda first, last: torch.empty(0, last - first))
        from mbx.models.transformers.tracing import trace_transformers

        return trace_transformers(self.path, batches, device=spread.device, reading=self.reading)


@dataclass(frozen=True, slots=True)
class MegatronModel:
    """Megatron Core's model of a flat `config`, with the weights of a Megatron checkpoint of any format.

    `tensors` by torch_dist key have their chunks below `root`; with `torch_dist`, torch's reader reads that folder,
    where `prefix` stands before the keys of a text model inside a larger one. `source` reads tensors that lie in no
    file there.
    `reference` and `hf_config` (v4 spelling) say which rotary frequencies the config cannot express.
    """

    config: Mapping[str, Value]
    root: Path
    tensors: Mapping[str, StoredTensor]
    torch_dist: bool = True
    reference: Path | None = None
    hf_config: Mapping[str, Value] = field(default_factory=dict)
    prefix: str = ""
    source: Source | None = None
    title: str = field(default="Megatron Core", init=False)

    def padding(self, vocab: int) -> int:
        """Rows of the embedding behind the vocabulary."""
        embedding = self.tensors.get(EMBEDDING)
        return 0 if embedding is None else max(0, embedding.shape[0] - vocab)

    @property
    def lent(self) -> tuple[str, ...]:
        """Rotary constants that Megatron Core cannot express, one line each."""
        return tuple(inexpressible_rope(self.hf_config)) if self.reference is not None else ()

    def check(self, spread: Spread) -> None:
        """UnsupportedError where the installed Megatron Core refuses the config; no weight is read."""
        from mbx.models.megatron.config import transformer_config

        # prediction layers are left out of the pass
        transformer_config({**self.config, "mtp_num_layers": None}, spread, use_te=spread.device == "cuda")

    def weights(self, source: FileSource) -> StoredWeights:
        """The checkpoint's weights."""
        from mbx.models.megatron.weights import StoredWeights

        if not self.torch_dist:
            return StoredWeights(self.tensors, self.source or source)
        from mbx.models.megatron.dcp_weights import TorchDistWeights

        return TorchDistWeights(self.root, self.tensors, source, self.prefix)

    def trace(self, batches: Sequence[Batch], vocab: int, spread: Spread, seen: Sequence[Seen | None] = ()) -> Trace:
        """The pass, with pictures as a tower has `seen` them; collective, inside `megatron_on`."""
        from mbx.models.megatron.rotary import transformers_frequencies
        from mbx.models.megatron.tracing import trace_megatron

        source = FileSource(self.root)
        weights = self.weights(source)
        frequencies = transformers_frequencies(self.reference) if self.reference and self.lent else None
        config = dict(self.config)
        if config.get("experimental_attention_variant") == "gated_delta_net" and spread.dtype == "fp32":
            config["deterministic_mode"] = True  # Megatron Core's torch code: the kernels' products are in TF32
        found = trace_megatron(
            config, weights, batches, vocab=vocab, spread=spread, frequencies=frequencies, seen=seen
        )
        return Trace(found.hidden, found.head, source.close)


Model: TypeAlias = TransformersModel | MegatronModel


def vocab_size(config: Mapping[str, Value]) -> int:
    """The true vocabulary size of a Megatron Core config; UsageError where it has none."""
    vocab = config.get("model.vocab_size")
    if not isinstance(vocab, int):
        raise UsageError(f"model.vocab_size is {vocab!r}; forward parity needs a number")
    return vocab
