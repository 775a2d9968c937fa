"""A teacher before it is built: its own model, in the layout and the precision of the student."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from converters.errors import MbxError, StorageError, UnsupportedError, UsageError
from mbx.formats import hf
from mbx.formats.adapter_folder import is_adapter
from mbx.formats.registry import open_checkpoint
from mbx.models.tokenizer import read_tokenizer
from mbx.train.model.blueprint import Blueprint, blueprint, has_tokenizer
from mbx.train.recipe.sections import Distill, Fp8, Lora, Recipe

_MTP = "mtp_num_layers"
#: What makes a folder one of a teacher's likeliest tokens (`mbx.train.distill.stored`).
LOGITS = "mbx_logits.json"
#: Logits whose loss is computed at a time: a few copies of so many lie side by side in fp32, 64 MiB each.
LOSS_CHUNK = 1 << 24


@dataclass(frozen=True, slots=True)
class Teacher:
    """`recipe` builds it, frozen and whole; `plan` is what is known of it, `source` where its weights lie."""

    recipe: Recipe
    plan: Blueprint
    source: Path


def teacher_of(recipe: Recipe) -> Teacher | None:
    """The teacher that computes beside a recipe's student; None without, and where its words lie on disk.

    StorageError or UsageError for what is none, and what `blueprint` says where the student's layout or rows do not
    fit it.
    """
    if not recipe.distill.teacher or logits_of(recipe) is not None:
        return None
    source = Path(recipe.distill.teacher)
    with of_teacher():
        if not source.is_dir():
            raise StorageError(f"`{source}` is no folder")
        if is_adapter(source):
            raise UsageError(
                f"`{source}` holds adapters, and no model",
                hint="`mbx convert merge` adds them to their base",
            )
        model = replace(recipe.model, path=str(_folder(source)), init="pretrained", mapping="", shape={}, config={})
        own = replace(
            recipe,
            model=model,
            train=replace(recipe.train, recompute="none", tower="frozen"),
            lora=Lora(),
            distill=Distill(),
            fp8=Fp8(),
        )
        plan = blueprint(own)
        if plan.table is not None and plan.table.unsupported:
            raise UnsupportedError(f"another model would teach: {plan.table.unsupported}")
    # what prediction layers say of later tokens, no student hears
    return Teacher(own, replace(plan, config={**plan.config, _MTP: None}), source)


def logits_of(recipe: Recipe) -> Path | None:
    """The folder of a teacher's words that a recipe names, None where it names no such folder."""
    folder = Path(recipe.distill.teacher)
    return folder if recipe.distill.teacher and (folder / LOGITS).is_file() else None


@contextmanager
def of_teacher() -> Iterator[None]:
    """Says of errors that they are about the teacher."""
    try:
        yield
    except MbxError as error:
        raise type(error)(f"distill.teacher: {error.fact}", hint=error.hint, details=error.details) from error


def _folder(source: Path) -> Path:
    """The folder with the config.json of what is stored at `source`."""
    if (source / hf.CONFIG).is_file():
        return source
    if (found := open_checkpoint(source).hf) is None:
        raise UsageError(
            f"`{source}` has no config.json beside its weights",
            hint="mbx convert mcore-to-hf ‹hf-config› DIR makes a folder that has",
        )
    return found


def check_student(plan: Blueprint) -> None:
    """Refuse a model of which a teacher would reach a part alone."""
    if plan.config.get(_MTP):
        raise UnsupportedError("a student with prediction layers takes no teacher: these would learn the data alone")


def check_teacher(recipe: Recipe, plan: Blueprint, teacher: Teacher, *, dry: bool = False) -> None:
    """Refuse a teacher that does not speak of the student's tokens, or whose weights are not whole; `dry`: they need
    not be there."""
    from mbx.train.model.weights import check_source  # and with it torch, which no budget needs

    check_student(plan)
    with of_teacher():
        _check_vocabulary(plan, teacher.plan)
        if recipe.distill.top_k >= plan.vocab:
            raise UsageError(
                f"distill.top_k={recipe.distill.top_k}, and the vocabulary has {plan.vocab} tokens",
                hint="distill.top_k=0 takes all of them",
            )
        if not (dry and teacher.source == teacher.plan.hf and not hf.has_weights(teacher.source)):
            check_source(teacher.plan, teacher.source)


def _check_vocabulary(student: Blueprint, teacher: Blueprint) -> None:
    """UsageError unless both have the same tokens under the same ids, as far as their folders say."""
    hint = "a teacher with the student's tokenizer"
    if student.vocab != teacher.vocab:
        raise UsageError(f"it has {teacher.vocab} tokens, and the student {student.vocab}", hint=hint)
    folders = [plan.hf for plan in (student, teacher) if plan.hf is not None and has_tokenizer(plan.hf)]
    if len(folders) < 2 or folders[0].samefile(folders[1]):
        return
    mine, other = (read_tokenizer(folder).get_vocab() for folder in folders)
    if odd := sorted(token for token in mine.keys() | other.keys() if mine.get(token) != other.get(token)):
        token = odd[0]
        raise UsageError(
            f"its tokenizer is another: {len(odd)} token(s) differ, {token!r} is {other.get(token, 'none')} there and "
            f"{mine.get(token, 'none')} here",
            hint=hint,
        )
