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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converters.errors import StorageError, UsageError
from mbx.io import hf, torch_dist
from mbx.train.model import Blueprint, unwrap
from mbx.train.parallel import Ranks
from mbx.train.recipe import Recipe
from mbx.train.restore import allocate, count_steps, random_streams, restore_random

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer

STATE = "mbx_train.json"
RECIPE = "recipe.json"
#: Recipe keys that must not change under --resume: with them, step N would not be the step N of the run.
_FIXED = (
    *("data", "train.global_batch", "train.seed", "train.per_token_loss", "lora", "model.path", "model.shape"),
    *(
        "parallel.tp",
        "parallel.pp",
        "parallel.vpp",
        "parallel.cp",
        "parallel.ep",
        "parallel.etp",
        "parallel.distributed_optimizer",
    ),
)


@dataclass(frozen=True, slots=True)
class LoopState:
    """What the loop knows besides tensors. Rows are counted by `step`, so nothing else places the data.

    `base` is where the run's first weights came from: an adapter run reads them there again. Empty if random.
    """

    step: int
    mean_loss: float
    base: str


def latest(run: Path) -> Path | None:
    """The checkpoint that a run's tracker names; None without a tracker. A damaged tracker is a StorageError."""
    if not (run / torch_dist.TRACKER).is_file():
        return None
    return torch_dist.find_iteration(run)


def read_state(path: Path) -> LoopState:
    """The loop's state in the checkpoint at `path`; StorageError where it is not one of `mbx train`."""
    try:
        loop = json.loads((path / STATE).read_text(encoding="utf-8"))
        return LoopState(int(loop["step"]), float(loop["mean_loss"]), str(loop["base"]))
    except (OSError, ValueError, KeyError) as error:
        raise StorageError(f"`{path}` is no checkpoint of `mbx train`: {error}") from error


