"""`mbx train logits`: a teacher's likeliest tokens for every row that a recipe trains on, written to a folder.

The teacher runs alone, in the recipe's layout. Rows are dealt to data-parallel ranks as in training; each writes its
own files as it goes, so that memory holds one micro-batch's logits and no more.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from converters.errors import UsageError
from mbx.live.exchange import agreed, gather_objects
from mbx.train.data.batch import Batch, to_device
from mbx.train.data.evaluation import OnePass
from mbx.train.data.rows import Examples, Row, Rows, Stream, megatron_rows, micro_batches
from mbx.train.distill.live import LiveTeacher
from mbx.train.distill.loss import likeliest
from mbx.train.distill.stored import Facts, Part, digest_of_row, facts_of, write_facts
from mbx.train.distill.terms import Columns, Top
from mbx.train.model.parallel import on_any_rank, session
from mbx.train.recipe.sections import Fp8, Lora, Recipe
from mbx.train.run.prepare import Prepared, prepare

if TYPE_CHECKING:
    from torch import nn

#: Micro-batches that a stage of a pipeline is given at once, for every stage.
_ROUNDS = 4


def prepared_for(recipe: Recipe, target: Path) -> Prepared:
    """A recipe as its teacher is asked: without a start, as no student is built."""
    run = replace(recipe.run, dir=f"{target}.run", save=False, keep_best=False, export_every=0)
    model = replace(recipe.model, init="random")
    return prepare(replace(recipe, model=model, lora=Lora(), fp8=Fp8(), run=run))


def write_logits(prepared: Prepared, target: Path, say: Callable[[str], None] = lambda _: None) -> Facts:
    """Ask the teacher of a prepared recipe about its rows and write what it says to `target`; collective.

    Rows of files are asked about once, however many epochs are trained; of rows without an end, as many as the recipe
    trains on. UsageError where no teacher can be asked, or the folder is not empty.
    """
    recipe = prepared.recipe
    if prepared.teacher is None or not recipe.distill.top_k:
        key = "distill.top_k=64 says how many of its likeliest tokens are kept"
        raise UsageError("no teacher is asked for its likeliest tokens", hint=f"distill.teacher=DIR names one, {key}")
    if recipe.parallel.cp > 1:
        raise UsageError("rows that context parallelism cuts are not written", hint="parallel.cp=1")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"`{target}` is not empty", hint="name a new folder")
    draft = target.with_name(f"{target.name}.partial")
    with session(recipe, prepared.ranks):
        job = _Job(prepared, draft)
        for line in job.teacher.said:
            say(line)
        with agreed():
            job.run(say)
        found = job.facts()
        with agreed():
            if prepared.ranks.is_main:
                write_facts(draft, found)
                draft.replace(target)
    return found


class _Job:
    """The teacher, and this rank's files where it is one that writes."""

    def __init__(self, prepared: Prepared, draft: Path) -> None:
        from mbx.models.megatron.core.groups import parallel_state as ps

        assert prepared.teacher is not None
        self.prepared, self.recipe, self.ranks = prepared, prepared.recipe, prepared.ranks
        self.group, self.dp_rank = ps.get_tensor_model_parallel_group(), ps.get_data_parallel_rank()
        with agreed():
            if self.ranks.is_main:
                if draft.exists():  # of a process that was killed
                    shutil.rmtree(draft)
                draft.mkdir(parents=True)
        writes = ps.is_pipeline_last_stage(ignore_virtual=True) and self.group.rank() == 0
        with agreed():
            self.part = Part(draft, self.dp_rank) if writes else None
        self.teacher = LiveTeacher(prepared.teacher, self.ranks)

    def run(self, say: Callable[[str], None]) -> None:
        """Ask about every row."""
        from mbx.models.megatron.core.training import get_forward_backward_func

        rows, t, p = self._rows(), self.recipe.train, self.recipe.parallel
        rounds = _ROUNDS * p.pp if p.pp > 1 else 1
        length, micro = self.recipe.data.length, t.micro_batch
        if self.ranks.te and self.recipe.data.packs:
            length, micro = length * micro, 1  # packed rows travel between stages as one
        size, schedule = t.micro_batch * self.ranks.dp * rounds, get_forward_backward_func()
        batches = -(-rows.count // size)
        for number in range(batches):
            schedule(
                forward_step_func=self._step,
                data_iterator=[self._batches(rows, number, size) for _ in self.teacher.chunks],
                model=list(self.teacher.chunks),
                num_microbatches=rounds,
                seq_length=length,
                micro_batch_size=micro,
                forward_only=True,
                collect_non_loss_data=True,
            )
            if on_any_rank(self.part is not None and self.part.failed is not None, self.ranks.device):
                break  # together: the others would wait for what this one has to give
            if (number + 1) * 10 // batches > number * 10 // batches:
                say(f"{min((number + 1) * size, rows.count)} of {rows.count} rows")
        if self.part is not None:
            self.part.close()

    def facts(self) -> Facts:
        """What all ranks wrote. Collective."""
        part = self.part
        counts = gather_objects((0, 0) if part is None else (part.rows, part.learned))
        rows, learned = (sum(count) for count in zip(*counts, strict=True))
        return replace(facts_of(self.recipe, self.prepared.plan, self.ranks.dp), rows=rows, learned=learned)

    def _rows(self) -> OnePass:
        """Every row that the recipe trains on, once."""
        t, rows = self.recipe.train, self.prepared.train_rows
        count = t.steps * t.global_batch
        if isinstance(rows, Examples | Stream):
            return OnePass(rows, min(rows.count, count))
        if rows is None:
            rows, _ = megatron_rows(self.recipe.data, self.prepared.plan.vocab, count, 0)
        firsts: dict[bytes, int] = {}
        for index in range(count):
            firsts.setdefault(digest_of_row(rows.row(index)), index)
        return OnePass(_Picked(rows, list(firsts.values())), len(firsts))

    def _batches(self, rows: OnePass, number: int, size: int) -> Iterator[tuple[list[Row], Batch]]:
        t = self.recipe.train
        for micro in micro_batches(
            rows,
            number,
            global_batch=size,
            micro_batch=t.micro_batch,
            dp=self.ranks.dp,
            dp_rank=self.dp_rank,
        ):
            yield micro, to_device(micro, self.ranks, cp=1)

    def _step(
        self, batches: Iterator[tuple[list[Row], Batch]], model: nn.Module
    ) -> tuple[torch.Tensor, Callable[..., object]]:
        """A micro-batch through a chunk: what it hands on, and what is kept of the last one's."""
        rows, batch = next(batches)
        output = self.teacher.passed(self.teacher.chunks.index(model), batch)
        return output, partial(self._keep, rows)

    @torch.no_grad()
    def _keep(self, rows: list[Row], logits: torch.Tensor, *, non_loss_data: bool) -> None:
        """Write what the logits [s, b, columns here] say of `rows`."""
        width, k = logits.shape[-1], self.recipe.distill.top_k
        held = Columns.of(width, self.prepared.plan.vocab, self.group)
        top = likeliest(logits.reshape(-1, width), k, self.recipe.distill.temperature, held)
        if self.part is None:
            return
        shape = logits.shape[:2]
        tokens, logprobs, rest = (
            part.reshape(*shape, -1).transpose(0, 1).reshape(len(rows), -1, part.shape[1] if part.dim() > 1 else 1)
            for part in (top.tokens, top.logprobs, top.rest)
        )
        for row, *parts in zip(rows, tokens, logprobs, rest[..., 0], strict=True):
            if row.mask.any():
                self.part.add(row, Top(*parts))


@dataclass(frozen=True, slots=True)
class _Picked:
    rows: Rows
    indices: Sequence[int]

    def row(self, index: int) -> Row:
        """The row that stands at a place of `indices`."""
        return self.rows.row(self.indices[index])
