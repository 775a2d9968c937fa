"""Checkpoints of a run: torch_dist through Megatron Core, with the optimizer and the loop's own state.

RUN/latest_checkpointed_iteration.txt     written last: what it names is whole
RUN/iter_0000010/{.metadata, common.pt, …, mbx_train.json, hf/}

With `run.save_async` a forked process writes a copy of the state as it was, and the tracker moves at the end of the
first step at which every rank's writer is done (Megatron Core's own queue of such writers).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from converters.errors import StorageError
from converters.mcore.releases import CURRENT
from mbx.formats import hf, torch_dist
from mbx.formats.registry import open_megatron
from mbx.train.checkpoints.restore import allocate, count_steps, random_streams, restore_random
from mbx.train.checkpoints.state import RECIPE, STATE, LoopState, finished, latest
from mbx.train.lora.attach import only_adapters
from mbx.train.model.blueprint import Blueprint
from mbx.train.model.build import unwrap
from mbx.train.model.parallel import Ranks
from mbx.train.recipe.sections import Recipe

if TYPE_CHECKING:
    from mbx.models.megatron.core.sharding import AsyncCallsQueue
    from mbx.models.megatron.core.training import DistributedDataParallel, MegatronOptimizer


class Store:
    """Writes and reads the checkpoints of one run; all calls are collective."""

    def __init__(self, recipe: Recipe, plan: Blueprint, ranks: Ranks) -> None:
        self.recipe, self.plan, self.ranks = recipe, plan, ranks
        self.root = recipe.run_dir
        self._writers: AsyncCallsQueue | None = None
        self._target = self.root  # what the writers write

    def save(self, state: LoopState, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> Path:
        """Write `iter_{step}`; the tracker moves only when all of it is on the disk. Older ones beyond `keep` go.

        With `run.save_async` it returns while a process of each rank writes; `settle` finishes what is written.
        """
        from torch.distributed.checkpoint.api import CheckpointException

        from mbx.models.megatron.core.sharding import dist_checkpointing

        self.settle(wait=True)  # one at a time: the tracker must not go back
        self._target = target = self.root / f"iter_{state.step:07d}"
        if self.ranks.is_main:
            shutil.rmtree(target, ignore_errors=True)  # an unfinished one: the tracker does not name it
            target.mkdir(parents=True)
        torch.distributed.barrier()
        content = self._content(chunks, optimizer, loading=False)
        content |= {
            "checkpoint_version": CURRENT.checkpoint_version,
            "iteration": state.step,
            "content_metadata": dict(CURRENT.content_metadata),
        }
        beside = self.recipe.run.save_async
        try:  # torch's CheckpointException derives from BaseException, so it is named
            request = dist_checkpointing.save(content, str(target), ("torch_dist", 1), async_sharded_save=beside)
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
        (target / STATE).write_text(json.dumps(asdict(state)), encoding="utf-8")
        (target / RECIPE).write_text(json.dumps(self.recipe.to_dict(), indent=1), encoding="utf-8")
        if self.plan.hf is not None:
            (target / "hf").mkdir()
            for name in hf.side_files(self.plan.hf):
                shutil.copyfile(self.plan.hf / name, target / "hf" / name)
            if hf.has_weights(self.plan.hf):  # a random start needs none
                layout = hf.record_layout(hf.open_hf(self.plan.hf))
                (target / "hf" / hf.LAYOUT).write_text(layout, encoding="utf-8")
        for path in [*target.rglob("*"), target]:
            _sync(path)
        tracker = self.root / torch_dist.TRACKER
        draft = tracker.with_suffix(".tmp")
        draft.unlink(missing_ok=True)  # it may be a link, in a folder that came from elsewhere
        draft.write_text(str(state.step), encoding="utf-8")
        _sync(draft)
        draft.replace(tracker)
        _sync(self.root)
        keep, whole = self.recipe.run.keep, finished(self.root)
        stays = {target, *(whole[-keep:] if keep else whole)}
        for old in self.root.glob("iter_*"):
            if old.is_dir() and old not in stays:  # beyond `keep`, or left unfinished by a run that was killed
                shutil.rmtree(old)

    def load(self, path: Path, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
        """Fill the model, the optimizer and the random streams from `path`; nothing that it names is run.

        StorageError where it is damaged, or holds what no run of mbx writes.
        """
        from pickle import UnpicklingError

        from torch.distributed.checkpoint.api import CheckpointException

        from mbx.models.inert_load import inert_loading
        from mbx.models.megatron.core.sharding import CheckpointingException, dist_checkpointing

        if not open_megatron(path).common:
            raise StorageError(f"`{path}` cannot be resumed: it has no `common.pt`")
        allocate(optimizer)
        content = self._content(chunks, optimizer, loading=True)
        with inert_loading(path):
            try:
                loaded = dist_checkpointing.load(content, str(path))
                # an adapter run's checkpoint holds adapters only; the base was read from its own storage
                for name, chunk in _named(chunks):
                    unwrap(chunk).load_state_dict(loaded[name], strict=not self.recipe.lora.rank)
            except (CheckpointException, CheckpointingException, UnpicklingError, OSError, KeyError) as error:
                raise StorageError(f"`{path}` cannot be resumed: {_said(error)}") from error
        if self.recipe.run.save_optimizer:
            with torch.no_grad():  # main parameters of an fp32 model are views of its own
                optimizer.load_state_dict(loaded["optimizer"])
            count_steps(optimizer)
            restore_random(loaded["rng"])
        else:
            optimizer.reload_model_params()
        torch.distributed.barrier()

    def _content(
        self, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, *, loading: bool
    ) -> dict[str, object]:
        from mbx.models.megatron.core.sharding import ShardedObject
        from mbx.models.megatron.weights import sharding_metadata

        metadata = {**sharding_metadata(), "distrib_optim_sharding_type": "dp_reshardable"}
        weights = {name: unwrap(chunk).sharded_state_dict(metadata=metadata) for name, chunk in _named(chunks)}  # type: ignore[operator]
        content: dict[str, object] = dict(weights)
        if self.recipe.run.save_optimizer:
            # the optimizer pairs its states with the shards of the parameters it trains
            content["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=loading, metadata=metadata)
            rank, world = self.ranks.rank, self.ranks.world_size
            content["rng"] = ShardedObject("rng_state", random_streams(), (world,), (rank,), replica_id=0)
        if self.recipe.lora.rank:
            content |= {name: only_adapters(part) for name, part in weights.items()}
        return content


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
