"""What the engine's threads are started with, and how many by default."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from converters.engine.threads import lean_threads, start
from converters.errors import DeviceError
from mbx.cli import settings

ROOT = Path(__file__).resolve().parents[2]


def test_threads_within_work_alone_and_those_after_as_before() -> None:
    before, stack = torch.get_num_threads(), threading.stack_size()
    torch.set_num_threads(2)
    try:
        seen: list[int] = []
        with lean_threads(torch_too=True):
            thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            start(thread)
            thread.join()
        assert seen == [1] and torch.get_num_threads() == 2 and threading.stack_size() == stack
        with lean_threads(torch_too=False):
            assert torch.get_num_threads() == 2 and threading.stack_size() != stack
    finally:
        torch.set_num_threads(before)


def test_a_thread_that_cannot_start_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(DeviceError, match="can't start new thread") as caught:
        start(threading.Thread(name="mbx-3"))
    assert "mbx-3" in caught.value.fact and "‹workers›" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 4), ("150000 100000", 2), ("50000 100000", 1), ("900000 100000", 4), ("", 4), (None, 4)],
)
def test_processors_are_those_this_process_may_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: str | None, cores: int
) -> None:
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(settings, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 5})
    assert settings.usable_cores() == cores


#: Eight threads that each free 24 MiB and then 20; prints the MiB of anonymous memory that the process still holds.
FREEING = """
import sys, threading
from contextlib import nullcontext
import numpy as np
from converters.engine.threads import lean_threads

freed, leave = threading.Barrier(9), threading.Event()
def work():
    for mebibytes in (24, 20):
        np.ones(mebibytes << 20, np.uint8)
    freed.wait()
    leave.wait()
with lean_threads(torch_too=False) if sys.argv[1] == "lean" else nullcontext():
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    freed.wait()
    status = open("/proc/self/status").read()
    print(int(status.split("RssAnon:")[1].split()[0]) // 1024)
    leave.set()
    for thread in threads:
        thread.join()
"""


def _held(kind: str) -> int:
    words = [sys.executable, "-c", FREEING, kind]
    return int(subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library's allocator is not glibc's")
def test_what_workers_free_goes_back_to_the_kernel() -> None:
    assert _held("lean") < 64
    assert _held("plain") > 120, "glibc gives it back by itself, and nothing is tested"
