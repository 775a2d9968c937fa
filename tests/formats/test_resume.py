"""A run that is killed anywhere goes on with `resume` and ends with the bytes of one that was not."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from converters.errors import MbxError, StorageError, UsageError
from converters.mcore.layout import Layout
from mbx.cli import main
from mbx.formats.files import FileSource
from mbx.run import journal
from mbx.run.commit import PartialFolder, partial_path
from mbx.run.job import Options, plan_hf_to_mcore, run
from tests.formats._runs import convert, dying_at, in_child, tree

TP = Layout(tp=2)
Case = tuple[str, Path, dict[str, str]]


@pytest.fixture(scope="module", params=["hf-to-mcore", "mcore-to-hf"])
def case(request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Direction, source and what an undisturbed run makes of it."""
    work = tmp_path_factory.mktemp("reference")
    convert("hf-to-mcore", tiny / "llama", work / "mcore", layout=TP)
    if request.param == "hf-to-mcore":
        return request.param, tiny / "llama", tree(work / "mcore")
    convert("mcore-to-hf", work / "mcore", work / "hf")
    return request.param, work / "mcore", tree(work / "hf")


def _options(direction: str) -> dict[str, object]:
    return {"layout": TP} if direction == "hf-to-mcore" else {}


def _resume(direction: str, source: Path, target: Path) -> None:
    convert(direction, source, target, resume=True, sync=False, **_options(direction))


def _killed(direction: str, source: Path, target: Path, at: int, **options: object) -> int:
    """Run and kill at a system call; returns the exit code."""
    return in_child(dying_at(at, partial(convert, direction, source, target, **{**_options(direction), **options})))[0]


def _num_calls(direction: str, source: Path, target: Path) -> int:
    status, text = in_child(dying_at(0, partial(convert, direction, source, target, **_options(direction))))
    assert status == 0, text
    shutil.rmtree(target)
    return int(text)


def _check_kills(case: Case, work: Path, kills: int) -> None:
    direction, source, expected = case
    total = _num_calls(direction, source, work / "count")
    points = random.Random(0).sample(range(1, total + 1), min(kills, total))
    partial = 0
    for at in points:
        target = work / f"at{at}"
        assert _killed(direction, source, target, at) == -signal.SIGKILL
        if target.exists():  # killed behind the rename: the target is whole
            assert tree(target) == expected
            continue
        partial += journal.has_progress(partial_path(target))
        _resume(direction, source, target)
        assert tree(target) == expected, f"killed at call {at} of {total}"
        left = {p.name for p in work.iterdir() if p.name.startswith(f"at{at}.")}
        assert not left, "something was left beside the target"
        shutil.rmtree(target)
    assert partial > len(points) // 4, "hardly any kill met a run that had work to go on from"


def test_killed_at_any_system_call_it_resumes_to_the_same_bytes(case: Case, tmp_path: Path) -> None:
    _check_kills(case, tmp_path, 60)


@pytest.mark.slow
def test_killed_at_every_system_call_it_resumes_to_the_same_bytes(case: Case, tmp_path: Path) -> None:
    _check_kills(case, tmp_path, 10**6)


