"""The states of two models between the stages of a pipeline, as one tensor of both widths.

Megatron Core's schedules send and receive tensors of the width that their config says: for passes of both models it
says more, while the layers keep theirs. So 1F1B and interleaved stages run as they are.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch

if TYPE_CHECKING:
    from torch import nn

    from mbx.models.megatron.core.training import DistributedDataParallel


class SideBySide:
    """The `chunks` of a student and those of its teacher, one for one: the student's states come first."""

    def __init__(
        self, chunks: Sequence[DistributedDataParallel], students: Sequence[nn.Module], teachers: Sequence[nn.Module]
    ) -> None:
        self.chunks, self.width = chunks, int(teachers[0].config.hidden_size)  # type: ignore[union-attr, arg-type]
        self._both = False
        for chunk, student, teacher in zip(chunks, students, teachers, strict=True):
            chunk.config = copy.copy(chunk.config)  # the schedules': layers have the student's own
            self._part(student, teacher)

    def _part(self, student: nn.Module, teacher: nn.Module) -> None:
        """Let a stage take what is the student's of the states that it is given, and its teacher the rest."""
        plain, own = student.set_input_tensor, int(student.config.hidden_size)  # type: ignore[union-attr, arg-type]

        def take(states: torch.Tensor | list[torch.Tensor | None] | None) -> None:
            given = states[0] if isinstance(states, list) else states
            if given is not None and self._both:
                teacher.set_input_tensor(given[..., own:].detach().contiguous())  # type: ignore[operator]
                given = given[..., :own].contiguous()
            plain(given)  # type: ignore[operator]

        student.set_input_tensor = take  # type: ignore[assignment]

    @contextlib.contextmanager
    def widened(self) -> Iterator[None]:
        """Passes of a schedule in which both take part."""
        with contextlib.ExitStack() as undo:
            for chunk in self.chunks:
                undo.enter_context(patch.object(chunk.config, "hidden_size", chunk.config.hidden_size + self.width))
            undo.enter_context(patch.object(self, "_both", True))
            yield
