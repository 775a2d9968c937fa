"""Megatron-LM's `torch` checkpoints, read without loading them: whole tensors whose chunks lie in each rank's file.

    iter_0000100/mp_rank_00/model_optim_rng.pt            tp 1
    iter_0000100/mp_rank_01_003_002/model_optim_rng.pt    tensor rank 1, pipeline rank 3, expert rank 2

A file is one torch.save archive with `args` (an argparse Namespace), `model` (or `model0`, `model1`, … one per
model chunk) and optimizer state. Source: `get_checkpoint_name` and `save_checkpoint` of
megatron/training/checkpointing.py, and files of Megatron-LM with megatron-core 0.16.1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from converters.errors import StorageError, UnsupportedError
from converters.mcore.cuts import cuts_of
from converters.mcore.keys import EMBEDDING, HEAD, TIED, canonical_names
from converters.mcore.local import LocalName, atom_sizes, parse_local
from converters.mcore.megatron_args import config_of_args, layout_of_args
from converters.mcore.releases import written_by
from converters.mcore.torch_dist import layers_alike, stacks_layers
from converters.rows.expr import Value
from converters.tensors import StoredTensor
from mbx.formats.bin_weights import whole_stub
from mbx.formats.checkpoint import Checkpoint
from mbx.formats.legacy.assembly import Assembly, Shard
from mbx.formats.legacy.copies import Copies, Copy
from mbx.formats.sidecars import hf_folder
from mbx.torchfile.archive import load_archive
from mbx.torchfile.torch_values import Namespace
from mbx.untrusted.values import check_bounded

WEIGHTS = "model_optim_rng.pt"
_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_MODEL = re.compile(r"model(\d*)")


@dataclass(frozen=True, slots=True)
class RankFile:
    """One rank's archive: its tensor, pipeline and expert rank, and the tensors of each model chunk by local name."""

    file: str
    tp: int
    pp: int
    ep: int
    chunks: tuple[Mapping[str, Shard], ...]
    top: Mapping[str, object]

    @property
    def rank(self) -> str:
        """The rank in words."""
        return f"tensor rank {self.tp}, pipeline rank {self.pp}, expert rank {self.ep}"


def open_legacy(iteration: Path, path: Path | None = None) -> Checkpoint:
    """Open an iteration folder with `mp_rank_*` folders; pickles are read, no tensor is. `path` is what was named.

    Raises StorageError for files that are missing, damaged or disagree, and UnsupportedError for models that
    mbx does not know how to put together.
    """
    first = _read_first(iteration)
    args = _args_of(first, iteration)
    layout = layout_of_args(args)
    config = config_of_args(args)
    files = _read_all(iteration, layout.pp > 1)
    found = {(f.tp, f.pp) for f in files}
    if missing := [(t, p) for t in range(layout.tp) for p in range(layout.pp) if (t, p) not in found]:
        raise StorageError(
            f"`{iteration}` lacks the file of tensor rank {missing[0][0]}, pipeline rank {missing[0][1]}: "
            f"its args say ‹tp› {layout.tp} ‹pp› {layout.pp}"
        )
    if lacking := set(range(layout.ep)) - {f.ep for f in files}:
        raise StorageError(f"`{iteration}` lacks expert rank {min(lacking)}: its args say ‹ep› {layout.ep}")
    if extra := [f.file for f in files if f.tp >= layout.tp or f.pp >= layout.pp or f.ep >= layout.ep]:
        raise StorageError(
            f"`{iteration / extra[0]}` is of a rank that the args (tp {layout.tp}, pp {layout.pp}) have not"
        )
    whole = _Reader(iteration, files, config, layout.tp, layout.ep, layout.expert_tp).tensors()
    left_out = _left_out(iteration, first)
    return Checkpoint(
        path or iteration,
        "torch",
        "mcore",
        iteration,
        whole,
        writer="Megatron-LM",
        core=written_by(names=(name for file in files for chunk in file.chunks for name in chunk)),
        root=iteration.parent,
        hf=hf_folder(iteration),
        args=args,
        common={k: value for k, value in first.items() if isinstance(value, int | float) and not _MODEL.fullmatch(k)},
        layout=layout,
        left_out=left_out,
        other_state=dict.fromkeys(left_out, (0, 0)),
    )


def _left_out(iteration: Path, top: Mapping[str, object]) -> tuple[str, ...]:
    out = []
    if top.get("optimizer") or any(iteration.glob("mp_rank_*/distrib_optim.pt")):
        out.append("optimizer state")
    if top.get("opt_param_scheduler"):
        out.append("learning-rate schedule")
    if top.get("rng_state"):
        out.append("random-number state")
    return tuple(out)


