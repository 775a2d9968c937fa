"""Megatron-FSDP's `fsdp_dtensor` checkpoints as folders: plain torch DCP, without `common.pt` and `metadata.json`.

    ckpt/iter_0000000/{__R_N.distcp, .metadata, hf/}

`args`, `checkpoint_version` and `iteration` are objects among the tensors. Whatever grid of shards a writer's mesh
made is read; a target's shards follow the layout as in torch_dist. Any mesh can load either.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from converters.engine.plan import Draft
from converters.errors import StorageError
from converters.mcore.cuts import is_gated
from converters.mcore.fsdp_dtensor import Part, is_fused_glu, is_weight, parse_stored, parts_of
from converters.mcore.keys import parse_key
from converters.mcore.megatron_args import config_of_args
from converters.mcore.releases import Release
from converters.rows.expr import Value
from converters.tensors import Chunk, Shape, StoredTensor
from mbx.formats import torch_dist
from mbx.formats.checkpoint import Checkpoint, Spelling
from mbx.formats.gathering import gather
from mbx.formats.placement import Order, Placement
from mbx.formats.sidecars import hf_folder, read_run_config, read_stored
from mbx.torchfile.archive import object_archive
from mbx.torchfile.dcp import DcpCheckpoint, build_dcp_metadata, read_dcp, read_index
from mbx.torchfile.torch_values import Namespace
from mbx.untrusted.values import check_bounded

#: Entries of Megatron-LM's state_dict that are objects of the checkpoint.
_OBJECTS = ("args", "checkpoint_version", "iteration", "num_floating_point_operations_so_far")


class FsdpDtensor:
    """The format of Megatron-FSDP's checkpoints."""

    name = title = "fsdp_dtensor"
    spelling: Spelling = "mcore"

    def find(self, path: Path) -> Path | None:
        """The iteration's folder meant by `path`: DCP of a model's `state_dict`, and no `metadata.json` beside it."""
        home = torch_dist.find_iteration(path)
        if home is None or (home / "metadata.json").is_file() or not (home / ".metadata").is_file():
            return None
        try:
            names = read_index(home).state_dict_metadata
        except StorageError:  # a damaged index: whose it was cannot be told
            return None
        return home if any(map(is_weight, names)) else None

    def open(self, path: Path, home: Path) -> Checkpoint:
        """Open an iteration; nothing but headers is read."""
        return open_fsdp_dtensor(home, path)

    def place(self, order: Order) -> Placement:
        """Lay out `__R_N.distcp` files whose index names layers and halves apart."""
        assert order.sidecars is not None
        swiglu = is_swiglu(order.plan.config, order.sidecars.args)
        return place(order.plan.drafts, order.sidecars.common, swiglu=swiglu, release=order.release)


def is_swiglu(config: Mapping[str, Value], args: Mapping[str, object]) -> bool:
    """Whether gated MLPs are SwiGLU, by the config or else by Megatron-LM's args; True where neither says."""
    if "gated_linear_unit" in config:
        return bool(config["gated_linear_unit"]) and config.get("activation_func") == "silu"
    return bool(args.get("swiglu", True))


def open_fsdp_dtensor(iteration: Path, path: Path | None = None) -> Checkpoint:
    """Open an iteration's folder; tensors come under torch_dist keys, stacked as torch_dist would.

    `path` is what was named. StorageError for a checkpoint that is not whole: layers, experts or halves missing.
    """
    dcp = read_dcp(iteration)
    common = _objects(iteration, dcp)
    args = common.pop("args", None)
    weights = {name: tensor for name, tensor in dcp.tensors.items() if is_weight(name)}
    tensors = gather(weights, parse_stored, config_of_args(args) if isinstance(args, dict) else {})
    left_out, other_state = [], {}
    if state := [tensor for name, tensor in dcp.tensors.items() if name.startswith("optimizer.")]:
        size = sum(t.nbytes for t in state)
        left_out.append(f"optimizer state: {len(state)} tensors, {size} bytes")
        other_state["optimizer state"] = (len(state), size)
    if any(name.startswith(("rng_state", "rerun_state")) for name in (*dcp.objects, *dcp.tensors)):
        left_out.append("random-number state")
        other_state["random-number state"] = (0, 0)
    return Checkpoint(
        path or iteration,
        "fsdp_dtensor",
        "mcore",
        iteration,
        tensors,
        writer="Megatron-LM",
        root=iteration.parent,
        hf=hf_folder(iteration),
        args=args if isinstance(args, dict) else None,
        common=common,
        run_config=read_run_config(iteration),
        left_out=tuple(left_out),
        other_state=other_state,
    )


def _objects(iteration: Path, dcp: DcpCheckpoint) -> dict[str, object]:
    out: dict[str, object] = {}
    for name in _OBJECTS:
        if name in dcp.objects:
            value = read_stored(iteration, dcp.objects[name])
            out[name] = value.values if isinstance(value, Namespace) else value
    check_bounded(out, f"`{iteration}`: its objects")
    return out


@dataclass(frozen=True, slots=True)
class PartsPlacement(torch_dist.ArchivePlacement):
    """Target tensors under torch_dist keys; `parts` say under which names their regions are stored."""

    parts: Mapping[str, tuple[Part, ...]]

    @property
    def late_names(self) -> tuple[str, ...]:
        """What names the tensors."""
        return (".metadata",)

    def late(self, common: Mapping[str, object]) -> dict[str, bytes]:
        """`.metadata`; what would be common state lies among the tensors."""
        return {".metadata": build_dcp_metadata(self.stored(), self.objects)}

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


def place(drafts: Iterable[Draft], common: Mapping[str, object], *, swiglu: bool, release: Release) -> PartsPlacement:
    """Lay out a checkpoint whose gated MLPs are `swiglu`; `common` holds the objects Megatron-LM looks for.

    UnsupportedError for layers that the format is not known to hold.
    """
    cut, parts = [], {}
    drafts = list(drafts)
    shapes = {draft.name: draft.shape for draft in drafts}
    for draft in drafts:
        halves = swiglu and is_fused_glu(draft.name) and is_gated(draft.name, shapes)
        parts[draft.name] = parts_of(draft.name, draft.shape, halves=halves, release=release)
        cut.append(_cut(draft, parts[draft.name]))
    payloads = {name: object_archive(common[name]) for name in _OBJECTS if name in common}
    placed = torch_dist.place(cut, payloads, {draft.name: parse_key(draft.name).depth for draft in cut})
    return PartsPlacement(placed.tensors, placed.file_sizes, placed.objects, placed.payloads, parts)


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
