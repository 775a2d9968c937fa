"""What of a folder that a run's weights came from is no part of its model: it travels beside the checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from converters.adapters.megatron import TOWER
from converters.errors import StorageError, UnsupportedError, UsageError
from converters.mcore.keys import bare
from converters.protocols import Source
from converters.tensors import StoredTensor
from mbx.formats import hf
from mbx.formats.checkpoint import Checkpoint
from mbx.formats.files import FileSource
from mbx.formats.prediction import HEADS, LeftOut, left_out, rows_ahead
from mbx.formats.registry import open_checkpoint
from mbx.formats.views import hf_tensors
from mbx.models.stored import read_whole
from mbx.text import human_bytes, plural
from mbx.train.model.blueprint import Blueprint
from mbx.train.model.sight import tower_folder


@dataclass(frozen=True, slots=True)
class Beside:
    """Tensors that a run's model has not, of a folder that has `names`, to be read from `source`.

    `towers` are those of modules around the text model, `ahead` those of prediction layers that the run left out but
    for `copies`, which repeat a tensor that it has, by name.
    """

    towers: Mapping[str, StoredTensor]
    ahead: Mapping[str, StoredTensor]
    copies: Mapping[str, str]
    names: Collection[str]
    source: Source

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """All that travels."""
        return {**self.towers, **self.ahead}


@contextlib.contextmanager
def beside_of(plan: Blueprint, base: str, last: Path | None = None) -> Iterator[Beside | None]:
    """What lies beside the model in the folder that a run's first weights came from, `base`; None where nothing does.

    `base` may be a Megatron checkpoint: what it carries counts, and the tower of the model's folder where it carries
    none. Where it is gone, it is what the run's `last` checkpoint carries; StorageError where that has none.
    """
    table = plan.table
    if plan.hf is None or table is None or not (table.beside or _may_leave_out(plan)):
        yield None
        return
    folder = _place(plan, base)
    kept = _kept(last) if base and not Path(base).is_dir() else {}
    if kept:
        assert last is not None
        towers = {name: tensor for name, tensor in kept.items() if table.beside and name.startswith(table.beside)}
        ahead = {name: tensor for name, tensor in kept.items() if name not in towers}
        with contextlib.closing(FileSource(last)) as source:
            yield Beside(towers, ahead, {}, hf.open_hf(plan.hf).tensors if hf.has_weights(plan.hf) else kept, source)
    elif folder.is_dir():
        random = not base and not table.beside
        if random or ((folder / hf.CONFIG).is_file() and not hf.has_weights(folder)):
            yield None
            return
        with open_checkpoint(folder) as opened:
            yield _found(plan, opened)
    elif not _may_leave_out(plan):
        yield None
    else:
        raise StorageError(
            f"`{folder}` is gone, from where the run's first weights came: the prediction layers that the run leaves "
            "out are copied from there into its checkpoints",
            hint="put it back there",
        )


def said_of(plan: Blueprint, base: str, last: Path | None) -> str:
    """In words, the prediction layers that a run leaves out; empty without any. Raises what `beside_of` does."""
    with beside_of(plan, base, last) as found:
        if found is None or not found.ahead:
            return ""
        size = human_bytes(sum(tensor.nbytes for tensor in found.ahead.values()))
        return (
            f"prediction layers are left out: their {plural(len(found.ahead), 'tensor')} ({size}) are kept beside the "
            "checkpoints, and exported as they are"
        )


def check_predictions(before: Blueprint, now: Blueprint) -> None:
    """UsageError where a resumed run would have another number of prediction layers than before: those that it
    trained would be lost, or new ones begin anew."""
    had, has = (plan.config.get(HEADS) or 0 for plan in (before, now))
    if had != has:
        raise UsageError(
            f"‹resume›: the run trained with {had} prediction layers, now it would have {has}",
            hint=f"model.config.{HEADS}={had} continues it; ‹init-from› with run.dir=NAME starts another run",
        )


def check_random(plan: Blueprint) -> None:
    """UnsupportedError where a model of random weights leaves out prediction layers that its config.json names."""
    if plan.hf is not None and plan.table is not None and _may_leave_out(plan):
        raise UnsupportedError(
            f"prediction layers are left out that `{plan.hf / hf.CONFIG}` has: random weights have none to keep, and "
            "an export would lack them",
            hint=f"leave model.config.{HEADS} as config.json has it, or name a folder whose config.json has none",
        )


def check_tower(plan: Blueprint, path: Path) -> None:
    """UnsupportedError where the Megatron checkpoint at `path` carries another tower than the model's folder has,
    which is the one that would look at images."""
    if plan.hf is None or plan.table is None or not plan.table.beside or (path / hf.CONFIG).is_file():
        return
    with open_checkpoint(path) as opened:
        carried = _carried(plan, opened)
        if carried and hf.has_weights(plan.hf):
            with hf.open_hf(plan.hf) as folder:
                if all(_same(folder, opened, name, tensor) for name, tensor in carried.items()):
                    return
    if carried:
        raise UnsupportedError(
            f"`{path}` carries another tower than `{plan.hf}`, whose tower would look at the images",
            hint=f"`mbx convert mcore-to-hf {path} DIR`, or `mbx train export` of its run, and start from that folder",
        )


def _same(folder: Checkpoint, opened: Checkpoint, name: str, tensor: StoredTensor) -> bool:
    """Whether a folder has a tensor of a checkpoint, value by value."""
    own = folder.tensors.get(name)
    if own is None or (own.dtype, own.shape) != (tensor.dtype, tensor.shape):
        return False
    return bool(read_whole(own, folder.source).equal(read_whole(tensor, opened.source)))


def _found(plan: Blueprint, opened: Checkpoint) -> Beside | None:
    table = plan.table
    assert table is not None and plan.hf is not None
    if opened.spelling == "mcore" and not (
        any(bare(name).startswith("mtp.") for name in opened.tensors)
        or (opened.hf is not None and hf.kept_tensors(opened.home, opened.hf))
    ):
        return None  # a converted text model, or of a run that left nothing out
    # one that was trained is in hf/ as well
    opened = replace(opened, tensors={n: one for n, one in opened.tensors.items() if not n.startswith(TOWER)})
    tensors, source = hf_tensors(opened)
    towers = {name: tensor for name, tensor in tensors.items() if name.startswith(table.beside)}
    found = _left_out(plan, tensors)
    ahead = {name: tensors[name] for name in found.tensors}
    return Beside(towers, ahead, found.copies, tensors, source) if towers or ahead else None


def _left_out(plan: Blueprint, tensors: Mapping[str, StoredTensor]) -> LeftOut:
    assert plan.table is not None and plan.hf is not None
    return left_out(plan.table, plan.table.config.to_mcore(hf.read_config(plan.hf)), plan.config, tensors)


def _may_leave_out(plan: Blueprint) -> bool:
    """Whether the model's config has more prediction layers than the run."""
    assert plan.table is not None and plan.hf is not None
    fields = plan.table.config.to_mcore(hf.read_config(plan.hf))
    names = {name for row in rows_ahead(plan.table, fields, None) for name in row.hf}
    return bool(left_out(plan.table, fields, plan.config, names).tensors)


