"""GPUs by name: what they hold and how fast they are, from NVIDIA's data sheets; and memory given as a size.

Dense TFLOP/s of bf16 products with fp32 sums, without sparsity. Memory in bytes as CUDA reports it or, where that was
not seen, 2 % less than what the card is sold with.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from converters.errors import UsageError
from mbx.text import near_miss, parse_size
from mbx.train.budget.predict import GIB
from mbx.train.recipe.sections import Recipe


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU. `unified`: the processor's memory is the same; `link`: GB/s between two of a host, one way.

    `tflops` 0 where only a size was given: nothing can be said of speed.
    """

    name: str
    memory: int
    tflops: float
    capability: tuple[int, int] | None
    link: float = 32.0
    unified: bool = False


def _sold(gib: float) -> int:
    return round(gib * 0.98 * GIB)


#: Data sheets: H100, H200, A100, B200, L40S, RTX 3090, 4090, 5090, RTX PRO 6000; GB10's 1 PFLOP of sparse FP4 is 125
#: dense of bf16. PCIe cards exchange 32 GB/s.
DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        Device("h200", round(139.8 * GIB), 989, (9, 0), 450),
        Device("h100", round(79.1 * GIB), 989, (9, 0), 450),
        Device("b200", _sold(180), 2250, (10, 0), 900),
        Device("a100-80", round(79.1 * GIB), 312, (8, 0), 300),
        Device("a100-40", round(39.4 * GIB), 312, (8, 0), 300),
        Device("l40s", round(44.9 * GIB), 362, (8, 9)),
        Device("rtx3090", round(23.6 * GIB), 71, (8, 6)),
        Device("rtx4090", round(23.6 * GIB), 165, (8, 9)),
        Device("rtx5090", round(31.4 * GIB), 209, (12, 0)),
        Device("rtx-pro-6000", _sold(96), 252, (12, 0)),
        Device("gb10", round(119.6 * GIB), 125, (12, 1), 25, unified=True),
    )
}
_OTHER_NAMES = {"dgxspark": "gb10", "spark": "gb10", "a100": "a100-80", "4090": "rtx4090", "3090": "rtx3090"}
_OTHER_NAMES |= {"5090": "rtx5090", "h10080": "h100", "h800": "h100"}


def device_of(text: str) -> Device:
    """The GPU `text` names, or one of that much memory: `24 GB` is a card sold with 24, `24GiB` is what is there."""
    word = re.sub(r"[\s_]+", "", text.strip().lower())
    plain = word.replace("-", "")
    plain = _OTHER_NAMES.get(plain, plain)
    if known := next((device for name, device in DEVICES.items() if name.replace("-", "") == plain), None):
        return known
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)gb", word):
        gib = float(found[1])
        if gib > 0:
            return Device(f"a GPU sold with {gib:g} GB", _sold(gib), 0, None)
    if re.match(r"\d", word):
        return Device(f"{text.strip()} of memory", parse_size(word), 0, None)
    hint = near_miss(word, [*DEVICES, *_OTHER_NAMES], f"known: {', '.join(DEVICES)}; or a size: 24 GB, 80GiB")
    raise UsageError(f"there is no device `{text}`", hint=hint)


def seen_as(name: str) -> Device | None:
    """A GPU by the name that CUDA has for it; None where it is not known."""
    plain = re.sub(r"[\s-]+", "", name.lower())
    known = {re.sub(r"-\d\d$", "", one).replace("-", ""): one for one in DEVICES} | _OTHER_NAMES
    return next((DEVICES[one] for word, one in known.items() if word in plain), None)


def peak_tflops(recipe: Recipe) -> float:
    """Peak TFLOP/s of this process's GPU at the recipe's precision; infinite, for an MFU of 0, if it is not known."""
    import torch

    if recipe.train.precision == "fp32":
        return math.inf
    device = seen_as(torch.cuda.get_device_name())
    peak = device.tflops if device else math.inf
    return peak * {"none": 1, "nvfp4": 4}.get(recipe.fp8.recipe, 2)
