"""Checkpoints of a run: torch_dist through Megatron Core, with the optimizer and the loop's own state.

RUN/latest_checkpointed_iteration.txt     written last: what it names is whole
RUN/iter_0000010/{.metadata, common.pt, …, mbx_train.json, hf/}

With `run.save_async` a forked process writes a copy of the state as it was, and the tracker moves at the end of the
first step at which every rank's writer is done (Megatron Core's own queue of such writers).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from converters.adapters.peft_keys import live_spelling
from converters.errors import StorageError
from converters.mcore.releases import CURRENT
from mbx.formats import hf, torch_dist
from mbx.formats.registry import open_megatron
from mbx.installed import core_release
from mbx.models.stored import read_whole
from mbx.torchfile.dcp import read_index
from mbx.train.checkpoints.best import read_best
from mbx.train.checkpoints.optimizer import BY_PARAMETER, allocate, restore, stored, wanted
from mbx.train.checkpoints.random_streams import random_streams, restore_random
from mbx.train.checkpoints.state import RECIPE, STATE, LoopState, finished, latest
from mbx.train.data.templates import TEMPLATE_FILE, named_template
from mbx.train.lora.attach import only_trained
from mbx.train.model.blueprint import Blueprint
from mbx.train.model.build import unwrap
from mbx.train.model.parallel import Ranks
from mbx.train.model.sight import PART, tower_folder
from mbx.train.model.trained_whole import whole_layers
from mbx.train.model.weights import left_out
from mbx.train.recipe.sections import Recipe
from mbx.untrusted.names import writable

if TYPE_CHECKING:
    from mbx.models.megatron.core.sharding import AsyncCallsQueue
    from mbx.models.megatron.core.training import DistributedDataParallel, MegatronOptimizer

#: What a run writes into the folder of a checkpoint, torch's draft of the index included.
_OURS = re.compile(rf"\.metadata(?:\.tmp)?|metadata\.json|common\.pt|__\d+_\d+\.distcp|hf|{STATE}|{RECIPE}")


class Store:
    """Writes and reads the checkpoints of one run; all calls are collective.

    `on_save` is called on the main rank with each checkpoint that is whole.
    """

    def __init__(
        self, recipe: Recipe, plan: Blueprint, ranks: Ranks, on_save: Callable[[Path], object] | None = None
    ) -> None:
        self.recipe, self.plan, self.ranks, self.on_save = recipe, plan, ranks, on_save
        self.root = recipe.run_dir
        self.whole = whole_layers(recipe.lora, plan)
        # read now: its file may be gone when the run ends
        self.template = named_template(recipe.data.template) if recipe.data.template else ""
        self._writers: AsyncCallsQueue | None = None
        self._tower: dict[str, torch.Tensor] = {}
        self._target = self.root  # what the writers write

    def save(self, state: LoopState, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> Path:
        """Write `iter_{step}`; the tracker moves only when all of it is on the disk. Older ones beyond `keep` go.

        With `run.save_async` it returns while a process of each rank writes; `settle` finishes what is written.
        """
        from torch.distributed.checkpoint.api import CheckpointException

        from mbx.models.megatron.core.sharding import dist_checkpointing

        self.settle(wait=True)  # one at a time: the tracker must not go back
        self._target = target = writable(self.root, f"iter_{state.step:07d}")
        if self.ranks.is_main:
            if target.exists():  # an unfinished one: the tracker does not name it
                if not _is_ours(target):
                    raise StorageError(f"`{target}` is in the way: it holds more than a checkpoint of `mbx train`")
                shutil.rmtree(target)
            target.mkdir(parents=True)
        torch.distributed.barrier()
        if self.recipe.train.tower == "trained" and self.ranks.is_main:
            self._tower = {name: tensor.detach().cpu().clone() for name, tensor in _tower_of(chunks).items()}
        content = self._content(chunks, optimizer) | CURRENT.common_state(state.step)
        beside = self.recipe.run.save_async
        try:  # torch's CheckpointException derives from BaseException, so it is named
            how = {"async_sharded_save": True, **core_release().async_save} if beside else {}
            request = dist_checkpointing.save(content, str(target), ("torch_dist", 1), **how)
            if request is None:
                torch.distributed.barrier()
                self._finish(target, state)
                torch.distributed.barrier()
                return target
        except (CheckpointException, OSError) as error:
            raise self._unwritten(error) from error
        request.add_finalize_fn(lambda: self._finish(target, state))
        if self._writers is None:
            from mbx.models.megatron.core.sharding import AsyncCallsQueue

            self._writers = AsyncCallsQueue()
        self._writers.schedule_async_request(request)
        return target

    def settle(self, *, wait: bool) -> None:
        """Finish a checkpoint whose writers are done on all ranks; `wait` until they are. Collective."""
        from torch.distributed.checkpoint.api import CheckpointException

        if self._writers is None:
            return
        try:
            self._writers.maybe_finalize_async_calls(blocking=wait)
        except (CheckpointException, OSError) as error:
            raise self._unwritten(error) from error

    def _unwritten(self, error: BaseException) -> StorageError:
        """What to say of a checkpoint that could not be written; the part of it that was goes."""
        if self.ranks.is_main:
            shutil.rmtree(self._target, ignore_errors=True)
        last = latest(self.root)
        hint = f"‹resume› continues from {last.name}" if last else "the run has no earlier checkpoint"
        return StorageError(f"`{self._target}` could not be written: {_said(error)}", hint=hint)

    def _finish(self, target: Path, state: LoopState) -> None:
        """Complete a written checkpoint and point the tracker at it; the main rank's work."""
        if not self.ranks.is_main:
            return
        (target / RECIPE).write_text(json.dumps(self.recipe.to_dict(), indent=1), encoding="utf-8")
        if self.plan.hf is not None:
            (target / "hf").mkdir()
            for name in hf.side_files(self.plan.hf):
                (target / "hf" / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(self.plan.hf / name, target / "hf" / name)
            if self.template:  # what was trained is served by the template that it was trained with
                (target / "hf" / TEMPLATE_FILE).write_text(self.template, encoding="utf-8")
            if hf.has_weights(self.plan.hf):  # a random start needs none
                layout = hf.record_layout(hf.open_hf(self.plan.hf))
                (target / "hf" / hf.LAYOUT).write_text(layout, encoding="utf-8")
                self._keep_towers(target / "hf" / hf.KEPT, state.base)
        for path in target.rglob("*"):
            _sync(path)
        # behind all of it: a checkpoint that has a state is whole, whether the tracker names it yet or not
        (target / STATE).write_text(json.dumps(asdict(state)), encoding="utf-8")
        _sync(target / STATE)
        _sync(target)
        tracker = self.root / torch_dist.TRACKER
        draft = writable(self.root, f"{tracker.stem}.tmp")
        draft.write_text(str(state.step), encoding="utf-8")
        _sync(draft)
        draft.replace(tracker)
        _sync(self.root)
        keep, whole = self.recipe.run.keep, finished(self.root)
        best = self.root / f"iter_{read_best(self.root).step:07d}"
        stays = {target, best, *(whole[-keep:] if keep else whole)}
        for old in self.root.glob("iter_*"):
            if old not in stays and _is_ours(old):  # beyond `keep`, or left unfinished by a run that was killed
                shutil.rmtree(old)
        if self.on_save is not None:
            self.on_save(target)

    def _keep_towers(self, file: Path, base: str) -> None:
        """Write what lies beside the text model, as it is in the folder that the weights came from or, of a tower that
        is trained, in the model, and prediction layers that were left out: an export is whole again."""
        from safetensors.torch import save_file

        table = self.plan.table
        if self.plan.hf is None or table is None or not table.beside or self.recipe.lora.rank:
            return
        folder = hf.open_hf(tower_folder(self.plan.hf, base))
        source = folder.source
        try:
            tower = [name for name in folder.tensors if name.startswith(table.beside)]
            ahead = left_out(self.plan, folder.tensors)
            if self._tower:
                live = live_spelling(table, folder.tensors)
                tensors = {name: self._tower[live.said(name)].contiguous() for name in tower}
                save_file(tensors | {name: read_whole(folder.tensors[name], source) for name in ahead}, file)
            else:
                with file.open("wb") as out:
                    out.writelines(hf.pack_kept([folder.tensors[name] for name in (*tower, *ahead)], source))
        finally:
            source.close()

    def load(
        self, path: Path, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, *, same: bool
    ) -> None:
        """Fill the model, the optimizer and the random streams from `path`; nothing that it names is run.

        Weights and state are read into whatever layout this run has. Random streams are a process's own, so they
        continue only under the `same` processes and layout.
        StorageError where it is damaged, or holds what no run of mbx writes.
        """
        from pickle import UnpicklingError

        from torch.distributed.checkpoint.api import CheckpointException

        from mbx.models.inert_load import inert_loading
        from mbx.models.megatron.core.sharding import CheckpointingException, dist_checkpointing

        if not open_megatron(path).common:
            raise StorageError(f"`{path}` cannot be resumed: it has no common state (common.pt)")
        streams = same and has_object(path, "rng_state")
        content = self._weights(chunks, trained=bool(self.recipe.lora.rank))
        with inert_loading(path):
            try:
                loaded = dist_checkpointing.load(content | (self._random() if streams else {}), str(path))
                # an adapter run's checkpoint holds adapters only; the base was read from its own storage
                for name, chunk in _named(chunks):
                    unwrap(chunk).load_state_dict(loaded[name], strict=not self.recipe.lora.rank)
                if self.recipe.run.save_optimizer:
                    self._load_optimizer(path, chunks, optimizer)
            except (CheckpointException, CheckpointingException, UnpicklingError, OSError, KeyError) as error:
                raise StorageError(f"`{path}` cannot be resumed: {_said(error)}") from error
        if streams:
            restore_random(loaded["rng"])
        if not self.recipe.run.save_optimizer:
            optimizer.reload_model_params()
        torch.distributed.barrier()

    def _load_optimizer(
        self, path: Path, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer
    ) -> None:
        from mbx.models.megatron.core.sharding import dist_checkpointing

        common = (open_megatron(path).common or {}).get("optimizer")
        plain = common.get("optimizer") if isinstance(common, Mapping) else None
        if not isinstance(plain, Mapping) or not BY_PARAMETER.items() <= plain.items():
            raise StorageError(
                f"`{path}` cannot be resumed: its optimizer's state is not stored by parameter",
                hint="‹init-from› takes its weights into a new run",
            )
        allocate(optimizer)
        asked = wanted(optimizer, self._weights(chunks), half=self._half)
        # a rank asks for what it holds: together they may ask for a weight twice, or leave a copy out
        found = dist_checkpointing.load({"state": asked}, str(path), validate_access_integrity=False)
        restore(optimizer, found["state"], plain, half=self._half)

    @property
    def _half(self) -> bool:
        """Whether weights have fp32 copies in the optimizer."""
        return self.recipe.train.precision != "fp32"

    def _content(self, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> dict[str, object]:
        content = self._weights(chunks, trained=bool(self.recipe.lora.rank))
        if self.recipe.run.save_optimizer:
            content["optimizer"] = stored(optimizer, self._weights(chunks), half=self._half)
            content |= self._random()
        return content

    def _weights(self, chunks: Sequence[DistributedDataParallel], *, trained: bool = False) -> dict[str, object]:
        """The chunks' sharded state dicts, those of what a run of adapters trains where `trained`."""
        from mbx.models.megatron.weights import sharding_metadata

        weights: dict[str, dict[str, object]] = {
            name: unwrap(chunk).sharded_state_dict(metadata=sharding_metadata())  # type: ignore[operator]
            for name, chunk in _named(chunks)
        }
        return {name: only_trained(part, self.whole) if trained else part for name, part in weights.items()}

    def _random(self) -> dict[str, object]:
        from mbx.models.megatron.core.sharding import ShardedObject

        rank, world = self.ranks.rank, self.ranks.world_size
        return {"rng": ShardedObject("rng_state", random_streams(), (world,), (rank,), replica_id=0)}


def has_object(path: Path, name: str) -> bool:
    """Whether a checkpoint holds an object of this name, of any rank."""
    return any(key.startswith(f"{name}/") for key in read_index(path).state_dict_metadata)


def _tower_of(chunks: Sequence[DistributedDataParallel]) -> Mapping[str, torch.Tensor]:
    """The tensors of the tower that is a part of a model, by Transformers' names."""
    tower = unwrap(chunks[0]).get_submodule(PART)
    found: Mapping[str, torch.Tensor] = tower.tensors()  # type: ignore[operator]
    return found


def _is_ours(folder: Path) -> bool:
    """Whether a folder is named as a checkpoint is, and holds what a run writes into one, whole or in part."""
    if folder.is_symlink() or not folder.is_dir() or not re.fullmatch(r"iter_\d{7,}", folder.name):
        return False
    return all(_OURS.fullmatch(path.name) for path in folder.iterdir())


def _named(chunks: Sequence[DistributedDataParallel]) -> list[tuple[str, DistributedDataParallel]]:
    """Chunks under Megatron-LM's names: `model`, or `model0`, `model1`, … where the pipeline is interleaved."""
    return [("model" if len(chunks) == 1 else f"model{number}", chunk) for number, chunk in enumerate(chunks)]


def _said(error: BaseException) -> str:
    """What went wrong on the ranks, in a line: torch's CheckpointException and Megatron Core print tracebacks."""
    failures = getattr(error, "failures", None)
    causes = [cause for cause, _ in failures.values()] if isinstance(failures, Mapping) else [error]
    texts = [f"{type(cause).__name__}: {cause}".strip().partition("\n")[0][:300] for cause in causes]
    return "; ".join(dict.fromkeys(texts))


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
