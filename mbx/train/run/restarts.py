"""A run that starts again within its processes after a fault, by NVIDIA's resiliency extension (extra `resiliency`).

Its wrapper watches every rank; where one raises, or stands still, it interrupts the others, ends their process groups
and calls the run again on all. That saves starting Python and the libraries, and the place in a queue. Where a process
is gone, or the starts are used up, the run ends, and what started the processes may start them anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Generic, TypeVar

from converters import errors
from converters.errors import DeviceError, MbxError, UsageError
from mbx.train.recipe.sections import Recipe
from mbx.train.run.stragglers import check_extension

#: Seconds between a rank that stands still and its restart, beyond what a rank waits for another; and to its end.
_SLACK_S, _GRACE_S = 30, 30
#: Where the store, which outlives a start, has the error that ends the run.
_LAST = "mbx/last"
_T = TypeVar("_T")


class _Ended(Generic[_T]):
    """How a start ended that is the last one: with a result, or an error."""

    def __init__(self, result: _T | None = None, error: Exception | None = None) -> None:
        self.result, self.error = result, error


def check_restarts(restarts: int) -> None:
    """UsageError where nothing would start a run again; 0 asks for nothing."""
    if not restarts:
        return
    check_extension(f"{restarts} restarts within the processes are asked for")
    if missing := [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UsageError(
            f"restarts within the processes are for ranks that meet, and {missing[0]} is not set",
            hint="torchrun starts them, with one process as well",
        )


def restarted(recipe: Recipe, restarts: int, run: Callable[[int], _T]) -> _T:
    """What `run` gives, called with 0, and behind each fault of a rank with the next number, `restarts` times at most.

    A DeviceError and whatever else is no word of the house count as faults; another MbxError, which a further start
    would meet again, is raised by all ranks, whichever met it. The last fault is raised where the restarts are used
    up, or a process is gone. Collective; no process group may be there yet.
    """
    import nvidia_resiliency_ext.inprocess as inprocess  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from nvidia_resiliency_ext.inprocess.monitor_thread import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
        RankShouldRestart,
    )

    waits = recipe.run.timeout_s + _SLACK_S
    port, faults = int(os.environ["MASTER_PORT"]), list[Exception]()

    def start(call: Any = None) -> _Ended[_T]:
        # the others of a rank that cannot go on wait for it in a collective: it interrupts them, and all end here; in
        # one of gloo, which cannot be broken off, they wait until run.timeout_s first
        if (last := _said(call.base_store)) is not None:
            return _Ended(error=last)
        if call.iteration > restarts:
            used_up = DeviceError(f"another rank failed, and the {restarts} restarts are used up")
            return _Ended(error=faults[-1] if faults else used_up)
        if call.iteration:  # a store that no earlier start has left anything in
            os.environ |= {"MASTER_PORT": str(port + 1 + call.iteration), "TORCHELASTIC_USE_AGENT_STORE": "False"}
        try:
            return _Ended(run(call.iteration))
        except Exception as error:
            if (interrupted := _within(error, RankShouldRestart)) is not None:
                raise interrupted from None
            faults.append(error)
            if isinstance(error, MbxError) and not isinstance(error, DeviceError):
                _say(call.base_store, error)
            raise

    start.__annotations__["call"] = inprocess.CallWrapper  # by which the wrapper finds what it is to give
    wrapper = inprocess.Wrapper(
        store_kwargs={"port": port + 1},
        initialize=inprocess.initialize.RetryController(
            max_iterations=restarts + 2,  # the last one says how the run ended
            min_world_size=int(os.environ["WORLD_SIZE"]),
        ),
        soft_timeout=timedelta(seconds=waits),
        hard_timeout=timedelta(seconds=waits + _GRACE_S),
        barrier_timeout=timedelta(seconds=waits + 2 * _GRACE_S),
        completion_timeout=timedelta(seconds=waits + 2 * _GRACE_S),
    )
    try:
        ended: _Ended[_T] = wrapper(start)()
    except inprocess.exception.RestartAbort as error:
        known = faults[-1] if faults else None
        raise known or DeviceError("the process of another rank is gone") from error
    if ended.error is not None:
        raise ended.error
    assert ended.result is not None
    return ended.result


def _say(store: Any, error: MbxError) -> None:
    """Leave the error that ends the run to all ranks, by the nearest kind of the house; of several the first stays."""
    kind = next(one.__name__ for one in type(error).__mro__ if getattr(errors, one.__name__, None) is one)
    store.compare_set(_LAST, "", json.dumps([kind, error.fact, error.hint, error.details]))


def _said(store: Any) -> MbxError | None:
    """The error that a rank left."""
    if not store.check([_LAST]):
        return None
    kind, fact, hint, details = json.loads(store.get(_LAST))
    found: MbxError = getattr(errors, kind)(fact, hint=hint, details=details)
    return found


def _within(error: BaseException, kind: type[BaseException]) -> BaseException | None:
    """What of a `kind` an error came upon: another rank's fault interrupts this one anywhere, and its groups are gone
    by then, so that what is closed on the way out may fail over it."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, kind):
        seen = seen.__context__
    return seen
