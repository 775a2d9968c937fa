"""Pictures within a prompt: what Transformers' class takes of them, and what its tower makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


#: Layers in which tokens of one picture see each other.
WINDOWED, EVERY = "windowed", "every"


@dataclass(frozen=True, slots=True)
class Pictures:
    """The pictures of a one-row pass: `token` stands in its ids for each of their features, one run for a picture.

    `inputs` are what Transformers' class takes beside ids. Tokens of one picture see each other where `two_way`: in
    WINDOWED layers or in EVERY one. Where `under`, inputs that layers have of their own are for a picture's tokens
    those of the pass's first token.
    """

    token: int
    inputs: Mapping[str, torch.Tensor]
    two_way: str = ""
    under: bool = False

    def places(self, ids: torch.Tensor) -> torch.Tensor:
        """Which tokens of `ids: [b, s]` stand for a picture: [b, s], bool."""
        return ids == self.token

    def numbers(self, ids: torch.Tensor) -> torch.Tensor:
        """Which picture each token of `ids: [b, s]` belongs to, from 0; -1 for none: [b, s]."""
        import torch

        here = self.places(ids)
        starts = here & ~torch.nn.functional.pad(here, (1, 0))[:, :-1]
        return torch.where(here, starts.long().cumsum(-1) - 1, -1)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a tower made of a pass's pictures, in the order of their tokens.

    `features: [n, hidden]` stand for the embeddings; `deepstack` of the same shape are added behind the first layers
    in turn; `positions: [3, b, s]` count time, height and width, None where pictures are counted like text.
    """

    features: torch.Tensor
    deepstack: tuple[torch.Tensor, ...] = ()
    positions: torch.Tensor | None = None

    def on_cpu(self) -> Seen:
        """The same on the CPU, features in fp32."""
        positions = None if self.positions is None else self.positions.cpu()
        return Seen(self.features.float().cpu(), tuple(part.float().cpu() for part in self.deepstack), positions)
