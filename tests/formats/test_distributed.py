"""Several processes that share a conversion: the same bytes, whoever dies, and no waiting for ever."""

from __future__ import annotations

import filecmp
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from converters.engine.pieces import Piece
from converters.errors import UsageError
from converters.mcore.layout import Layout
from mbx.run import journal
from mbx.run.commit import partial_path
from mbx.run.ranks import World, shares, world
from tests.formats._quantised import quantised
from tests.formats._runs import convert, tree

STEP = {"SLURM_STEP_NUM_TASKS": "2"}
ROOT = Path(__file__).resolve().parents[2]

#: One process: `argv` = source, target, options; SLOW seconds a piece; DIE_AT that piece's number, by SIGKILL; HOST is
#: the boot id of its host.
WORKER = """
import os, signal, sys, time
from pathlib import Path
from converters.errors import MbxError
from converters.mcore.layout import Layout
from mbx.run.job import Options, plan_hf_to_mcore, run
from mbx.run import journal
from mbx.run.journal import Log
from mbx.run.ranks import world

if "HOST" in os.environ:  # as if on a host of that name
    journal._boot_id = lambda: os.environ["HOST"]

done, calls = Log.done, 0
def slow(self, *args):
    global calls
    calls += 1
    time.sleep(float(os.environ.get("SLOW", "0")))
    done(self, *args)
    if calls == int(os.environ.get("DIE_AT", "0")):
        os.kill(os.getpid(), signal.SIGKILL)
Log.done = slow
options = Options(layout=Layout(tp=2), workers=1, max_memory=1 << 24, sync=False, resume="resume" in sys.argv)
try:
    run(plan_hf_to_mcore(Path(sys.argv[1]), Path(sys.argv[2]), options), place=world(os.environ))
except MbxError as error:
    print(f"{type(error).__name__}: {error.fact} | {error.hint}", file=sys.stderr)
    sys.exit(error.exit_code)
"""


