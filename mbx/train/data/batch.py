"""A micro-batch: rows as tensors on a device, and the step that turns them into losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from mbx.models.pictures import Pictures
from mbx.train.model.build import unwrap
from mbx.train.model.parallel import Ranks
from mbx.train.model.sight import PIXELS

if TYPE_CHECKING:
    from torch import nn

    from mbx.models.megatron.core.beside import Beside
    from mbx.train.data.rows import Row
    from mbx.train.distill.teaching import Teaching
    from mbx.train.model.sight import Seeing, Sight

Batch = Mapping[str, "torch.Tensor | None"]
#: In front of the names of what a teacher says of each token: [b, s, k], the rest [b, s].
HEARD = "heard_"
_HEARD = ("tokens", "logprobs", "rest")


def forward_step(
    batches: Iterator[Batch],
    model: nn.Module,
    *,
    beside: Beside,
    seeing: Seeing | None = None,
    learn: Callable[[torch.Tensor, Batch], torch.Tensor] | None = None,
    teaching: Teaching | None = None,
) -> tuple[torch.Tensor, Callable[..., object]]:
    """One micro-batch: per-token losses [b, s], and how to reduce them.

    What Megatron Core computes `beside` them (prediction layers, balance losses) sees the same masks. `seeing` has the
    tower for the images of a micro-batch, `teaching` a teacher that the losses are mixed with. `learn` puts losses in
    the place of these.
    """
    batch, bare = next(batches), unwrap(model)
    looking = nullcontext() if seeing is None else seeing.passing(bare, batch)
    hearing = nullcontext() if teaching is None else teaching.passing(bare, batch)
    with beside.passing(batch["padding"], batch["owner"]), looking, hearing:
        output = model(**arguments_of(batch, bare, beside))
    if teaching is not None:
        output = teaching.handed_on(bare, output)
    mask = batch["mask"]
    assert mask is not None

    def reduce(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        wide = losses.float().view(mask.shape)
        wide = wide if learn is None else learn(wide, batch)
        total = torch.sum(wide.view(-1) * mask.view(-1))
        tokens = mask.sum()
        return total, tokens.to(torch.int), {"loss": torch.stack((total.detach(), tokens))}

    return output, reduce


def arguments_of(batch: Batch, model: nn.Module, beside: Beside) -> dict[str, object]:
    """What a bare `model` is called with on a micro-batch, whose masks are those that `beside` knows it to take."""
    named = {
        "input_ids": "tokens",
        "position_ids": "positions",
        "attention_mask": "attention_mask",
        "labels": "labels",
    }
    arguments: dict[str, object] = {name: batch[key] for name, key in named.items()}
    if (ends := batch["cu_seqlens"]) is not None:
        from mbx.models.megatron.core.groups import PackedSeqParams

        longest = batch["longest"]
        assert longest is not None
        arguments["packed_seq_params"] = PackedSeqParams(
            "thd", ends, ends, max_seqlen_q=int(longest), max_seqlen_kv=int(longest)
        )
    mask = batch["mask"]
    assert mask is not None
    return arguments | beside.masks(model, mask, batch["padding"])


def to_device(
    rows: list[Row],
    ranks: Ranks,
    cp: int,
    sight: Sight | None = None,
    images: Mapping[str, torch.Tensor] | None = None,
) -> Batch:
    """A micro-batch as tensors [b, s]; packed rows as one long row with `cu_seqlens`, or with a mask where the
    local attention has no such kernel. `padding` [b, s] is True on padding, `owner` [b, s] numbers the segments of
    packed rows; either is None where there is none. With `sight`, `axes` [3, b, s] are positions where images have
    them, and `images`, what a tower takes of those of the rows, are there under PIXELS and their own names. Rows that
    say what a teacher thinks of them have that under HEARD.

    Copies to a GPU leave from pinned memory and are not waited for: a wait in front of each micro-batch drains the
    GPU's queue, which cost 5 % of a step in FP8 at the 1B shape. `longest` stays on the CPU for the same reason.
    """
    import numpy as np

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if ranks.device == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(ranks.device, non_blocking=True)

    def stack(name: str) -> torch.Tensor:
        return move(torch.from_numpy(np.stack([getattr(row, name) for row in rows])))

    batch = {name: stack(name) for name in ("tokens", "labels", "mask", "positions")}
    heard = [row.heard for row in rows if row.heard is not None]
    if heard:
        batch |= {HEARD + n: move(torch.from_numpy(np.stack([getattr(one, n) for one in heard]))) for n in _HEARD}
    extra: dict[str, torch.Tensor | None] = dict.fromkeys(("attention_mask", "cu_seqlens", "longest"))
    at = np.arange(len(rows[0].tokens))
    if any(row.filled is not None for row in rows):
        batch["padding"] = move(
            torch.from_numpy(np.stack([at >= (len(at) if row.filled is None else row.filled) for row in rows]))
        )
    if rows[0].lengths:
        batch["owner"] = move(
            torch.from_numpy(np.stack([np.repeat(np.arange(len(r.lengths)), r.lengths) for r in rows]))
        )
    if rows[0].lengths:
        lengths = np.concatenate([np.asarray(row.lengths, np.int64) for row in rows])
        if ranks.te:
            ends = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
            extra |= {"cu_seqlens": move(torch.from_numpy(ends)), "longest": torch.tensor(lengths.max())}
            batch = {name: tensor.view(1, -1, *tensor.shape[2:]) for name, tensor in batch.items()}
        else:
            owner, later = batch["owner"], torch.ones(len(at), len(at), dtype=torch.bool).triu(1)
            hidden = (owner[:, :, None] != owner[:, None, :]) | later.to(owner.device)
            extra["attention_mask"] = hidden[:, None]  # [b, 1, s, s], True is hidden
    if sight is not None:
        seen = _axes(rows) | {PIXELS + name: value for name, value in (images or {}).items()}
        extra |= {name: move(tensor) for name, tensor in seen.items()}
        if sight.two_way:
            extra["attention_mask"] = _two_way(batch, sight.token, extra["attention_mask"])
    if cp > 1:
        from mbx.models.megatron.core.groups import get_batch_on_this_cp_rank

        batch = get_batch_on_this_cp_rank(batch)
    return {"padding": None, "owner": None, "axes": None} | batch | extra


def _axes(rows: list[Row]) -> dict[str, torch.Tensor]:
    """Positions of rows by axes, [3, b, s], where any has them."""
    import numpy as np

    if all(row.axes is None for row in rows):
        return {}
    plain = [np.broadcast_to(row.positions, (3, len(row.positions))) for row in rows]
    axes = [own if row.axes is None else row.axes for row, own in zip(rows, plain, strict=True)]
    return {"axes": torch.from_numpy(np.stack(axes, axis=1))}


def _two_way(batch: Mapping[str, torch.Tensor], token: int, hidden: torch.Tensor | None) -> torch.Tensor:
    """`hidden` [b, 1, s, s], causal where it is None, in which the tokens of one image do not hide from each other."""
    tokens, padding = batch["tokens"], batch.get("padding")
    if hidden is None:
        length = tokens.shape[1]
        hidden = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)[None, None]
    numbers = Pictures(token, {}).numbers(tokens if padding is None else tokens.masked_fill(padding, -1))
    same = (numbers[:, :, None] == numbers[:, None]) & (numbers[:, :, None] >= 0)
    return hidden & ~same[:, None]
