"""A teacher in memory: frozen, spread over the ranks as the student is, its pass in front of each of the student's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from mbx.train.data.batch import Batch, arguments_of
from mbx.train.model.build import build, unwrap
from mbx.train.model.parallel import Ranks
from mbx.train.model.teacher import Teacher
from mbx.train.model.weights import load_weights

if TYPE_CHECKING:
    from torch import nn


class LiveTeacher:
    """The chunks of a teacher that this rank holds, with their weights; `said` has a line on each. Collective."""

    def __init__(self, teacher: Teacher, ranks: Ranks) -> None:
        from mbx.models.megatron.core.beside import Beside

        self.chunks: Sequence[nn.Module] = [unwrap(one) for one in build(teacher.recipe, teacher.plan, ranks)]
        self.beside, self.said = Beside(), list[str]()
        self._logits: torch.Tensor | None = None
        for chunk in self.chunks:
            chunk.eval()
            chunk.requires_grad_(False)
            self.said.append(f"teacher: {load_weights(chunk, teacher.plan, teacher.source)}")
            self.beside.watch(chunk)
            chunk.compute_language_model_loss = self._keep  # type: ignore[assignment]  # in the place of a loss

    @property
    def hidden(self) -> int:
        """Width of the states that its stages hand on."""
        return int(self.chunks[0].config.hidden_size)  # type: ignore[union-attr, arg-type]

    def _keep(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        self._logits = logits
        return labels

    @torch.no_grad()
    def passed(self, number: int, batch: Batch) -> torch.Tensor:
        """A micro-batch through a chunk: states [s, b, hidden], behind the last one logits [s, b, columns here]."""
        chunk = self.chunks[number]
        with self.beside.passing(batch["padding"], batch["owner"]):
            states: torch.Tensor = chunk(**arguments_of(batch, chunk, self.beside))
        if self._logits is None:
            return states
        logits, self._logits = self._logits, None
        return logits
