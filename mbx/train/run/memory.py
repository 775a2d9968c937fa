"""What a run says about memory: predicted beside measured, and why it ran out."""

from __future__ import annotations

import torch

from converters.errors import DeviceError, UnsupportedError
from mbx.train.budget.predict import GIB, lines, predict, suggestions
from mbx.train.run.log import Log
from mbx.train.run.prepare import Prepared


def compare(prepared: Prepared, log: Log) -> None:
    """Log predicted beside measured peak memory of a GPU."""
    if prepared.ranks.device != "cuda":
        return
    try:
        predicted = predict(prepared.recipe, prepared.plan, prepared.ranks.dp, prepared.looks).total
    except UnsupportedError as error:
        log.message(error.fact)
        return
    measured = torch.cuda.max_memory_allocated()
    log.note(kind="memory", predicted_bytes=predicted, measured_bytes=measured)
    log.message(
        f"peak memory {measured / GIB:.2f} GiB, predicted {predicted / GIB:.2f} ({predicted / measured - 1:+.1%})"
    )


def peak_gib(device: str) -> float:
    """Peak memory of this process in GiB: the GPU's since the loop began, or the process's resident set."""
    import resource

    if device == "cuda":
        return float(torch.cuda.max_memory_allocated()) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def explain(prepared: Prepared, error: BaseException) -> DeviceError:
    """An out-of-memory error as a fact: what was predicted, what is there, and what would help."""
    free, total = torch.cuda.mem_get_info()
    reached = torch.cuda.max_memory_allocated()
    try:
        budget = predict(prepared.recipe, prepared.plan, prepared.ranks.dp, prepared.looks)
    except UnsupportedError as unknown:
        return DeviceError(
            f"out of memory on a GPU of {total / GIB:.0f} GiB: {reached / GIB:.1f} GiB were reached",
            details=[unknown.fact, str(error)],
        )
    tips = suggestions(prepared.recipe, prepared.plan, prepared.ranks.dp, prepared.looks)
    if budget.total > total:
        why = (
            f"the budget of {budget.total / GIB:.1f} GiB exceeds this GPU: the batch or the model is too large for it"
        )
    elif total - free - torch.cuda.memory_reserved() > 2 * GIB:
        why = f"{(total - free - torch.cuda.memory_reserved()) / GIB:.1f} GiB of this GPU are held by other processes"
    else:
        why = f"{reached / GIB:.1f} GiB were reached, the budget was {budget.total / GIB:.1f} GiB: a part outgrew it"
    return DeviceError(
        f"out of memory on a GPU of {total / GIB:.0f} GiB: {why}",
        hint=f"{tips[0][0]} would save {tips[0][1] / GIB:.1f} GiB" if tips else None,
        details=[*lines(budget, tips), str(error)],
    )
