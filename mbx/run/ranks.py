"""Several processes, on one host or many, that carry out one conversion: `torchrun … mbx`, `srun … mbx`.

They meet in `DST.partial/.mbx/` on the file system they share, and need no network of their own. Rank 0 opens the
folder and hands each process its pieces; each says now and then that it lives, and at the end that it has
finished; rank 0 then finishes the checkpoint. Every file is written under another name and renamed into place.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TypeVar

from converters.engine.pieces import Piece
from converters.errors import MbxError, StorageError, UsageError
from mbx.formats.files import os_failure
from mbx.run.journal import FOLDER

#: Seconds without a sign of life after which a process counts as dead, and to wait for all to appear.
TIMEOUT_S = 120.0
TIMEOUT_VARIABLE = "MBX_RANK_TIMEOUT"
_POLL_S = 0.05
#: The part of a share that it may be larger or smaller by, to end where a file does.
_UNEVEN = 0.125
#: Piece numbers as [first, behind last] ranges.
Share = list[tuple[int, int]]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class World:
    """This process's place: `rank` of `size`. `source` names the variable that says so."""

    rank: int = 0
    size: int = 1
    source: str = ""


ALONE = World()


def world(environment: Mapping[str, str]) -> World:
    """The place that torchrun or srun gives a process; alone without them.

    A batch script knows the number of its job's tasks without being one of them, so Slurm's variables count only
    inside a step (SLURM_STEP_ID), or where no job is named at all.
    """
    pairs = [("RANK", "WORLD_SIZE")]
    if "SLURM_STEP_ID" in environment or "SLURM_JOB_ID" not in environment:
        pairs += [("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"), ("SLURM_PROCID", "SLURM_NTASKS")]
    for rank, size in pairs:
        if rank in environment and size in environment:
            try:
                place = World(int(environment[rank]), int(environment[size]), size)
            except ValueError:
                raise UsageError(
                    f"{rank}={environment[rank]!r} {size}={environment[size]!r}: two numbers were expected"
                ) from None
            if not 0 <= place.rank < place.size:
                raise UsageError(f"{rank}={place.rank} is not one of {size}={place.size} processes")
            return place
    return ALONE


def shares(pieces: Sequence[Piece], size: int) -> list[Share]:
    """Cut `pieces`, in order, into `size` consecutive shares of about the same bytes.

    Consecutive, so that two processes meet in few files, and never in a page of one but at the edges; and between two
    files where one ends near the even cut, so that where files are many no two processes write into the same one.
    """
    starts = list(accumulate((piece.nbytes for piece in pieces), initial=0))
    total = starts.pop()
    edges = [n for n in range(1, len(pieces)) if pieces[n].file != pieces[n - 1].file]
    slack = total / size * _UNEVEN
    cuts = [0]
    for rank in range(1, size):
        even = total * rank / size
        near = [n for n in edges if abs(starts[n] - even) <= slack]
        cuts.append(min(near, key=lambda n: abs(starts[n] - even)) if near else bisect_left(starts, even))
    out: list[Share] = []
    for first, stop in pairwise([*cuts, len(pieces)]):
        share: Share = []
        for piece in pieces[first:stop]:
            if share and share[-1][1] == piece.number:
                share[-1] = (share[-1][0], piece.number + 1)
            else:
                share.append((piece.number, piece.number + 1))
        out.append(share)
    return out


def timeout_s() -> float:
    """Seconds to wait for another process: MBX_RANK_TIMEOUT, or two minutes."""
    text = os.environ.get(TIMEOUT_VARIABLE, str(TIMEOUT_S))
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise UsageError(f"{TIMEOUT_VARIABLE}={text!r} is not a number of seconds above 0")
    return value


