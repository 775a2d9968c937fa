"""Where the workers' time goes: one conversion in this process, with a clock around each stage.

python -m benchmarks.stages OUT.json ARGUMENTS_OF_MBX…
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import converters.casts
import converters.codecs.decode
import converters.engine.reading
import converters.engine.relay
import converters.engine.stream
from mbx.cli import main
from mbx.formats.files import FileSink, FileSource


class Clock:
    """Seconds and bytes by stage, summed over threads; a stage within another counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.nbytes: dict[str, int] = {}
        self._lock = threading.Lock()
        self._inner = threading.local()

    def around(self, stage: str, call: Callable[..., Any], size: Callable[..., int]) -> Callable[..., Any]:
        """`call`, timed; `size` gives its bytes from its arguments."""

        def timed(*arguments: Any, **named: Any) -> Any:
            before = getattr(self._inner, "seconds", 0.0)
            self._inner.seconds = 0.0
            start = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                taken = time.perf_counter() - start
                own = taken - self._inner.seconds
                self._inner.seconds = before + taken
                with self._lock:
                    self.seconds[stage] = self.seconds.get(stage, 0.0) + own
                    self.nbytes[stage] = self.nbytes.get(stage, 0) + size(*arguments)

        return timed


def run(arguments: list[str]) -> dict[str, object]:
    """Convert, and tell where the time went."""
    clock, stream = Clock(), converters.engine.stream
    patches: list[tuple[Any, str, Any]] = [
        (FileSource, "read_into", clock.around("read", FileSource.read_into, lambda s, f, at, data: len(data))),
        (FileSink, "write", clock.around("write", FileSink.write, lambda s, f, at, data: len(data))),
        (FileSink, "sync", clock.around("flush", FileSink.sync, lambda s: 0)),
        *(
            (module, "crc32", clock.around("checksum", module.crc32, lambda data, *_: len(data)))
            for module in (stream, converters.engine.relay)
        ),
        (stream, "convert", clock.around("cast", converters.casts.convert, lambda data, *_: data.nbytes)),
        (stream, "overflown", clock.around("cast", converters.casts.overflown, lambda data, *_: 0)),
        (
            converters.engine.reading,
            "read_decoded",
            clock.around("decode", converters.codecs.decode.read_decoded, lambda *_: 0),
        ),
    ]
    work = stream.Engine.work
    engine: dict[str, float] = {}

    def timed_work(self: Any, *rest: Any) -> None:
        start = time.perf_counter()
        work(self, *rest)
        engine["wall"], engine["workers"] = time.perf_counter() - start, self.workers

    patches.append((stream.Engine, "work", timed_work))
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    start, before = time.perf_counter(), os.times()
    try:
        for owner, name, value in patches:
            setattr(owner, name, value)
        code = main(arguments)
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)
    after = os.times()
    if code:
        raise SystemExit(code)
    return {
        "seconds": time.perf_counter() - start,
        "user_s": after.user - before.user,
        "system_s": after.system - before.system,
        "engine_s": engine["wall"],
        "workers": engine["workers"],
        "stages": {name: {"seconds": s, "bytes": clock.nbytes[name]} for name, s in clock.seconds.items()},
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(run(sys.argv[2:])), encoding="utf-8")
