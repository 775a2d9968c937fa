"""What of a folder that a run's weights came from is no part of its model: it travels beside the checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

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

    Where that folder is gone, it is what the run's `last` checkpoint carries; StorageError where that has none.
    """
    table = plan.table
    if plan.hf is None or table is None or not (table.beside or _may_leave_out(plan)):
        yield None
        return
    folder = tower_folder(plan.hf, base) if table.beside else Path(base)
    if folder.is_dir():
        random = not base and not table.beside
        if random or ((folder / hf.CONFIG).is_file() and not hf.has_weights(folder)):
            yield None
            return
        with open_checkpoint(folder) as opened:
            yield _found(plan, opened)
    elif not _may_leave_out(plan):
        yield None
    else:
        kept = _again(plan, folder, last)
        assert last is not None
        with contextlib.closing(FileSource(last)) as source:
            yield Beside({}, kept, {}, kept, source)


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


def _found(plan: Blueprint, opened: Checkpoint) -> Beside | None:
    table = plan.table
    assert table is not None and plan.hf is not None
    if opened.spelling == "mcore" and not (
        any(bare(name).startswith("mtp.") for name in opened.tensors)
        or (opened.hf is not None and hf.kept_tensors(opened.home, opened.hf))
    ):
        return None  # a converted text model, or of a run that left nothing out
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


def _again(plan: Blueprint, folder: Path, last: Path | None) -> Mapping[str, StoredTensor]:
    """What the checkpoint at `last` carries of a folder that is gone."""
    kept = {} if last is None else hf.kept_tensors(last, last / "hf")
    if last is None or not kept:
        raise StorageError(
            f"`{folder}` is gone, from where the run's first weights came: the prediction layers that the run leaves "
            "out are copied from there into its checkpoints",
            hint="put it back there",
        )
    return kept