def test_a_resumed_run_may_be_killed_again_and_again(case: Case, tmp_path: Path) -> None:
    """Every attempt gets a little further; all the work is done once."""
    direction, source, expected = case
    target = tmp_path / "t"
    total = _num_calls(direction, source, tmp_path / "count")
    for attempt in range(60):
        _killed(direction, source, target, total // 4 + 8 * attempt, resume=True)
        if target.exists():
            break
    assert 0 < attempt < 59
    assert tree(target) == expected


def test_killed_from_outside_at_a_random_moment(case: Case, tmp_path: Path) -> None:
    """The same with a real process and a real clock."""
    direction, source, expected = case
    code = (
        "import sys, time; from pathlib import Path; from mbx.formats.files import FileSink\n"
        "from tests.formats._runs import convert, Layout\n"
        "write = FileSink.write\n"
        "def slow(self, *args):\n    time.sleep(0.01); write(self, *args)\n"
        "FileSink.write = slow; print('ready', flush=True)\n"
        f"convert({direction!r}, Path({str(source)!r}), Path(sys.argv[1]), **{{'layout': Layout(tp=2)}})\n"
    )
    for number, delay in enumerate((0.1, 0.2, 0.3)):
        target = tmp_path / str(number)
        child = subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(delay)
        child.kill()
        child.wait()
        child.stdout.close()
        if not target.exists():  # it was not quicker than the signal
            _resume(direction, source, target)
        assert tree(target) == expected


@pytest.fixture
def interrupted(tiny: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A private source, and a target whose run was killed half way."""
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(tiny / "llama", source)
    total = _num_calls("hf-to-mcore", source, tmp_path / "count")
    assert _killed("hf-to-mcore", source, target, total // 2) == -signal.SIGKILL
    assert journal.has_progress(partial_path(target))
    return source, target


def _again(source: Path, target: Path, **options: object) -> None:
    convert("hf-to-mcore", source, target, **{"layout": TP, "sync": False, **options})


def test_without_resume_an_interrupted_run_is_named_and_kept(interrupted: tuple[Path, Path]) -> None:
    source, target = interrupted
    with pytest.raises(UsageError, match=r"target\.partial` holds what an interrupted run wrote") as caught:
        _again(source, target)
    assert "‹resume›" in str(caught.value.hint) and "‹overwrite›" in str(caught.value.hint)
    assert journal.has_progress(partial_path(target)) and not target.exists()
    _again(source, target, overwrite=True)
    assert target.is_dir() and not partial_path(target).exists()


def test_what_a_resumed_run_reports_and_does_not_repeat(interrupted: tuple[Path, Path]) -> None:
    source, target = interrupted
    before = journal.read_pieces(partial_path(target))
    seen: list[int] = []
    job = plan_hf_to_mcore(source, target, Options(layout=TP, resume=True, workers=1, max_memory=1 << 24))
    outcome = run(job, seen.append)
    assert before and seen[0] == outcome.bytes_resumed > 0
    assert sum(seen) == job.plan.target_bytes


def test_the_speed_of_a_resumed_run_is_that_of_what_it_wrote(
    interrupted: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """What the interrupted run wrote took none of this one's time: a run that only has to rename is not a fast one."""
    source, target = interrupted
    arguments = ["--tp", "2", "--max-memory", "16MiB", "--workers", "2", "--no-sync", "--resume"]
    assert main(["convert", "hf-to-mcore", str(source), str(target), *arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["result"]
    written = result["bytes"] - result["bytes_resumed"]
    assert 0 < written < result["bytes"]
    assert result["gb_per_s"] * result["seconds"] == pytest.approx(written / 1e9)


def test_a_journal_is_believed(interrupted: tuple[Path, Path], tmp_path: Path) -> None:
    """Negative control: a finished piece that is damaged behind the journal's back is not written again."""
    source, target = interrupted
    _again(source, tmp_path / "whole")
    for path in partial_path(target).rglob("*.distcp"):
        path.write_bytes(bytes(path.stat().st_size))
    _again(source, target, resume=True)
    assert tree(target) != tree(tmp_path / "whole")


def test_files_that_are_gone_from_an_interrupted_run_are_noticed(interrupted: tuple[Path, Path]) -> None:
    source, target = interrupted
    next(partial_path(target).rglob("*.distcp")).unlink()
    with pytest.raises(StorageError, match="the interrupted run left"):
        _again(source, target, resume=True)


@pytest.mark.parametrize("options", [{"dtype": "fp32"}, {"layout": Layout(tp=1)}])
def test_resume_with_other_options_is_refused(interrupted: tuple[Path, Path], options: dict[str, object]) -> None:
    source, target = interrupted
    with pytest.raises(UsageError, match="another source or other options"):
        _again(source, target, resume=True, **options)
    assert journal.has_progress(partial_path(target)), "the work is still there for the right options"


def test_a_source_that_changed_since_is_refused(interrupted: tuple[Path, Path]) -> None:
    source, target = interrupted
    os.utime(source / "model-00002-of-00003.safetensors")
    with pytest.raises(StorageError, match="model-00002-of-00003.safetensors` changed since the interrupted run"):
        _again(source, target, resume=True)


def test_a_source_that_changes_during_the_run_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(tiny / "llama", source)
    read, touched = FileSource.read_into, []

    def touch(self: FileSource, file: str, start: int, buffer: memoryview) -> None:
        if not touched:
            touched.append(os.utime(source / "model-00001-of-00003.safetensors"))
        read(self, file, start, buffer)

    monkeypatch.setattr(FileSource, "read_into", touch)
    with pytest.raises(StorageError, match="model-00001-of-00003.safetensors` changed while it was read"):
        _again(source, target)
    assert not target.exists() and not partial_path(target).exists()


def test_a_second_run_on_the_same_target_is_refused(tiny: Path, tmp_path: Path) -> None:
    with (
        PartialFolder(tmp_path / "target"),
        pytest.raises(UsageError, match=r"another run is writing .*target"),
    ):
        _again(tiny / "llama", tmp_path / "target")
    _again(tiny / "llama", tmp_path / "target")


def test_a_lock_file_that_its_holder_removed_does_not_count(tmp_path: Path) -> None:
    """Two runs that start as a third ends never both hold the target."""
    first = PartialFolder(tmp_path / "t")
    with first:
        stale = os.open(tmp_path / ".t.mbx-lock", os.O_RDWR)  # a second run has opened the file and not locked it yet
    os.close(stale)
    with PartialFolder(tmp_path / "t"), pytest.raises(UsageError, match="another run"), PartialFolder(tmp_path / "t"):
        raise AssertionError("two runs hold one target")


def test_more_memory_than_now_allowed_is_said(interrupted: tuple[Path, Path]) -> None:
    source, target = interrupted
    path = partial_path(target) / ".mbx" / "run.json"
    path.write_text(path.read_text().replace('"piece_bytes": ', '"piece_bytes": 9999'))
    with pytest.raises(MbxError, match="`max_memory` gives 16 MiB"):
        _again(source, target, resume=True)


def test_work_of_another_version_is_not_gone_on_with(
    interrupted: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which bytes go where is the program's to say, not the table's alone."""
    source, target = interrupted
    monkeypatch.setattr(journal, "__version__", "0.0.0")
    with pytest.raises(UsageError, match="another source or other options"):
        _again(source, target, resume=True)


def _relabel(partial: Path, mark: int | None = None) -> None:
    """Make the log one of a machine that has restarted since; `mark` puts its only mark behind so many lines."""
    (log,) = (partial / ".mbx").glob("*.log")
    lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def checked(text: str) -> str:
        return f"{text} {zlib.crc32(text.encode()):08x}\n"

    lines[0] = checked("B another-boot")
    if mark is not None:
        lines = [line for line in lines if not line.startswith("S")]
        lines.append(checked(f"S {sum(map(len, lines[:mark]))}"))
    log.write_text("".join(lines))


def test_after_a_crash_of_the_machine_only_flushed_pieces_count(
    interrupted: tuple[Path, Path], tmp_path: Path
) -> None:
    source, target = interrupted
    partial = partial_path(target)
    pieces = journal.read_pieces(partial)
    _relabel(partial)
    assert len(pieces) > 4 and journal.read_pieces(partial) == {}
    _relabel(partial, 4)
    assert len(journal.read_pieces(partial)) == 3
    for path in partial.rglob("*.distcp"):  # what was not flushed is lost
        size = path.stat().st_size
        path.write_bytes(b"")
        os.truncate(path, size)
    _relabel(partial, 1)
    _again(source, target, resume=True)
    _again(source, tmp_path / "whole")
    assert tree(target) == tree(tmp_path / "whole")


def test_a_log_is_read_up_to_its_first_damaged_line(interrupted: tuple[Path, Path]) -> None:
    _, target = interrupted
    (log,) = (partial_path(target) / ".mbx").glob("*.log")
    lines = [line for line in log.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    whole = journal.read_pieces(partial_path(target))
    log.write_bytes(b"".join(lines[:-1]) + lines[-1][:-3])
    assert len(journal.read_pieces(partial_path(target))) == len(whole) - 1
    lines[2] = lines[2].replace(b"P", b"Q")
    log.write_bytes(b"".join(lines))
    assert len(journal.read_pieces(partial_path(target))) == 1


def test_a_damaged_header_is_said(interrupted: tuple[Path, Path]) -> None:
    source, target = interrupted
    for text in ("", "{}", "[]", '{"digest": 1, "stamps": 3}'):
        (partial_path(target) / ".mbx" / "run.json").write_text(text)
        with pytest.raises(StorageError, match=r"run\.json` is damaged"):
            _again(source, target, resume=True)


def test_overwrite_keeps_the_old_target_until_the_new_one_is_whole(tiny: Path, tmp_path: Path) -> None:
    """Killed at any call, one of the two stands under the name or comes back with the next run."""
    source, target = tiny / "llama", tmp_path / "target"
    _again(source, tmp_path / "new")
    new, total = tree(tmp_path / "new"), _num_calls("hf-to-mcore", source, tmp_path / "count")
    old = tree(tiny / "qwen3")
    for at in range(total - 12, total + 12):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(tiny / "qwen3", target)
        status = _killed("hf-to-mcore", source, target, at, overwrite=True)
        with PartialFolder(target, overwrite=True):  # the next run puts things right
            pass
        assert tree(target) in (new, old), at
        if status == 0:
            break
    else:
        raise AssertionError("no run came to its end")
    assert tree(target) == new


def test_resume_with_nothing_to_resume_is_a_plain_run(tiny: Path, tmp_path: Path) -> None:
    _again(tiny / "llama", tmp_path / "a", resume=True)
    _again(tiny / "llama", tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def _marking_every_piece(source: Path, target: Path) -> None:
    journal._MARK_EVERY_S = 0.0
    convert("hf-to-mcore", source, target, layout=TP, workers=1)


def test_marks_are_set_while_a_run_goes_on(tiny: Path, tmp_path: Path) -> None:
    """With a mark after every piece, a restart of the machine loses nothing but the piece that was last."""
    target = tmp_path / "t"
    total = _num_calls("hf-to-mcore", tiny / "llama", target)
    in_child(dying_at(total // 2, partial(_marking_every_piece, tiny / "llama", target)))
    trusted = journal.read_pieces(partial_path(target))
    _relabel(partial_path(target))
    assert len(journal.read_pieces(partial_path(target))) >= len(trusted) - 1 > 2


def test_options_are_frozen() -> None:
    assert replace(Options(), resume=True).resume and not Options().resume