def _start(
    rank: int, size: int, source: Path, target: Path, *arguments: str, program: str = WORKER, **variables: str
) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    environment |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MBX_RANK_TIMEOUT": "12", **variables}
    return subprocess.Popen(
        [sys.executable, "-c", program, str(source), str(target), *arguments],
        env=environment,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    try:
        return [(process.wait(60), process.stderr.read() if process.stderr else "") for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
            if process.stderr:
                process.stderr.close()


@pytest.fixture(scope="module")
def expected(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The result of one process."""
    target = tmp_path_factory.mktemp("alone") / "target"
    convert("hf-to-mcore", tiny / "llama", target, layout=Layout(tp=2))
    return tree(target)


def test_three_processes_make_what_one_makes(tiny: Path, tmp_path: Path, expected: dict[str, str]) -> None:
    results = _finish([_start(rank, 3, tiny / "llama", tmp_path / "t", SLOW="0.005") for rank in range(3)])
    assert results == [(0, "")] * 3
    assert tree(tmp_path / "t") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_one_killed_process_fails_the_others_in_time_and_resume_completes(
    tiny: Path, tmp_path: Path, expected: dict[str, str], victim: int
) -> None:
    target = tmp_path / "t"
    started = time.monotonic()
    results = _finish(
        [
            _start(rank, 3, tiny / "llama", target, SLOW="0.01", **({"DIE_AT": "3"} if rank == victim else {}))
            for rank in range(3)
        ]
    )
    assert time.monotonic() - started < 90
    for rank, (code, text) in enumerate(results):
        if rank == victim:
            assert code == -signal.SIGKILL
        else:
            assert code == 4 and f"rank {victim} of 3 gave no sign of life for 12 s" in text and "‹resume›" in text
    assert not target.exists() and journal.has_progress(partial_path(target))
    results = _finish([_start(rank, 2, tiny / "llama", target, "resume") for rank in range(2)])
    assert results == [(0, "")] * 2
    assert tree(target) == expected


@pytest.mark.slow
def test_hosts_trust_what_they_wrote_and_not_what_another_may_have_lost(
    tiny: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    """Two hosts, one of which dies; the run goes on with the other and a third, whose logs name other boots."""
    target = tmp_path / "t"
    hosts = [{"HOST": "a"}, {"HOST": "b", "DIE_AT": "4"}]
    _finish([_start(rank, 2, tiny / "llama", target, SLOW="0.01", **hosts[rank]) for rank in range(2)])
    partial = partial_path(target)
    everything = journal.read_pieces(partial, trusted=True)
    on_a = {number for log in (partial / ".mbx").glob("*.log") if b"B a" in log.read_bytes() for number in _noted(log)}
    assert on_a and set(everything) - on_a, "both hosts wrote pieces before one died"
    for path in partial.rglob("*.distcp"):  # what the dead host had not flushed is lost: here, all of it
        size = path.stat().st_size
        path.write_bytes(b"")
        os.truncate(path, size)
    results = _finish(
        [_start(rank, 2, tiny / "llama", target, "resume", HOST=host) for rank, host in enumerate(("c", "d"))]
    )
    assert results == [(0, "")] * 2
    assert tree(target) == expected


def _noted(log: Path) -> list[int]:
    return [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("P ")]


def test_a_process_that_fails_tells_the_others_at_once(tiny: Path, tmp_path: Path) -> None:
    """Its own words reach them, well within the time that a silent death takes."""
    target, source = tmp_path / "t", tmp_path / "source"
    source.mkdir()
    for path in (tiny / "llama").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    started = time.monotonic()
    slow = {"SLOW": "0.05", "MBX_RANK_TIMEOUT": "40"}
    processes = [_start(rank, 2, source, target, **slow) for rank in range(2)]
    while not (partial_path(target) / ".mbx" / "team-start.0").exists():
        assert time.monotonic() - started < 20
        time.sleep(0.01)
    for path in source.glob("*.safetensors"):
        os.truncate(path, 1000)
    results = _finish(processes)
    assert time.monotonic() - started < 90
    assert all(code == 4 for code, _ in results), results
    assert all("ends at byte" in text for _, text in results), results


def test_a_process_that_never_comes_is_named(tiny: Path, tmp_path: Path) -> None:
    ((code, text),) = _finish([_start(0, 2, tiny / "llama", tmp_path / "t", MBX_RANK_TIMEOUT="1")])
    assert code == 4 and "waited 1 s for rank 1" in text and "unset WORLD_SIZE" in text
    ((code, text),) = _finish([_start(1, 2, tiny / "llama", tmp_path / "t", MBX_RANK_TIMEOUT="1")])
    assert code == 4 and "waited 1 s for rank 0" in text
    assert not (tmp_path / "t").exists()


def test_processes_with_different_sources_are_refused(tiny: Path, tmp_path: Path) -> None:
    pair = [_start(rank, 2, tiny / name, tmp_path / "t") for rank, name in enumerate(("llama", "mistral"))]
    results = _finish(pair)
    assert all(code for code, _ in results)
    assert any("another conversion than rank 0" in text for _, text in results), results


def _piece(number: int, nbytes: int, file: str = "") -> Piece:
    unit: Any = None
    return Piece(number, unit, None, 0, 0, nbytes, 0, file)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_disjoint_complete_and_even(size: int) -> None:
    pieces = [_piece(n, 1 + n * 37 % 100) for n in range(500) if n % 9]
    cut = shares(pieces, size)
    numbers = [n for share in cut for first, stop in share for n in range(first, stop)]
    assert sorted(numbers) == sorted(set(numbers)) == [piece.number for piece in pieces]
    size_of = {piece.number: piece.nbytes for piece in pieces}
    loads = [sum(size_of[n] for first, stop in share for n in range(first, stop)) for share in cut]
    assert max(loads) - min(loads) <= 2 * 100


def test_where_files_end_near_an_even_cut_no_two_processes_share_one() -> None:
    pieces = [_piece(n, 10, f"model-{n // 47}") for n in range(1000)]
    cut = shares(pieces, 4)
    files = [{pieces[n].file for first, stop in share for n in range(first, stop)} for share in cut]
    assert sum(map(len, files)) == len(set.union(*files)) == 22
    loads = [sum(stop - first for first, stop in share) for share in cut]
    assert sum(loads) == 1000 and max(loads) - min(loads) <= 0.25 * 250


def test_a_file_of_one_process_is_cut_where_files_are_few() -> None:
    """Negative control: even shares come before whole files."""
    pieces = [_piece(n, 10, "one" if n < 400 else "two") for n in range(1000)]
    assert shares(pieces, 2) == [[(0, 500)], [(500, 1000)]]


def test_more_processes_than_pieces() -> None:
    assert shares([_piece(0, 5)], 3) == [[(0, 1)], [], []]
    assert shares([], 2) == [[], []]


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, (2, 4)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8"}, (3, 8)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "9", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", **STEP}, (1, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}, (0, 1)),
        ({"RANK": "0"}, (0, 1)),
    ],
)  # fmt: skip
def test_where_a_process_stands(environment: dict[str, str], place: tuple[int, int]) -> None:
    """A Slurm batch script knows its job's tasks and is none of them."""
    found = world(environment)
    assert (found.rank, found.size) == place


@pytest.mark.parametrize("pair", [("x", "2"), ("2", "2"), ("-1", "2"), ("0", "")])
def test_a_place_that_makes_no_sense_is_refused(pair: tuple[str, str]) -> None:
    with pytest.raises(UsageError, match="RANK"):
        world({"RANK": pair[0], "WORLD_SIZE": pair[1]})
    assert world({"RANK": "1", "WORLD_SIZE": "2"}) == World(1, 2, "WORLD_SIZE")


EXPORTER = """
import os, sys
from pathlib import Path
from mbx.run.job import Options, plan_mcore_to_hf, run
from mbx.run.ranks import world

options = Options(codec="same", workers=1, max_memory=1 << 25, sync=False)
run(plan_mcore_to_hf(Path(sys.argv[1]), Path(sys.argv[2]), options), place=world(os.environ))
"""


@pytest.mark.parametrize(
    "name",
    ["fp8_block", pytest.param("mxfp4", marks=pytest.mark.slow), pytest.param("int4_packed", marks=pytest.mark.slow)],
)
def test_processes_that_encode_again_make_what_one_makes(tmp_path: Path, name: str) -> None:
    source, mcore = quantised(name, tmp_path / "source"), tmp_path / "mcore"
    convert("hf-to-mcore", source, mcore, max_memory=1 << 25)
    convert("mcore-to-hf", mcore, tmp_path / "alone", codec="same", max_memory=1 << 25)
    team = [_start(rank, 2, mcore, tmp_path / "team", program=EXPORTER, MBX_RANK_TIMEOUT="60") for rank in range(2)]
    assert _finish(team) == [(0, "")] * 2
    assert tree(tmp_path / "team") == tree(tmp_path / "alone")
    weights = sorted(path.name for path in source.glob("*.safetensors"))
    assert weights and filecmp.cmpfiles(source, tmp_path / "team", weights, shallow=False)[0] == weights