def _kept(last: Path | None) -> Mapping[str, StoredTensor]:
    """What the checkpoint at `last` carries."""
    return {} if last is None else hf.kept_tensors(last, last / "hf")


def _place(plan: Blueprint, base: str) -> Path:
    """Where what lies beside the model is read: from `base`, or the model's folder where that has no tower."""
    assert plan.table is not None and plan.hf is not None
    if not plan.table.beside:
        return Path(base)
    start = Path(base)
    if not base or not start.is_dir() or (start / hf.CONFIG).is_file():
        return tower_folder(plan.hf, base)
    with open_checkpoint(start) as opened:
        if _carried(plan, opened):
            return start
        if _may_leave_out(plan) and any(bare(name).startswith("mtp.") for name in opened.tensors):
            raise UnsupportedError(
                f"`{base}` has prediction layers, which the run leaves out, and no tower: they would come from "
                f"`{plan.hf}`, as the tower does",
                hint=f"leave model.config.{HEADS} as config.json has it",
            )
    return plan.hf


def _carried(plan: Blueprint, opened: Checkpoint) -> Mapping[str, StoredTensor]:
    """The towers beside a Megatron checkpoint of the text model."""
    assert plan.table is not None and plan.table.beside
    if opened.spelling != "mcore" or opened.hf is None:
        return {}
    kept = hf.kept_tensors(opened.home, opened.hf)
    return {name: tensor for name, tensor in kept.items() if name.startswith(plan.table.beside)}
