"""Values for parameters that hold codes: kept until a parameter has all of its own, and quantised by it then."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext

import torch

from converters.errors import UnsupportedError
from mbx.live.shards import Shard, Views, is_quantised, view_of_shard

#: The chunk and the name of a parameter.
_Place = tuple[int, str]


class Staging:
    """Where shards are written to, each as often as `writes` names it: live memory, or what stands for it.

    Transformer Engine's FP8 parameters have no memory of their own dtype. A plain tensor stands for one from its first
    write to its last, behind which the parameter quantises it in place, by `copy_`, as when Megatron Core loads it.
    Raises UnsupportedError for parameters whose scales do not follow from the values that they are given.
    """

    def __init__(self, views: Views, writes: Iterable[Shard]) -> None:
        self._views, self._left = views, Counter[_Place]()
        self._staged: dict[_Place, torch.Tensor] = {}
        self._lock = threading.Lock()
        for shard in writes:
            if self.stands_for(shard):
                _check_scaling(shard.name, views.parameter(shard))
                self._left[shard.chunk, shard.name] += 1

    def stands_for(self, shard: Shard) -> bool:
        """Whether a shard lies in a parameter that holds codes."""
        return is_quantised(self._views.owner(shard))

    def memory(self, shard: Shard) -> torch.Tensor:
        """A shard in its `sizes`, to write into."""
        if not self.stands_for(shard):
            return self._views.memory(shard)
        owner, place = self._views.parameter(shard), (shard.chunk, shard.name)
        with self._lock:
            if place not in self._staged:
                self._staged[place] = torch.zeros(owner.shape, dtype=owner.dtype, device=owner.device)
            return view_of_shard(self._staged[place], shard)

    def wrote(self, shard: Shard) -> None:
        """One write of a shard is done."""
        if not self.stands_for(shard):
            return
        place = shard.chunk, shard.name
        with self._lock:
            self._left[place] -= 1
            whole = None if self._left[place] else self._staged.pop(place)
        if whole is not None:  # threads of an engine begin on the first GPU
            with torch.no_grad(), torch.cuda.device(whole.device) if whole.is_cuda else nullcontext():
                _fill(self._views.parameter(shard), whole)


def _fill(parameter: torch.Tensor, values: torch.Tensor) -> None:
    """Quantise values in place; and where a parameter still has those that it was drawn with, for an optimizer that
    will begin its own copy with them, these."""
    parameter.copy_(values)
    drawn = getattr(parameter, "get_high_precision_init_val", None)
    if drawn is not None and (first := drawn()) is not None:
        first.copy_(values)


def _check_scaling(name: str, parameter: torch.Tensor) -> None:
    """UnsupportedError unless a parameter finds its scales itself when it is given values."""
    quantizer = getattr(parameter, "_quantizer", None)
    if quantizer is None or type(quantizer).__name__ == "Float8Quantizer":
        why = "has no quantiser" if quantizer is None else "has delayed scaling, whose scale is of earlier steps"
        raise UnsupportedError(
            f"`{name}` is an FP8 parameter that {why}: values cannot be written to it",
            hint="load before the parameters are made FP8, or through Megatron Core; blockwise, MXFP8 and current "
            "scaling take values",
        )
