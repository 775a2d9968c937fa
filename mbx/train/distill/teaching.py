"""What joins a student with its teacher: each micro-batch, where the loss is.

A teacher in memory runs each stage's layers before the student's own, and its states travel beside the student's. One
whose words lie on disk has no layers; the rows bring them along. The loss is computed where the student's own was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch

from mbx.train.data.batch import HEARD, Batch
from mbx.train.distill.hidden import Hidden
from mbx.train.distill.live import LiveTeacher
from mbx.train.distill.loss import likeliest, total_loss
from mbx.train.distill.side_by_side import SideBySide
from mbx.train.distill.terms import Columns, CrossEntropy, Likeliest, Term, Top, Whole
from mbx.train.model.blueprint import Blueprint
from mbx.train.model.build import unwrap
from mbx.train.recipe.sections import Recipe

if TYPE_CHECKING:
    from torch import nn

    from mbx.models.megatron.core.training import DistributedDataParallel


class Teaching:
    """A student's `chunks` and their teacher, None where its words are in the rows; `hidden` compares their states."""

    def __init__(
        self,
        recipe: Recipe,
        plan: Blueprint,
        chunks: Sequence[DistributedDataParallel],
        teacher: LiveTeacher | None,
        hidden: Hidden | None = None,
    ) -> None:
        from mbx.models.megatron.core.groups import parallel_state as ps

        self.distill, self.vocabulary, self.teacher, self.hidden = recipe.distill, plan.vocab, teacher, hidden
        self.group = ps.get_tensor_model_parallel_group()
        self.students = [unwrap(chunk) for chunk in chunks]
        self.states: SideBySide | None = None
        if teacher is not None and recipe.parallel.pp > 1:
            self.states = SideBySide(chunks, self.students, teacher.chunks)
        self._heard: torch.Tensor | None = None
        self._sums: list[torch.Tensor] = []

    def speaking(self) -> contextlib.AbstractContextManager[None]:
        """Passes of a schedule in which the teacher takes part."""
        return contextlib.nullcontext() if self.states is None else self.states.widened()

    @contextlib.contextmanager
    def passing(self, student: nn.Module, batch: Batch) -> Iterator[None]:
        """The student's pass of one micro-batch, behind the teacher's."""
        with contextlib.nullcontext() if self.hidden is None else self.hidden.passing(batch):
            if self.teacher is not None:
                self._heard = self.teacher.passed(self.students.index(student), batch)
            if not student.post_process:
                yield
                return
            self._batch = batch
            with patch.object(student, "compute_language_model_loss", self._loss):
                yield
            self._heard = None
            del self._batch

    def handed_on(self, student: nn.Module, output: torch.Tensor) -> torch.Tensor:
        """What a stage sends: losses, or the states of the student and, where it has layers, the teacher."""
        if student.post_process or self._heard is None:
            return output
        states, self._heard = self._heard, None
        return torch.cat((output, states), -1)

    def _loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The loss of every token, [b, s]; labels: [b, s], logits: [s, b, this rank's columns]."""
        width = logits.shape[-1]
        held = Columns.of(width, self.vocabulary, self.group)
        terms: list[Term] = [self._divergence(width, held)]
        if self.distill.weight < 1:
            terms.append(CrossEntropy(labels.t().reshape(-1), held, 1 - self.distill.weight))
        loss, each = total_loss(logits.view(-1, width), terms, self.group)
        mask = self._batch["mask"]
        assert mask is not None
        weights = mask.view(labels.shape).t().reshape(-1)
        self._sums.append(torch.stack(((each[0] * weights).sum(), weights.sum())))
        return loss.view(logits.shape[:2]).t().contiguous()

    def _divergence(self, width: int, held: Columns) -> Term:
        """The teacher's term of the micro-batch's loss."""
        d = self.distill
        factor = d.weight * d.temperature**2
        if self._heard is None:
            return Likeliest(_told(self._batch), held, factor, d.temperature)
        logits = self._heard.view(-1, width)
        if d.top_k:
            return Likeliest(likeliest(logits, d.top_k, d.temperature, held), held, factor, d.temperature)
        return Whole(logits, held, factor, d.temperature)

    def read(self) -> dict[str, float]:
        """The mean divergence of the step's tokens, in nats, and where hidden states are learned their distance, and
        forget both; collective, the same on every rank."""
        from mbx.models.megatron.core.groups import parallel_state as ps

        device = next(self.students[0].parameters()).device
        total = torch.stack([torch.zeros(2, device=device), *self._sums]).sum(0)
        self._sums.clear()
        torch.distributed.all_reduce(total, group=ps.get_data_parallel_group(with_context_parallel=True))
        torch.distributed.all_reduce(total, group=ps.get_pipeline_model_parallel_group())
        beside = {} if self.hidden is None else self.hidden.read()
        return {"distill_kl": float(total[0] / total[1].clamp(min=1)), **beside}


def _told(batch: Batch) -> Top:
    """What rows from the disk say of a micro-batch, in the order of its logits."""
    tokens, logprobs, rest = (batch[HEARD + name] for name in ("tokens", "logprobs", "rest"))
    assert tokens is not None and logprobs is not None and rest is not None
    tokens, logprobs = (part.transpose(0, 1).flatten(0, 1) for part in (tokens.long(), logprobs))
    return Top(tokens, logprobs, rest.t().reshape(-1))
