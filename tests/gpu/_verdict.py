"""One rule for all forward figures: passed, or failed and why."""

from __future__ import annotations

from typing import Any

TOLERANCE = 1e-4


def judge(found: dict[str, Any], device: str) -> None:
    """Set `status` of a family whose figures are complete.

    Both implementations must agree on the same device. Across devices Transformers differs from itself by more than
    the tolerance (2e-4 for gated delta nets), so that figure is recorded and not judged. The planted defect must be
    seen.
    """
    figures, control = found.get(f"against_transformers_on_{device}"), found.get("control")
    if figures is None or control is None:
        return
    found.pop("reason", None)
    found["status"] = "passed" if figures["ok"] and control["max_abs"] > TOLERANCE else "failed"
    if not figures["ok"]:
        found["reason"] = f"max |Δlogit| {figures['max_abs']:.2e}, over the limit"
    elif found["status"] == "failed":
        found["reason"] = "the negative control was not seen"
