"""Megatron-FSDP's `fsdp_dtensor` checkpoints as folders: plain torch DCP, without `common.pt` and `metadata.json`.

    ckpt/iter_0000000/{__R_N.distcp, .metadata, hf/}

`args`, `checkpoint_version` and `iteration` are objects among the tensors. Whatever grid of shards a writer's mesh
made is read; a target's shards follow the layout as in torch_dist. Any mesh can load either.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from converters.engine.plan import Draft
from converters.mcore.cuts import is_gated
from converters.mcore.fsdp_dtensor import Part, is_fused_glu, is_weight, parse_stored, parts_of
from converters.mcore.keys import parse_key
from converters.mcore.megatron_args import config_of_args
from converters.tensors import Chunk, Shape, StoredTensor
from mbx.formats import torch_dist
from mbx.formats.checkpoint import McoreCheckpoint
from mbx.formats.gathering import gather
from mbx.formats.sidecars import read_run_config
from mbx.torchfile.archive import file_reader, object_archive, read_object
from mbx.torchfile.dcp import DcpCheckpoint, build_dcp_metadata, read_dcp
from mbx.torchfile.torch_values import Namespace

#: Entries of Megatron-LM's state_dict that are objects of the checkpoint.
_OBJECTS = ("args", "checkpoint_version", "iteration", "num_floating_point_operations_so_far")


def is_fsdp_dtensor(iteration: Path) -> bool:
    """Whether a folder is one: DCP of a model's `state_dict`, and no `metadata.json` beside it."""
    if (iteration / "metadata.json").is_file() or not (iteration / ".metadata").is_file():
        return False
    return any(map(is_weight, read_dcp(iteration).tensors))


def open_fsdp_dtensor(iteration: Path) -> McoreCheckpoint:
    """Open an iteration's folder; tensors come under torch_dist keys, stacked as torch_dist would.

    Raises StorageError for a checkpoint that is not whole: layers, experts or halves missing.
    """
    dcp = read_dcp(iteration)
    common = _objects(iteration, dcp)
    args = common.pop("args", None)
    weights = {name: tensor for name, tensor in dcp.tensors.items() if is_weight(name)}
    tensors = gather(weights, parse_stored, config_of_args(args) if isinstance(args, dict) else {})
    left_out = []
    if state := [tensor for name, tensor in dcp.tensors.items() if name.startswith("optimizer.")]:
        left_out.append(f"optimizer state: {len(state)} tensors, {sum(t.nbytes for t in state)} bytes")
    if any(name.startswith(("rng_state", "rerun_state")) for name in (*dcp.objects, *dcp.tensors)):
        left_out.append("random-number state")
    hf = iteration / "hf"
    return McoreCheckpoint(
        iteration.parent,
        iteration,
        "fsdp_dtensor",
        tensors,
        (),
        hf if hf.is_dir() else None,
        args if isinstance(args, dict) else None,
        common,
        run_config=read_run_config(iteration),
        left_out=tuple(left_out),
    )


def _objects(iteration: Path, dcp: DcpCheckpoint) -> dict[str, object]:
    out: dict[str, object] = {}
    for name in _OBJECTS:
        if name not in dcp.objects:
            continue
        file, start, length = dcp.objects[name]
        fd = os.open(iteration / file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            value, _ = read_object(file_reader(fd, start), length, unknown="opaque", source=f"{iteration / file}")
        finally:
            os.close(fd)
        out[name] = value.values if isinstance(value, Namespace) else value
    return out


@dataclass(frozen=True, slots=True)
class Placement(torch_dist.Placement):
    """Target tensors under torch_dist keys; `parts` say under which names their regions are stored."""

    parts: Mapping[str, tuple[Part, ...]]

    def index_names(self) -> tuple[str, ...]:
        """Files that `write_index` makes."""
        return (".metadata",)

    def write_index(self, iteration: Path, common: Mapping[str, object]) -> None:
        """Write `.metadata`; what would be common state lies among the tensors."""
        (iteration / ".metadata").write_bytes(build_dcp_metadata(self.stored(), self.objects))

    def stored(self) -> list[StoredTensor]:
        """The tensors as the folder's index names them."""
        out: list[StoredTensor] = []
        for key, tensor in self.tensors.items():
            depth = parse_key(key).depth
            found: dict[str, list[Chunk]] = {part.name: [] for part in self.parts[key]}
            homes: dict[Shape, list[Part]] = {}
            for part in self.parts[key]:
                homes.setdefault(part.index, []).append(part)
            for chunk in tensor.chunks:
                inner = chunk.offsets[depth:]
                row = inner[0] if inner else 0
                home = next(p for p in homes[chunk.offsets[:depth]] if p.row <= row < p.row + p.rows)
                offsets = (row - home.row, *inner[1:]) if inner else ()
                found[home.name].append(
                    Chunk(offsets, chunk.sizes[depth:], chunk.file, chunk.start, chunk.archive_bytes)
                )
            whole = tensor.shape[depth:]
            for part in self.parts[key]:
                shape = (part.rows, *whole[1:]) if whole else ()
                out.append(StoredTensor(part.name, tensor.dtype, shape, tuple(found[part.name])))
        return out


def place(drafts: Iterable[Draft], common: Mapping[str, object], *, swiglu: bool) -> Placement:
    """Lay out a checkpoint whose gated MLPs are `swiglu`; `common` holds the objects Megatron-LM looks for.

    UnsupportedError for layers that the format is not known to hold.
    """
    cut, parts = [], {}
    drafts = list(drafts)
    shapes = {draft.name: draft.shape for draft in drafts}
    for draft in drafts:
        halves = swiglu and is_fused_glu(draft.name) and is_gated(draft.name, shapes)
        parts[draft.name] = parts_of(draft.name, draft.shape, halves=halves)
        cut.append(_cut(draft, parts[draft.name]))
    payloads = {name: object_archive(common[name]) for name in _OBJECTS if name in common}
    placed = torch_dist.place(cut, payloads, {draft.name: parse_key(draft.name).depth for draft in cut})
    return Placement(placed.tensors, placed.objects, placed.file_sizes, placed.payloads, parts)


def _cut(draft: Draft, parts: tuple[Part, ...]) -> Draft:
    """`draft` with boxes that each lie within one part."""
    depth = len(parts[0].index)
    edges = sorted({part.row for part in parts})
    if len(edges) == 1:
        return draft
    boxes = []
    for rank, offsets, sizes in draft.boxes:
        row, end = offsets[depth], offsets[depth] + sizes[depth]
        for low, high in zip(edges, [*edges[1:], draft.shape[depth]], strict=True):
            first, last = max(row, low), min(end, high)
            if first < last:
                at = (*offsets[:depth], first, *offsets[depth + 1 :])
                boxes.append((rank, at, (*sizes[:depth], last - first, *sizes[depth + 1 :])))
    return Draft(draft.name, draft.dtype, draft.shape, tuple(boxes))
