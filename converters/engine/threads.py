"""How worker threads are started: lean, and with freed memory given back."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

from converters.errors import DeviceError

#: Enough for a codec's calls into torch.
_STACK_BYTES = 2 << 20
#: Parameters of glibc's `mallopt` (malloc.h) and what they are set to. Scratch of codecs and casts, up to 4 MiB, is
#: kept; larger matrices go back to the kernel at once, and two arenas serve all threads.
_MALLOPT = {"M_ARENA_MAX": (-8, 2), "M_MMAP_THRESHOLD": (-3, 4 << 20), "M_TRIM_THRESHOLD": (-1, 16 << 20)}


@contextmanager
def lean_threads(*, torch_too: bool) -> Iterator[None]:
    """Threads started within get small stacks and, with `torch_too`, do torch's work alone.

    A hard limit on memory counts stacks at their whole size, 8 MiB by default. And torch would start a team of one
    thread a processor for each of ours: workers times processors in all, which stand in each other's way.
    """
    _bound_allocator()
    stack = threading.stack_size(_STACK_BYTES)
    teams = 0
    if torch_too:
        import torch

        teams = torch.get_num_threads()
        torch.set_num_threads(1)
    try:
        yield
    finally:
        threading.stack_size(stack)
        if teams:
            torch.set_num_threads(teams)


@lru_cache(maxsize=1)
def _bound_allocator() -> None:
    """Have freed memory given back: MXFP4 by 16 workers held 893 MiB where their share was 256, and now 273.

    By default each thread has an arena of its own, and glibc keeps in it what was freed, up to 32 MiB a matrix. Other
    C libraries have no such call.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        for number, value in _MALLOPT.values():
            mallopt(number, value)


def start(thread: threading.Thread) -> None:
    """Start a thread; DeviceError where the limit on memory or on threads leaves no room for it."""
    try:
        thread.start()
    except RuntimeError as error:
        raise DeviceError(
            f"{thread.name}: {error}", hint="lower ‹workers›, or raise the limit (ulimit -d, -u)"
        ) from error


def run_threads(work: Callable[[threading.Event], None], count: int, name: str, *, torch_too: bool) -> None:
    """Run `work` in `count` lean threads; the first failure of any sets the event that all get, and is raised."""
    failures, stop = list[BaseException](), threading.Event()

    def guarded() -> None:
        try:
            work(stop)
        except BaseException as error:  # handed to the caller below
            failures.append(error)
            stop.set()

    threads = [threading.Thread(target=guarded, name=f"{name}-{n}", daemon=True) for n in range(count)]
    try:
        with lean_threads(torch_too=torch_too):
            for thread in threads:
                start(thread)
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)
    except BaseException:
        stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        raise
    if failures:
        raise failures[0]
