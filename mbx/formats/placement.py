"""What a format says of a target: where every chunk will lie, and what stands around the data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from converters.engine.plan import Plan
from converters.mcore.releases import Release
from converters.tensors import StoredTensor
from mbx.installed import core_release

if TYPE_CHECKING:
    from mbx.formats.hf import WeightFile
    from mbx.formats.sidecars import Sidecars

#: Bytes of a weight file, its name within the folder of tensors, and where they begin.
Framing = tuple[str, int, bytes]


@dataclass(frozen=True, slots=True)
class Order:
    """What a format is asked to lay out: the targets of `plan`.

    `sidecars` are what a Megatron checkpoint carries beside its tensors, None for other targets. `recorded` are the
    weight files that the tensors once lay in, where that is known; new ones hold at most `max_shard_bytes`. Formats
    that hold a rank's own names take them from `release`, the installed Megatron Core's.
    """

    plan: Plan
    sidecars: Sidecars | None = None
    recorded: tuple[WeightFile, ...] | None = None
    max_shard_bytes: int = 5 * 10**9
    release: Release = field(default_factory=core_release)


@dataclass(frozen=True, slots=True)
class Placement:
    """Target tensors with a place for every chunk, and the size of every weight file, by name in the tensors' folder.

    `headers` are the bytes that weight files begin with, `texts` further files whose content the plan decides. A
    format with bytes elsewhere overrides `before` and `after`; one whose last files name all others, `late`.
    """

    tensors: Mapping[str, StoredTensor]
    file_sizes: Mapping[str, int]
    headers: Mapping[str, bytes] = field(default_factory=dict, kw_only=True)
    texts: Mapping[str, bytes] = field(default_factory=dict, kw_only=True)

    def before(self) -> Iterable[Framing]:
        """What is written into weight files before the data."""
        return ((file, 0, header) for file, header in self.headers.items())

    def archive_dtypes(self) -> Mapping[tuple[str, int], str]:
        """Dtype of the archive that starts at (file, byte), of formats whose chunks are torch.save archives."""
        return {}

    def after(self, crcs: Mapping[str, Sequence[int]]) -> Iterable[Framing]:
        """What is written around the data once their CRC-32s, by tensor and chunk, are known."""
        return ()

    @property
    def late_names(self) -> tuple[str, ...]:
        """Files that `late` makes."""
        return ()

    def late(self, common: Mapping[str, object]) -> Mapping[str, bytes]:
        """Files that are written when all weights are, in this order; `common` is Megatron's common state."""
        return {}
