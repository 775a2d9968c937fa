"""A process that reads hostile inputs one after another, watched: `true`, and a line of JSON each.

`python -m tests.attack._worker TARGET SEEDS WORK`, with a JSON list of mutants' numbers and corpus files on standard
input. It dies of what it cannot survive, and whoever started it counts that as a finding of the input it was at.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from converters.errors import MbxError
from tests.attack import _renderers
from tests.attack._mutations import copy_of, mutate
from tests.attack._targets import TARGETS, Target

#: Seconds that one input may take, and memory that all may take beside what imports take.
SECONDS = 20
MEMORY = 1 << 30
#: The module that templates are rendered in: the one program that mbx starts by itself.
RENDERER = "mbx.train.data.template_process"
_ENDS = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "os.spawn", "pty.spawn", "ctypes.dlopen"}
_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod"}
_CREATES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """An audit hook that notes what a reader of files has no business doing."""

    def __init__(self, work: Path, folder: Path) -> None:
        self.work, self.folder, self.seen, self.on = str(work) + os.sep, str(folder) + os.sep, list[str](), False
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[object, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, mode, flags = args
            writes = bool(flags & _CREATES) if isinstance(flags, int) else any(c in str(mode) for c in "wax+")
            if writes and path != os.devnull and not isinstance(path, int):
                self._check_path("open to write", path)
        elif event in _CHANGES:
            self._check_change(event, args)
        elif event == "exec":
            if getattr(args[0], "co_filename", "").startswith(self.folder):
                self.seen.append(f"ran code of {args[0]}")
        elif event == "subprocess.Popen":
            if RENDERER not in list(args[1]):  # type: ignore[call-overload]
                self.seen.append(f"started {args[1]}")
        elif event == "os.fork" and sys._getframe(1).f_code.co_filename == _renderers.__file__:
            pass  # in place of the program that mbx starts
        elif event in _ENDS or event.startswith("socket."):
            self.seen.append(f"{event} {args}")

    def _check_change(self, event: str, args: tuple[object, ...]) -> None:
        """The entries that a change touches; a link is itself one, and a descriptor was checked when it was opened."""
        paths = {"os.rename": args[:2], "os.link": args[1:2], "os.symlink": args[1:2]}.get(event, args[:1])
        for path in paths:
            if isinstance(path, int):
                continue
            head, tail = os.path.split(os.fsdecode(path))  # type: ignore[arg-type]
            at = args[-1] if isinstance(args[-1], int) and event in ("os.remove", "os.rmdir", "os.mkdir") else -1
            if at >= 0 and not os.path.isabs(head):
                head = f"/proc/self/fd/{at}/{head}"
            self._check_path(event, os.path.join(os.path.realpath(head), tail), follow=False)

    def _check_path(self, what: str, path: object, *, follow: bool = True) -> None:
        real = os.fsdecode(path)  # type: ignore[arg-type]
        real = os.path.realpath(real) if follow else real
        if not real.startswith(self.work):
            self.seen.append(f"{what}: {real}")


def attempt(calls: list[Callable[[], object]]) -> tuple[bool, str | None]:
    """What came of the calls: whether none was refused, and the traceback of an exception that is no MbxError."""
    accepted = True
    for call in calls:
        try:
            call()
        except MbxError as error:
            accepted = False
            if error.exit_code == MbxError.exit_code:
                return False, f"an MbxError of no kind: {error}"
        except Exception:
            return False, traceback.format_exc(limit=-8)[-3000:]
    return accepted, None


def limit_memory() -> int:
    """Hold this process to what it has now and MEMORY more; what it has now, in KiB of peak resident memory."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    for kind, field in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most = int(status[field].split()[0]) * 1024 + MEMORY
        resource.setrlimit(kind, (most, most))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def one(target: Target, seeds: Path, work: Path, number: int | Path, watch: Watch) -> dict[str, object]:
    """Make an input and read it: its line."""
    folder, out = copy_of(seeds / target.seed, work / "input"), work / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    if isinstance(number, Path):
        what = number.name
        at = next(path for path in target.chosen(folder) if _fits(path, number))
        at.write_bytes(number.read_bytes())
    else:
        what = mutate(number, folder, target.chosen(folder), work.parent / "outside" / "canary")
    began = time.perf_counter()
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    watch.seen.clear()
    watch.on = True
    try:
        accepted, wrong = attempt(list(target.calls(folder, out)))
    finally:
        watch.on = False
        faulthandler.cancel_dump_traceback_later()
    wrong = wrong or "; ".join(watch.seen) or None
    return {"what": what, "accepted": accepted, "wrong": wrong, "seconds": time.perf_counter() - began}


def _fits(path: Path, attack: Path) -> bool:
    """Whether a corpus file `STEM@anything.SUFFIX` stands for `path`."""
    return path.suffix == attack.suffix and path.name.partition(".")[0] == attack.name.partition("@")[0]


def main(name: str, seeds: Path, work: Path, numbers: list[int | Path]) -> None:
    """Read every input; a line each, after one for the valid folder, which must be accepted."""
    target, watch = TARGETS[name], Watch(work, work / "input")
    copy_of(seeds / target.seed, work / "input")
    (work / "out").mkdir()
    accepted, wrong = attempt(list(target.calls(work / "input", work / "out")))
    assert accepted and not wrong, f"the valid folder is refused: {wrong}"
    before = limit_memory()
    sys.stdout.write("true\n")
    sys.stdout.flush()
    for number in numbers:
        line = one(target, seeds, work, number, watch)
        line["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


def asked() -> tuple[str, Path, Path, list[int | Path]]:
    """What the command line and standard input ask for."""
    _, name, seeds, work = sys.argv
    return name, Path(seeds), Path(work), [one if isinstance(one, int) else Path(one) for one in json.load(sys.stdin)]


if __name__ == "__main__":
    main(*asked())
