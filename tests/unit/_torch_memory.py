"""How much memory torch holds at most while something runs."""

from __future__ import annotations

from collections.abc import Callable


def peak_bytes(work: Callable[[], object]) -> int:
    """Largest sum of live CPU allocations while `work` runs, from torch's own profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        work()
    live = peak = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak
