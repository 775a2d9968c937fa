"""What one side of a forward comparison computed: hidden states at every layer's border, and logits on demand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mbx.models.pictures import Seen

if TYPE_CHECKING:
    import torch

#: Names of the borders that belong to no layer.
EMBEDDING, FINAL = "embedding", "final norm"
#: Logits of a range of the vocabulary at every position: (first token, one past the last) → [positions, tokens], fp32.
Head = Callable[[int, int], "torch.Tensor"]


def layer_name(number: int) -> str:
    """What the border behind a layer is called, counted from 0 as checkpoints do."""
    return f"layer {number}"


@dataclass(slots=True)
class Trace:
    """Hidden states of one implementation on the CPU, in fp32.

    `hidden`: border → [positions, hidden], all passes one behind the other, in the order of the model. `head` makes
    the logits, a part of the vocabulary at a time, until `close` closes the files it reads. `seen`: what a tower made
    of each pass's pictures, None for a pass without.
    """

    hidden: dict[str, torch.Tensor]
    head: Head
    close: Callable[[], None] = lambda: None
    seen: tuple[Seen | None, ...] = ()


@dataclass(slots=True)
class Recorder:
    """Collects the hidden states of pass after pass."""

    parts: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def add(self, border: str, states: torch.Tensor) -> None:
        """Keep `states: [b, s, hidden]` of one pass."""
        self.parts.setdefault(border, []).append(states.detach().float().cpu().reshape(-1, states.shape[-1]).clone())

    def joined(self) -> dict[str, torch.Tensor]:
        """Every border's states of all passes: [positions, hidden]."""
        import torch

        return {border: torch.cat(parts) for border, parts in self.parts.items()}
