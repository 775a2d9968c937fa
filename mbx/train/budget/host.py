"""Memory of the processor that a rank of a run needs, in bytes."""

from __future__ import annotations

from collections.abc import Mapping

from mbx.train.budget.load import BYTES
from mbx.train.budget.predict import Budget
from mbx.train.recipe.sections import Recipe

#: Assumed, not measured on a GPU: 0.4 GiB are resident once a tiny model trained on a CPU, and CUDA's libraries add.
LIBRARIES = 1 << 30
#: What reading weights holds at most (`converters.engine`, its default).
READING = 1 << 30


def host_memory(recipe: Recipe, budget: Budget) -> dict[str, int]:
    """Parts by name. A checkpoint is copied here whole before it is written, also where nothing is asynchronous."""
    parts = {"libraries": LIBRARIES, "reading weights": READING}
    if recipe.run.save:
        c = budget.counts
        weights = (c.adapters + c.whole if recipe.lora.rank else c.base) * BYTES[recipe.train.precision]
        state = budget.parts.get("optimizer", 0) if recipe.run.save_optimizer else 0
        parts["checkpoint"] = weights + state
    return parts


def page_cache(recipe: Recipe, budget: Budget) -> int:
    """Bytes of weights that pass through the page cache as a run starts; the kernel gives them back when asked."""
    pretrained = recipe.model.path and recipe.model.init == "pretrained"
    return (budget.counts.base * BYTES[recipe.train.precision] if pretrained else 0) + budget.parts.get("teacher", 0)


def total(parts: Mapping[str, int]) -> int:
    """Bytes of all parts that may be there at once: reading ends before the first checkpoint."""
    later = max(parts.get("reading weights", 0), parts.get("checkpoint", 0))
    return parts["libraries"] + later