class Store:
    """Writes and reads the checkpoints of one run; all calls are collective."""

    def __init__(self, recipe: Recipe, plan: Blueprint, ranks: Ranks) -> None:
        self.recipe, self.plan, self.ranks = recipe, plan, ranks
        self.root = recipe.run_dir
        self._writers: AsyncCallsQueue | None = None

    def save(self, state: LoopState, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> Path:
        """Write `iter_{step}`; the tracker moves only when all of it is on the disk. Older ones beyond `keep` go.

        With `run.save_async` it returns while a process of each rank writes; `settle` finishes what is written.
        """
        import torch
        from megatron.core import dist_checkpointing

        self.settle(wait=True)  # one at a time: the tracker must not go back
        target = self.root / f"iter_{state.step:07d}"
        if self.ranks.is_main:
            shutil.rmtree(target, ignore_errors=True)  # an unfinished one: the tracker does not name it
            target.mkdir(parents=True)
        torch.distributed.barrier()
        content = self._content(chunks, optimizer, loading=False)
        content |= {
            "checkpoint_version": 3.0,
            "iteration": state.step,
            "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
        }
        beside = self.recipe.run.save_async
        request = dist_checkpointing.save(content, str(target), ("torch_dist", 1), async_sharded_save=beside)
        if request is None:
            torch.distributed.barrier()
            self._finish(target, state)
            torch.distributed.barrier()
            return target
        request.add_finalize_fn(lambda: self._finish(target, state))
        if self._writers is None:
            from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

            self._writers = AsyncCallsQueue()
        self._writers.schedule_async_request(request)
        return target

    def settle(self, *, wait: bool) -> None:
        """Finish a checkpoint whose writers are done on all ranks; `wait` until they are. Collective."""
        from torch.distributed.checkpoint.api import CheckpointException

        if self._writers is None:
            return
        try:  # torch's CheckpointException derives from BaseException, so it is named
            self._writers.maybe_finalize_async_calls(blocking=wait)
        except (CheckpointException, OSError) as error:
            raise StorageError(f"a checkpoint of `{self.root}` could not be written: {error}") from error

    def _finish(self, target: Path, state: LoopState) -> None:
        """Complete a written checkpoint and point the tracker at it; the main rank's work."""
        if not self.ranks.is_main:
            return
        loop = {**asdict(state), "world_size": self.ranks.world_size}
        (target / STATE).write_text(json.dumps(loop), encoding="utf-8")
        (target / RECIPE).write_text(json.dumps(self.recipe.to_dict(), indent=1), encoding="utf-8")
        if self.plan.hf is not None:
            (target / "hf").mkdir()
            folder = hf.open_hf(self.plan.hf)
            for name in folder.side_files:
                shutil.copyfile(self.plan.hf / name, target / "hf" / name)
            (target / "hf" / hf.LAYOUT).write_text(hf.record_layout(folder), encoding="utf-8")
        for path in [*target.rglob("*"), target]:
            _sync(path)
        tracker = self.root / torch_dist.TRACKER
        draft = tracker.with_suffix(".tmp")
        draft.write_text(str(state.step), encoding="utf-8")
        _sync(draft)
        draft.replace(tracker)
        _sync(self.root)
        keep = self.recipe.run.keep
        done = sorted(path for path in self.root.glob("iter_*") if path.is_dir() and path != target)
        for old in done[: max(0, len(done) - keep + 1)] if keep else []:
            shutil.rmtree(old)

    def load(self, path: Path, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> LoopState:
        """Fill the model, the optimizer and the random streams from `path`; returns the loop's state."""
        import torch
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.core import CheckpointingException
        from torch.distributed.checkpoint.api import CheckpointException

        state = self._check_recipe(path)
        allocate(optimizer)
        content = self._content(chunks, optimizer, loading=True)
        try:  # torch's CheckpointException derives from BaseException, so it is named
            loaded = dist_checkpointing.load(content, str(path))
        except (CheckpointException, CheckpointingException, OSError, KeyError) as error:
            raise StorageError(f"`{path}` cannot be resumed: {error}") from error
        # an adapter run's checkpoint holds adapters only; the base was read from its own storage
        for name, chunk in _named(chunks):
            unwrap(chunk).load_state_dict(loaded[name], strict=not self.recipe.lora.rank)
        if self.recipe.run.save_optimizer:
            with torch.no_grad():  # main parameters of an fp32 model are views of its own
                optimizer.load_state_dict(loaded["optimizer"])
            count_steps(optimizer)
            restore_random(loaded["rng"])
        else:
            optimizer.reload_model_params()
        torch.distributed.barrier()
        return state

    def _content(
        self, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, *, loading: bool
    ) -> dict[str, object]:
        from megatron.core import parallel_state
        from megatron.core.dist_checkpointing.mapping import ShardedObject

        metadata: dict[str, object] = {
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
            "distrib_optim_sharding_type": "dp_reshardable",
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        weights = {name: unwrap(chunk).sharded_state_dict(metadata=metadata) for name, chunk in _named(chunks)}  # type: ignore[operator]
        content: dict[str, object] = dict(weights)
        if self.recipe.run.save_optimizer:
            # the optimizer pairs its states with the shards of the parameters it trains
            content["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=loading, metadata=metadata)
            rank, world = self.ranks.rank, self.ranks.world_size
            content["rng"] = ShardedObject("rng_state", random_streams(), (world,), (rank,), replica_id=0)
        if self.recipe.lora.rank:
            from mbx.train.lora import only_adapters

            content |= {name: only_adapters(part) for name, part in weights.items()}
        return content

    def _check_recipe(self, path: Path) -> LoopState:
        """The loop's state at `path`, once the recipe is known to continue that run and no other."""
        try:
            before = json.loads((path / RECIPE).read_text(encoding="utf-8"))
            loop = json.loads((path / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StorageError(f"`{path}` is no checkpoint of `mbx train`: {error}") from error
        now = json.loads(json.dumps(self.recipe.to_dict()))
        changed = [key for key in _FIXED if _get(before, key) != _get(now, key)]
        if changed:
            raise UsageError(
                f"--resume: the recipe changed in {', '.join(changed)}; the run would not be the same run",
                hint="start another with --init-from and run.dir=NAME",
                details=[f"{key}: {_get(before, key)!r} became {_get(now, key)!r}" for key in changed],
            )
        if loop["world_size"] != self.ranks.world_size:
            raise UsageError(
                f"--resume: the run had {loop['world_size']} process(es), now there are {self.ranks.world_size}",
                hint=f"torchrun --nproc-per-node {loop['world_size']} -m mbx train … --resume",
            )
        return read_state(path)


def _named(chunks: Sequence[DistributedDataParallel]) -> list[tuple[str, DistributedDataParallel]]:
    """Chunks under Megatron-LM's names: `model`, or `model0`, `model1`, … where the pipeline is interleaved."""
    return [("model" if len(chunks) == 1 else f"model{number}", chunk) for number, chunk in enumerate(chunks)]


def _get(recipe: Mapping[str, object], key: str) -> object:
    value: object = recipe
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