class Team:
    """One process's view of all. `with` it: what ends the block by an error is told to the others."""

    def __init__(self, partial: Path, place: World) -> None:
        self.place, self.folder = place, partial / FOLDER
        self.nonce = uuid.uuid4().hex
        self._timeout = timeout_s()
        self._stop = threading.Event()
        self._seen: dict[int, tuple[str, float]] = {}
        self._lives = threading.Thread(target=self._live, name="mbx-alive", daemon=True)
        self._lost: str | None = None

    def __enter__(self) -> Team:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._stop.set()
        if self._lives.is_alive():
            self._lives.join()
        if error is not None and self.folder.is_dir():
            text = error.fact if isinstance(error, MbxError) else f"{type(error).__name__}: {error}"
            self._write("failed", self.place.rank, text)

    # --- meeting ------------------------------------------------------------------------------------------------

    def gather(self, digest: str) -> None:
        """Rank 0: open the folder and wait until every other process is there with the same plan."""
        for path in self.folder.glob("team-*"):
            path.unlink()
        self._write("lead", 0, self.nonce)
        deadline = time.monotonic() + self._timeout
        try:
            self._meet(digest, deadline)
        except MbxError as error:  # those who are waiting would wait in vain
            self._write("start", 0, json.dumps({"refused": error.fact, "nonces": self._nonces()}))
            raise

    def _meet(self, digest: str, deadline: float) -> None:
        for rank in range(1, self.place.size):
            hello = self._await(lambda rank=rank: self._hello(rank), rank, deadline)  # type: ignore[misc]
            if hello["digest"] != digest:
                raise UsageError(
                    f"rank {rank} has planned another conversion than rank 0",
                    hint="give every process the same arguments, and the same source",
                )
            self._seen[rank] = ("", time.monotonic())

    def start(self, everyones: Sequence[Share]) -> Share:
        """Rank 0: hand out the shares; returns rank 0's own."""
        self._write("start", 0, json.dumps({"shares": everyones, "nonces": self._nonces()}))
        self._lives.start()
        return everyones[0]

    def join(self, digest: str) -> Share:
        """Another rank: say hello until rank 0 has seen it; returns this process's share."""
        deadline = time.monotonic() + self._timeout
        hello = {"nonce": self.nonce, "digest": digest}

        def started() -> Share | None:
            lead = self._read("lead", 0)
            text = json.dumps({**hello, "to": lead})
            if lead is not None and self._read("hello", self.place.rank) != text:
                self._write("hello", self.place.rank, text)
            start = self._read("start", 0)
            if start is not None:
                told = json.loads(start)
                if told["nonces"].get(str(self.place.rank)) == self.nonce:  # else it is an earlier run's
                    if (why := told.get("refused")) is not None:
                        raise StorageError(f"rank 0 of {self.place.size} failed: {why}")
                    return [(int(a), int(b)) for a, b in told["shares"][self.place.rank]]
            return None

        share = self._await(started, 0, deadline)
        self._seen[0] = ("", time.monotonic())
        self._lives.start()
        return share

    def _nonces(self) -> dict[str, str]:
        """Of every process that has said hello to this one."""
        hellos = {rank: self._hello(rank) for rank in range(1, self.place.size)}
        return {str(rank): hello["nonce"] for rank, hello in hellos.items() if hello is not None}

    def _hello(self, rank: int) -> dict[str, str] | None:
        text = self._read("hello", rank)
        hello: dict[str, str] | None = None if text is None else json.loads(text)
        return hello if hello is not None and hello["to"] == self.nonce else None

    def _await(self, look: Callable[[], _T | None], rank: int, deadline: float) -> _T:
        while (found := look()) is None:
            if time.monotonic() > deadline:
                raise StorageError(
                    f"rank {self.place.rank} of {self.place.size} waited {self._timeout:.0f} s for rank {rank}",
                    hint=f"start all processes with the same arguments, or unset {self.place.source} to use one",
                )
            time.sleep(_POLL_S)
        return found

    # --- working ------------------------------------------------------------------------------------------------

    def _live(self) -> None:
        count = 0
        while not self._stop.is_set():
            try:
                self._write("alive", self.place.rank, str(count))
                self._lost = self._lost or self._find_lost()
            except MbxError as error:  # told to the main thread by `check`
                if self.folder.is_dir():
                    self._lost = error.fact
            count += 1
            self._stop.wait(min(1.0, self._timeout / 8))

    def _find_lost(self) -> str | None:
        """What is wrong with another process, None when nothing is."""
        for rank, (before, since) in self._seen.items():
            if (failed := self._read("failed", rank)) is not None:
                return f"rank {rank} of {self.place.size} failed: {failed}"
            now = self._read("alive", rank)
            if now is not None and now != before:
                self._seen[rank] = (now, time.monotonic())
            elif self._read("finished", rank) is None and time.monotonic() - since > self._timeout:
                return f"rank {rank} of {self.place.size} gave no sign of life for {self._timeout:.0f} s"
        return None

    def check(self) -> None:
        """Raise StorageError when another process has failed or vanished."""
        if self._lost is not None:
            raise StorageError(self._lost, hint="run all processes again with ‹resume›")

    def finish(self) -> None:
        """Say that this process has written its share."""
        self._write("finished", self.place.rank, "")

    def wait_for_all(self) -> None:
        """Rank 0: wait until every other process has finished."""
        waiting = set(range(1, self.place.size))
        while waiting := {rank for rank in waiting if self._read("finished", rank) is None}:
            self.check()
            time.sleep(_POLL_S)

    def wait_for_commit(self) -> None:
        """Another rank: wait until rank 0 has given the checkpoint its name. It never removes the folder otherwise."""
        while self.folder.parent.is_dir():
            if self.folder.is_dir():
                self.check()
            time.sleep(_POLL_S)

    # --- files --------------------------------------------------------------------------------------------------

    def _path(self, what: str, rank: int) -> Path:
        return self.folder / f"team-{what}.{rank}"

    def _write(self, what: str, rank: int, text: str) -> None:
        path = self._path(what, rank)
        unfinished = path.with_name(f"{path.name}.{self.nonce[:8]}.tmp")
        try:
            unfinished.write_text(text, encoding="utf-8")
            os.replace(unfinished, path)
        except FileNotFoundError:
            return  # rank 0 has just removed the folder: there is nobody left to tell
        except OSError as error:
            raise os_failure(error, f"writing `{path}`") from error

    def _read(self, what: str, rank: int) -> str | None:
        try:
            return self._path(what, rank).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == 116:  # ESTALE: renamed over on a network file system; the next look finds the new one
                return None
            raise os_failure(error, f"reading `{self._path(what, rank)}`") from error
