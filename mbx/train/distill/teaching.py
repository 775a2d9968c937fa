"""What joins a student with its teacher: in every micro-batch, and between the stages of a pipeline.

Each stage runs the teacher's layers before the student's own, and the states of both travel to the next one side by
side, as one tensor of both widths: Megatron Core's schedules see a wider model. The loss is computed where the
student's own would be, from both logits.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch

from mbx.train.data.batch import Batch
from mbx.train.distill.live import LiveTeacher
from mbx.train.distill.loss import likeliest, total_loss
from mbx.train.distill.terms import Columns, CrossEntropy, Likeliest, Term, Whole
from mbx.train.model.blueprint import Blueprint
from mbx.train.model.build import unwrap
from mbx.train.recipe.sections import Recipe

if TYPE_CHECKING:
    from torch import nn

    from mbx.models.megatron.core.training import DistributedDataParallel


class Teaching:
    """A student's `chunks` and their teacher. Where stages hand on states, the schedules are told of both widths."""

    def __init__(
        self, recipe: Recipe, plan: Blueprint, chunks: Sequence[DistributedDataParallel], teacher: LiveTeacher
    ) -> None:
        from mbx.models.megatron.core.groups import parallel_state as ps

        self.distill, self.vocabulary, self.teacher = recipe.distill, plan.vocab, teacher
        self.group = ps.get_tensor_model_parallel_group()
        self.chunks, self.students = chunks, [unwrap(chunk) for chunk in chunks]
        self.staged = recipe.parallel.pp > 1
        self._sums: list[torch.Tensor] = []
        self._speaks = False
        if self.staged:
            for chunk, student in zip(chunks, self.students, strict=True):
                chunk.config = copy.copy(chunk.config)  # the schedules': layers have the student's own
                self._receive(student)

    def _receive(self, student: nn.Module) -> None:
        """Let a stage take what is the student's of the states it is given, and its teacher the rest."""
        number, plain = self.students.index(student), student.set_input_tensor
        own = int(student.config.hidden_size)  # type: ignore[union-attr, arg-type]

        def take(states: torch.Tensor | list[torch.Tensor | None] | None) -> None:
            given = states[0] if isinstance(states, list) else states
            if given is not None and self._speaks:
                heard = given[..., own:].detach().contiguous()
                self.teacher.chunks[number].set_input_tensor(heard)  # type: ignore[operator]
                given = given[..., :own].contiguous()
            plain(given)  # type: ignore[operator]

        student.set_input_tensor = take  # type: ignore[assignment]

    @contextlib.contextmanager
    def speaking(self) -> Iterator[None]:
        """Passes of a schedule in which the teacher takes part."""
        with contextlib.ExitStack() as undo:
            for chunk in self.chunks if self.staged else ():
                width = chunk.config.hidden_size + self.teacher.hidden
                undo.enter_context(patch.object(chunk.config, "hidden_size", width))
            undo.enter_context(patch.object(self, "_speaks", True))
            yield

    @contextlib.contextmanager
    def passing(self, student: nn.Module, batch: Batch) -> Iterator[None]:
        """The student's pass of one micro-batch, behind the teacher's."""
        self._heard = self.teacher.passed(self.students.index(student), batch)
        if not student.post_process:
            yield
            return
        self._batch = batch
        with patch.object(student, "compute_language_model_loss", self._loss):
            yield
        del self._heard, self._batch

    def handed_on(self, student: nn.Module, output: torch.Tensor) -> torch.Tensor:
        """What a stage sends: losses, or the states of the student and the teacher."""
        return output if student.post_process else torch.cat((output, self._heard), -1)

    def _loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The loss of every token, [b, s]; labels: [b, s], logits: [s, b, this rank's columns]."""
        d, width = self.distill, logits.shape[-1]
        held = Columns.of(width, self.vocabulary, self.group)
        factor, heard = d.weight * d.temperature**2, self._heard.view(-1, width)
        terms: list[Term] = []
        if d.weight < 1:
            terms.append(CrossEntropy(labels.t().reshape(-1), held, 1 - d.weight))
        if d.top_k:
            terms.append(Likeliest(likeliest(heard, d.top_k, d.temperature, held), held, factor, d.temperature))
        else:
            terms.append(Whole(heard, held, factor, d.temperature))
        loss, each = total_loss(logits.view(-1, width), terms, self.group)
        mask = self._batch["mask"]
        assert mask is not None
        weights = mask.view(labels.shape).t().reshape(-1)
        self._sums.append(torch.stack(((each[-1] * weights).sum(), weights.sum())))
        return loss.view(logits.shape[:2]).t().contiguous()

    def read(self) -> dict[str, float]:
        """The mean divergence of the step's tokens, in nats, and forget it; collective, the same on every rank."""
        from mbx.models.megatron.core.groups import parallel_state as ps

        device = next(self.students[0].parameters()).device
        total = torch.stack([torch.zeros(2, device=device), *self._sums]).sum(0)
        self._sums.clear()
        torch.distributed.all_reduce(total, group=ps.get_data_parallel_group(with_context_parallel=True))
        torch.distributed.all_reduce(total, group=ps.get_pipeline_model_parallel_group())
        return {"distill_kl": float(total[0] / total[1].clamp(min=1))}
