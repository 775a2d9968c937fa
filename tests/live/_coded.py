"""What ranks do with exports in the parts of a codec; findings as JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from _jobs import BUCKET, Found, attached
from _models import read_folder, same_bytes

from converters.errors import StorageError
from mbx.live import Live
from mbx.live.codes import CODECS, Codec
from mbx.models.device import Spread

#: Families whose second layer has an MLP.
DENSE = ("llama", "wide")


def coded(codec: Codec) -> Callable[[str, Spread, Path], Found]:
    def job(family: str, spread: Spread, work: Path) -> Found:
        """The stream in every direction against the folder that a conversion wrote, and the bytes that travel."""
        live = attached(work / family, spread, work)
        folder = read_folder(work / f"{family}.{codec}")
        own = {n: p.detach().clone() for chunk in live.chunks_kept for n, p in chunk.named_parameters()}  # type: ignore[attr-defined]
        specs = live.spec(codec=codec)
        found: Found = {"spec": [(spec.name, spec.dtype, list(spec.shape)) for spec in specs]}
        found["groups"] = [spec.group for spec in specs]
        odd, every = [], []
        last = torch.distributed.get_world_size() - 1
        for how in ({}, {"bucket": BUCKET}, {"bucket": BUCKET, "to": "stage"}, {"bucket": BUCKET, "to": last}, {}):
            pairs = list(live.export(codec=codec, **how))  # type: ignore[arg-type]
            every.append([name for name, _ in pairs])
            odd += [n for n, t in pairs if t is not None and (n not in folder or not same_bytes(t, folder[n]))]
            found.setdefault("received", []).append(sum(t is not None for _, t in pairs))  # type: ignore[attr-defined]
        found["names"], found["odd"] = every, odd
        some = dict(live.export(codec=codec, only=[spec.name for spec in specs][::3]))
        odd += [name for name, tensor in some.items() if tensor is None or not same_bytes(tensor, folder[name])]
        found["some"] = list(some)
        coding = live.coding(codec)
        found["counts"] = [len(coding.early), len(coding.late), len(coding.shared)]
        found["digests"] = live.digest(codec=codec)
        saved = work / f"{family}.{codec}.{'.'.join(f'{k}{v}' for k, v in spread.sizes.items() if v and v > 1)}"
        live.save(saved, codec=codec, bucket=BUCKET)
        found["saved"] = str(saved)
        found["plain_bytes"], found["coded_bytes"] = sent(live, None), sent(live, codec)
        found["kept"] = all(
            same_bytes(own[n], p)
            for chunk in live.chunks_kept  # type: ignore[attr-defined]
            for n, p in chunk.named_parameters()
        )
        found["reduced"], found["refused"] = poisoned(live, codec) if family in DENSE else (0, None)
        return found

    return job


def poisoned(live: Live, codec: Codec) -> tuple[int, str]:
    """How often ranks tell each other of values, and what an export says of one that is NaN on the last of them."""
    last = torch.distributed.get_world_size() - 1
    if torch.distributed.get_rank() == last:
        with torch.no_grad():
            live.model.chunks()[0].decoder.layers[1].mlp.linear_fc2.weight[3, 4] = torch.nan  # type: ignore[union-attr, index]
    with patch.object(torch.distributed, "all_reduce", wraps=torch.distributed.all_reduce) as counted:
        try:
            next(iter(live.export(codec=codec)))
        except StorageError as error:
            return counted.call_count, error.fact
    return counted.call_count, "nothing"


def sent(live: Live, codec: Codec | None) -> int:
    """Bytes that collectives of an export bring to this rank, its own part of them among these."""
    total = 0
    gather, broadcast = torch.distributed.all_gather_into_tensor, torch.distributed.broadcast

    def gathered(whole: torch.Tensor, mine: torch.Tensor) -> object:
        nonlocal total
        total += whole.nbytes
        return gather(whole, mine)

    def broadcasted(tensor: torch.Tensor, src: int) -> object:
        nonlocal total
        total += tensor.nbytes
        return broadcast(tensor, src=src)

    with (
        patch.object(torch.distributed, "all_gather_into_tensor", gathered),
        patch.object(torch.distributed, "broadcast", broadcasted),
    ):
        for _ in live.export(codec=codec):
            pass
    return total


CODED = {codec: coded(codec) for codec in CODECS}
