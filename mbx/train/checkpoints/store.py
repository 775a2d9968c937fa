"""Checkpoints of a run: torch_dist through Megatron Core, with the optimizer and the loop's own state.

RUN/latest_checkpointed_iteration.txt     written last
RUN/iter_0000010/{.metadata, common.pt, …, mbx_train.json, hf/}
RUN/iter_0000010.1f0c2d…/                 being written by the start of that word; named as above when it is whole

With `run.save_async` a forked process writes a copy of the state as it was, and the tracker moves at the end of the
first step at which every rank's writer is done.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from converters.errors import DeviceError, MbxError, StorageError, UsageError
from converters.mcore.releases import CURRENT
from mbx.formats import torch_dist
from mbx.formats.files import os_failure
from mbx.formats.registry import open_megatron
from mbx.installed import core_release
from mbx.live.exchange import agreed, gather_objects
from mbx.text import human_bytes
from mbx.torchfile.dcp import read_index
from mbx.train.checkpoints.claim import Claim
from mbx.train.checkpoints.complete import complete, is_ours, tidy
from mbx.train.checkpoints.optimizer import BY_PARAMETER, allocate, restore, stored, wanted
from mbx.train.checkpoints.random_streams import random_streams, restore_random
from mbx.train.checkpoints.state import LoopState
from mbx.train.checkpoints.whole import write_whole
from mbx.train.data.templates import named_template
from mbx.train.distill.hidden import only_projections
from mbx.train.lora.attach import only_trained
from mbx.train.model.blueprint import Blueprint
from mbx.train.model.build import unwrap
from mbx.train.model.parallel import Ranks, on_any_rank
from mbx.train.model.sight import PART
from mbx.train.model.trained_whole import whole_layers
from mbx.train.recipe.sections import Recipe
from mbx.untrusted.names import writable

if TYPE_CHECKING:
    from mbx.models.megatron.core.saving import Saving
    from mbx.models.megatron.core.training import DistributedDataParallel, MegatronOptimizer


class Store:
    """Writes and reads the checkpoints of one run; all calls are collective.

    `on_save` is called on the main rank with each checkpoint that is whole, `say` with what went wrong beside it.
    `step` is that of the last whole one, -1 before there is any; `best` that of one that stays, whatever `run.keep`.
    """

    def __init__(
        self,
        recipe: Recipe,
        plan: Blueprint,
        ranks: Ranks,
        on_save: Callable[[Path], object] | None = None,
        say: Callable[[str], object] = lambda _: None,
    ) -> None:
        self.recipe, self.plan, self.ranks, self.on_save, self.say = recipe, plan, ranks, on_save, say
        self.root = recipe.run_dir
        self.whole = whole_layers(recipe.lora, plan)
        # read now: its file may be gone when the run ends
        self.template = named_template(recipe.data.template) if recipe.data.template else ""
        self.step = self.best = -1
        self._claim = Claim(self.root, main=ranks.is_main) if recipe.run.save else None
        self._under_way: tuple[Saving, LoopState] | None = None
        self._tower: dict[str, torch.Tensor] = {}

    @property
    def last(self) -> Path | None:
        """The last checkpoint that is whole."""
        return self.root / f"iter_{self.step:07d}" if self.step >= 0 else None

    @property
    def last_asked(self) -> int:
        """The step of the last checkpoint that is whole, or on its way to be."""
        return self._under_way[1].step if self._under_way else self.step

    def save(self, state: LoopState, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
        """Write `iter_{step}`; the tracker moves only when all of it is on the disk. Older ones beyond `keep` go.

        With `run.save_async` it returns while a process of each rank writes; `settle` finishes what is written.
        What one rank cannot write is a StorageError or a DeviceError on all, and nothing of the checkpoint stays.
        """
        from mbx.models.megatron.core.saving import Saving

        self.settle(wait=True)  # one at a time: the tracker must not go back
        draft, needed = self._draft(state), 0
        try:
            with agreed():
                self._make_way(draft)
            if self.recipe.train.tower == "trained" and self.ranks.is_main:
                self._tower = {name: tensor.detach().cpu().clone() for name, tensor in _tower_of(chunks).items()}
            content = self._content(chunks, optimizer) | CURRENT.common_state(state.step)
            with agreed():
                saving = Saving(content, str(draft), core_release().async_save)
                _raise_first(saving.failed)
            needed = sum(gather_objects(saving.nbytes))
            with agreed():
                self._check_room(needed)
            saving.write(beside=self.recipe.run.save_async)
        except MbxError as error:
            raise self._unwritten(draft, needed, error) from error
        self._under_way = saving, state
        if not self.recipe.run.save_async:
            self.settle(wait=True)

    def settle(self, *, wait: bool) -> None:
        """Finish a checkpoint whose writers are done on all ranks; `wait` until they are. Collective."""
        from torch.distributed.checkpoint.api import CheckpointException

        if self._under_way is None:
            return
        saving, state = self._under_way
        if not wait and on_any_rank(saving.writes, self.ranks.device):
            return
        self._under_way = None
        draft, needed = self._draft(state), sum(gather_objects(saving.nbytes))
        target = draft.with_suffix("")
        try:
            with agreed():
                try:
                    saving.finish()
                except CheckpointException as error:  # which derives from BaseException
                    _raise_first(saving.failed)
                    if said := _said(error):  # on the main rank, of all of them
                        raise StorageError(said) from error
                _raise_first(saving.failed)
            with agreed():
                if self._claim is not None:
                    self._claim.check()
                if self.ranks.is_main:
                    complete(draft, self.recipe, self.plan, self.template, state, self._tower, self.last)
                    if target.exists():  # of a start that ended before it moved the tracker
                        shutil.rmtree(target)
                    draft.rename(target)
                    write_whole(self.root, torch_dist.TRACKER, str(state.step))
        except MbxError as error:
            raise self._unwritten(draft, needed, error) from error
        self.step = state.step
        with agreed():
            if self.ranks.is_main:
                tidy(self.root, {state.step, self.best}, self.recipe.run.keep, self.say)
                if self.on_save is not None:
                    self.on_save(target)

    def _draft(self, state: LoopState) -> Path:
        """Where a checkpoint is written: no other start's writers, which may outlive it, write there."""
        word = self._claim.word if self._claim else "partial"
        return self.root / f"iter_{state.step:07d}.{word}"

    def _make_way(self, draft: Path) -> None:
        """Have an empty folder at `draft`; every rank looks whether it would write where the run is."""
        if self._claim is not None:
            self._claim.check()
        if not self.ranks.is_main:
            return
        target = writable(self.root, draft.stem)
        if target.exists() and not is_ours(target):
            raise StorageError(f"`{target}` is in the way: it holds more than a checkpoint of `mbx train`")
        if writable(self.root, draft.name).exists():
            shutil.rmtree(draft)
        draft.mkdir()

    def _check_room(self, needed: int) -> None:
        """DeviceError where `needed` bytes do not fit on the disk."""
        if self.ranks.is_main and shutil.disk_usage(self.root).free < needed:
            raise DeviceError(os.strerror(errno.ENOSPC))

    def _unwritten(self, draft: Path, needed: int, error: MbxError) -> MbxError:
        """What to say of a checkpoint that could not be written; the part of it that was goes."""
        if isinstance(error, UsageError):  # its folder is another's
            return error
        free = needed
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(self.root).free
        if self.ranks.is_main and (self._claim is None or self._claim.holds):
            shutil.rmtree(draft, ignore_errors=True)
        room, tip = "", error.hint
        if free < needed:
            room = f"; it takes {human_bytes(needed)}, and {human_bytes(free)} are free there"
            tip = "free space there; run.keep=1 keeps one checkpoint beside the one that is written"
        again = f"‹resume› continues from {self.last.name}" if self.last else "the run has no earlier checkpoint"
        kind = DeviceError if room or isinstance(error, DeviceError) else StorageError
        fact = f"`{draft.with_suffix('')}` could not be written: {error.fact}{room}"
        return kind(fact, hint=f"{tip}; {again}" if tip else again)

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
        content: dict[str, object] = {**self._weights(chunks, trained=bool(self.recipe.lora.rank))}
        if self.recipe.run.save_optimizer:
            content["optimizer"] = stored(optimizer, self._weights(chunks), half=self._half)
            content |= self._random()
        return content

    def _weights(
        self, chunks: Sequence[DistributedDataParallel], *, trained: bool = False
    ) -> dict[str, dict[str, object]]:
        """The chunks' sharded state dicts, those of what a run of adapters trains where `trained`."""
        from mbx.models.megatron.weights import sharding_metadata

        weights: dict[str, dict[str, object]] = {
            name: unwrap(chunk).sharded_state_dict(metadata=sharding_metadata())  # type: ignore[operator]
            for name, chunk in _named(chunks)
        }
        if not trained:
            return weights
        return {name: only_trained(part, self.whole) | only_projections(part) for name, part in weights.items()}

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


def _named(chunks: Sequence[DistributedDataParallel]) -> list[tuple[str, DistributedDataParallel]]:
    """Chunks under Megatron-LM's names: `model`, or `model0`, `model1`, … where the pipeline is interleaved."""
    return [("model" if len(chunks) == 1 else f"model{number}", chunk) for number, chunk in enumerate(chunks)]


def _said(error: BaseException) -> str:
    """What went wrong on the ranks, in a line: torch's CheckpointException and Megatron Core print tracebacks."""
    failures = getattr(error, "failures", None)
    causes = [cause for cause, _ in failures.values()] if isinstance(failures, Mapping) else [error]
    texts = [f"{type(cause).__name__}: {cause}".strip().partition("\n")[0][:300] for cause in causes]
    return "; ".join(dict.fromkeys(texts))


def _raise_first(failed: Sequence[Exception]) -> None:
    """Raise the first of these in the house's words."""
    for error in failed:
        if isinstance(error, OSError):
            where = f"`{os.fsdecode(error.filename)}`" if error.filename else type(error).__name__
            raise os_failure(error, where) from error
        raise StorageError(_said(error)) from error
