"""A micro-batch: rows as tensors on a device, and the step that turns them into losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from mbx.train.model.build import unwrap
from mbx.train.model.parallel import Ranks

if TYPE_CHECKING:
    from torch import nn

    from mbx.models.megatron.core.beside import Beside
    from mbx.train.data.rows import Row

Batch = Mapping[str, "torch.Tensor | None"]


def forward_step(
    batches: Iterator[Batch], model: nn.Module, *, beside: Beside
) -> tuple[torch.Tensor, Callable[..., object]]:
    """One micro-batch: per-token losses [b, s], and how to reduce them.

    What Megatron Core computes `beside` them (prediction layers, balance losses) sees the same masks.
    """
    batch = next(batches)
    arguments: dict[str, object] = {}
    if batch["cu_seqlens"] is not None:
        from mbx.models.megatron.core.groups import PackedSeqParams

        ends, longest = batch["cu_seqlens"], batch["longest"]
        assert longest is not None
        arguments["packed_seq_params"] = PackedSeqParams(
            "thd", ends, ends, max_seqlen_q=int(longest), max_seqlen_kv=int(longest)
        )
    mask = batch["mask"]
    assert mask is not None
    arguments |= beside.masks(unwrap(model), mask, batch["padding"])
    with beside.passing(batch["padding"], batch["owner"]):
        output = model(
            batch["tokens"], batch["positions"], batch["attention_mask"], labels=batch["labels"], **arguments
        )

    def reduce(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        total = torch.sum(losses.view(-1).float() * mask.view(-1))
        tokens = mask.sum()
        return total, tokens.to(torch.int), {"loss": torch.stack((total.detach(), tokens))}

    return output, reduce


def to_device(rows: list[Row], ranks: Ranks, cp: int) -> Batch:
    """A micro-batch as tensors [b, s]; packed rows as one long row with `cu_seqlens`, or with a mask where the
    local attention has no such kernel. `padding` [b, s] is True on padding, `owner` [b, s] numbers the segments of
    packed rows; either is None where there is none.

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
            batch = {name: tensor.view(1, -1) for name, tensor in batch.items()}
        else:
            owner, later = batch["owner"], torch.ones(len(at), len(at), dtype=torch.bool).triu(1)
            hidden = (owner[:, :, None] != owner[:, None, :]) | later.to(owner.device)
            extra["attention_mask"] = hidden[:, None]  # [b, 1, s, s], True is hidden
    if cp > 1:
        from mbx.models.megatron.core.groups import get_batch_on_this_cp_rank

        batch = get_batch_on_this_cp_rank(batch)
    return {"padding": None, "owner": None} | batch | extra
