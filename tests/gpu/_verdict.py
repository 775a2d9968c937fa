"""One rule for all forward figures: passed, or failed and why."""

from __future__ import annotations

from typing import Any

TOLERANCE = 1e-4
#: What rounding moves logits by at most. Where two devices differ by more, one chose other tokens or experts among
#: those whose scores are next to equal, and says nothing of rounding.
ROUNDING = 1e-2
#: How far above the limit the planted defect must stand, so that a limit cannot hide one.
MARGIN = 100


def limit_of(found: dict[str, Any]) -> float:
    """The tolerance, or what Transformers differs from itself by between CPU and GPU where that is more.

    Gated delta nets differ by about 3e-4 there in fp32: no comparison of two implementations can be finer than one
    implementation is with itself.
    """
    noise = found.get("transformers_between_devices", {}).get("max_abs") or 0.0
    return max(TOLERANCE, noise if noise < ROUNDING else 0.0)


def judge(found: dict[str, Any], device: str) -> None:
    """Set `status` of a family whose figures are complete.

    Both implementations must agree on the same device within `limit_of`; across devices the figure is recorded and
    not judged. The planted defect must be seen.
    """
    figures, control = found.get(f"against_transformers_on_{device}"), found.get("control")
    if figures is None or control is None:
        return
    found.pop("reason", None)
    limit = limit_of(found)
    seen = control["max_abs"] is None or control["max_abs"] > MARGIN * limit
    agrees = figures["max_abs"] is not None and figures["max_abs"] <= limit
    found["status"] = "passed" if agrees and seen else "failed"
    if not agrees:
        found["reason"] = f"max |Δlogit| {figures['max_abs'] or float('nan'):.2e}, over the limit of {limit:.1e}"
    elif not seen:
        found["reason"] = "the negative control was not seen"