def _folders(iteration: Path) -> list[Path]:
    folders = sorted(p for p in iteration.iterdir() if _FOLDER.fullmatch(p.name))
    if not folders:
        raise StorageError(f"`{iteration}` holds no mp_rank_* folder")
    for folder in folders:
        if not (folder / WEIGHTS).is_file():
            raise StorageError(f"`{folder}` has no `{WEIGHTS}`: the checkpoint was not finished")
    return folders


def _load(path: Path) -> tuple[dict[str, object], dict[str, tuple[int, int]]]:
    loaded, storages = load_archive(path, unknown="opaque")
    if not isinstance(loaded, dict):
        raise StorageError(f"`{path}` holds a {type(loaded).__name__}; a dict was expected")
    top = {str(key): value for key, value in loaded.items()}
    if isinstance(args := top.get("args"), Namespace):
        check_bounded(args.values, f"`{path}`: its args")
    return top, storages


def _read_first(iteration: Path) -> dict[str, object]:
    return _load(_folders(iteration)[0] / WEIGHTS)[0]


def _args_of(top: Mapping[str, object], iteration: Path) -> dict[str, object]:
    args = top.get("args")
    if not isinstance(args, Namespace):
        raise StorageError(
            f"`{iteration}` carries no `args`, which say how its files are cut",
            hint="the file was not written by Megatron-LM's own save_checkpoint",
        )
    return args.values


def _read_all(iteration: Path, pipelined: bool) -> list[RankFile]:
    files = []
    for folder in _folders(iteration):
        match = _FOLDER.fullmatch(folder.name)
        assert match is not None
        tp, second, third = int(match[1]), match[2], match[3]
        pp = int(second) if second is not None and (pipelined or third is not None) else 0
        ep = int(third) if third is not None else int(second) if second is not None and not pipelined else 0
        path = folder / WEIGHTS
        top, storages = _load(path)
        names = sorted((m for m in map(_MODEL.fullmatch, top) if m), key=lambda m: int(m[1] or 0))
        if not names:
            raise StorageError(f"`{path}` holds no `model`")
        chunks = tuple(_shards(path, folder.name, top[m[0]], storages) for m in names)
        files.append(RankFile(f"{folder.name}/{WEIGHTS}", tp, pp, ep, chunks, top))
    return files


def _shards(path: Path, folder: str, model: object, storages: Mapping[str, tuple[int, int]]) -> dict[str, Shard]:
    """Tensors of one model chunk by name, with the file's bytes that hold each."""
    if not isinstance(model, dict):
        raise StorageError(f"`{path}`: `model` is a {type(model).__name__}; a state_dict was expected")
    out = {}
    for name, value in model.items():
        if str(name).endswith("_extra_state") or value is None:
            continue
        if isinstance(value, dict):
            raise UnsupportedError(
                f"`{path}`: `{name}` is a dict of its own: this is a model from before Megatron Core",
                hint="convert it with the Megatron-LM release that wrote it",
            )
        stub = whole_stub(path, name, value)
        start, inside = storages[stub.storage][0], stub.storage_offset * stub.itemsize
        out[str(name).removeprefix("module.")] = Shard(
            f"{folder}/{WEIGHTS}", start + inside, stub.dtype, stub.shape, stub.storage, inside
        )
    return out


class _Reader:
    """Puts the shards of all ranks together under canonical keys, one key per layer, then stacks the layers."""

    def __init__(
        self, iteration: Path, files: list[RankFile], config: Mapping[str, Value], tp: int, ep: int, etp: int
    ) -> None:
        self.iteration, self.files, self.config = iteration, files, config
        self.tp, self.ep, self.etp = tp, ep, etp
        #: (canonical key of one layer, expert or None) → shards by (tensor rank, expert rank)
        self.found: dict[tuple[str, int | None], dict[tuple[int, int], Shard]] = {}
        #: the same keys → every rank's copy, with its tensor rank; later pipeline stages' included
        self.copies: dict[tuple[str, int | None], list[tuple[int, Copy]]] = {}
        self.tied = bool(config.get(TIED))

    def tensors(self) -> dict[str, StoredTensor]:
        """Every weight of the model, whole."""
        self._collect()
        names = canonical_names({key for key, _ in self.found})
        self.found = {(names[key], expert): shards for (key, expert), shards in self.found.items()}
        shapes = {
            key: (1, *shards[min(shards)].shape) if expert is not None else shards[min(shards)].shape
            for (key, expert), shards in self.found.items()
        }
        cuts = cuts_of(shapes, cut=self.tp > 1 or self.etp > 1)
        self._check_copies({key: cuts[names[key]].dim is not None for key, _ in self.copies})
        stacked = stacks_layers(self._family(), self.config) and layers_alike(shapes)
        assembly = Assembly(stacked, self.num_layers)
        for (key, expert), shards in self.found.items():
            assembly.add(
                key, expert, self._ranked(key, expert, shards), cuts[key], atom_sizes(_param(key), self.config)
            )
        return assembly.tensors()

    def _family(self) -> str:
        return "hybrid" if self.config.get("model.mcore_model") == "hybrid" else "gpt"

    def _collect(self) -> None:
        """Number layers and experts globally: model chunks follow one another by chunk, then pipeline rank."""
        depth = max(len(f.chunks) for f in self.files)
        offset = 0
        for chunk in range(depth):
            for pp in sorted({f.pp for f in self.files}):
                here = [f for f in self.files if f.pp == pp]
                parsed = [(f, {name: parse_local(name) for name in f.chunks[chunk]}) for f in here]
                counts = {_num_layers(names) for _, names in parsed}
                if len(counts) > 1:
                    raise StorageError(f"`{self.iteration}`: ranks of pipeline rank {pp} hold {sorted(counts)} layers")
                for file, names in parsed:
                    local_experts = 1 + max((n.expert for n in names.values() if n.expert is not None), default=-1)
                    for name, local in names.items():
                        self._note(file, file.chunks[chunk][name], local, offset, local_experts)
                offset += counts.pop()
        self.num_layers = offset
        stated = self.config.get("num_layers")
        if isinstance(stated, int) and stated != offset:
            raise StorageError(f"`{self.iteration}` holds {offset} layers; its args say num_layers = {stated}")

    def _note(self, file: RankFile, shard: Shard, local: LocalName, offset: int, local_experts: int) -> None:
        key = local.param
        if local.param == HEAD and self.tied:
            key = EMBEDDING  # the last pipeline stage's own copy of it
        if local.layer is not None:
            key = f"{local.site}.layers.{local.layer + (offset if local.site == 'decoder' else 0)}.{local.param}"
        expert = None if local.expert is None else file.ep * local_experts + local.expert
        ranks = self.found.setdefault((key, expert), {})
        # Later pipeline stages repeat the embedding for multi-token prediction; the first one counts.
        ranks.setdefault((file.tp, file.ep), shard)
        what = local.param if expert is None else f"{key}, expert {expert}"
        self.copies.setdefault((key, expert), []).append(
            (file.tp, Copy(key if key != EMBEDDING else what, file.rank, shard))
        )

    def _check_copies(self, cut: Mapping[str, bool]) -> None:
        """Compare what several ranks hold alike; `cut` says of a key whether tensor parallelism cuts it."""
        compare = Copies(self.iteration)
        try:
            for (key, expert), copies in self.copies.items():
                size = (self.tp if expert is None else self.etp) if cut[key] else 1
                for part in range(size):
                    if len(alike := [copy for tp, copy in copies if tp % size == part]) > 1:
                        compare.check(alike)
        finally:
            compare.close()

    def _ranked(self, key: str, expert: int | None, shards: Mapping[tuple[int, int], Shard]) -> list[Shard]:
        """One shard per tensor-parallel rank of the parameter, in order."""
        size = self.tp if expert is None else self.etp
        out = []
        for rank in range(size):
            match = [
                shard for (tp, _), shard in sorted(shards.items()) if (tp if expert is None else tp % size) == rank
            ]
            if not match:
                what = f"expert {expert} of `{key}`" if expert is not None else f"`{key}`"
                raise StorageError(
                    f"`{self.iteration}` lacks tensor-parallel shard {rank} of {what}",
                    hint="legacy checkpoints lose experts where expert tensor parallelism exceeds the model's"
                    if expert is not None
                    else None,
                )
            out.append(match[0])
        if len({(shard.dtype, shard.shape) for shard in out}) > 1:
            raise StorageError(f"`{self.iteration}`: the ranks' shards of `{key}` differ in shape or dtype")
        return out


def _param(key: str) -> str:
    match = re.match(r"(?:decoder|mtp)\.layers\.\d+\.(.*)$", key)
    return key if match is None else match[1]


def _num_layers(names: Mapping[str, LocalName]) -> int:
    return 1 + max((n.layer for n in names.values() if n.site == "decoder" and n.layer is not None), default=-1)
