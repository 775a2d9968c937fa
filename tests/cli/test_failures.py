"""Every failure is one clear error with its exit code, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from _cli import TINY, Run, assert_nothing_left

Damage = Callable[[Path], None]


def edit_config(**changes: object) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def edit_header(change: Callable[[dict[str, dict[str, object]]], None]) -> Damage:
    """Rewrites the header of `model.safetensors` and leaves its data alone."""

    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return damage


def rename(header: dict[str, dict[str, object]]) -> None:
    header["model.layers.0.self_attn.q_projection.weight"] = header.pop("model.layers.0.self_attn.q_proj.weight")


def reshape(header: dict[str, dict[str, object]]) -> None:
    entry = header["model.layers.0.mlp.down_proj.weight"]
    shape = entry["shape"]
    assert isinstance(shape, list)
    entry["shape"] = shape[::-1]


def add_tensor(folder: Path) -> None:
    def change(header: dict[str, dict[str, object]]) -> None:
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")  # type: ignore[index]
        header["model.layers.0.extra.weight"] = {"dtype": "BF16", "shape": [2], "data_offsets": [end, end + 4]}

    edit_header(change)(folder)
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(bytes(4))


def drop_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def make_directory(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


BAD_SOURCES: dict[str, tuple[str, Damage, tuple[str, ...], int, str]] = {
    "missing shard": ("llama", lambda f: (f / "model-00002-of-00003.safetensors").unlink(), (), 4, "model-00002"),
    "truncated file": ("qwen3", truncate, (), 4, "model.safetensors"),
    "missing tensor": ("qwen3", drop_tensor, (), 3, "model.layers.1.mlp.up_proj.weight"),
    "extra tensor": ("qwen3", add_tensor, (), 3, "model.layers.0.extra.weight"),
    "renamed tensor": ("qwen3", edit_header(rename), (), 3, "near `model.layers.0.self_attn.q_proj"),
    "wrong shape": ("qwen3", edit_header(reshape), (), 3, "mlp.linear_fc2.weight"),
    "unknown architecture": ("qwen3", edit_config(model_type="qwen33"), (), 3, "qwen33"),
    "unknown config key": ("qwen3", edit_config(novel_key=1), (), 3, "novel_key"),
    "config that is no JSON": ("qwen3", lambda f: (f / "config.json").write_text("{") and None, (), 4, "config.json"),
    "text for a number": ("qwen3", edit_config(rope_theta="a"), (), 2, "`rope_theta` is 'a'"),
    "text for a switch": ("qwen3", edit_config(tie_word_embeddings="no"), (), 2, "`tie_word_embeddings` is 'no'"),
    "no config": ("qwen3", lambda f: (f / "config.json").unlink(), (), 4, "config.json"),
    "unreadable config": ("qwen3", make_directory, (), 4, "config.json"),
    "no such folder": ("qwen3", shutil.rmtree, (), 4, "no such folder"),
    "tp that does not divide": ("qwen3", lambda f: None, ("--tp", "3"), 2, "--tp 3 does not divide"),
    "pp that does not divide": ("qwen3", lambda f: None, ("--pp", "7"), 2, "--pp 7 does not divide"),
    "tp of nothing": ("qwen3", lambda f: None, ("--tp", "0"), 2, "--tp 0"),
    "dtype nobody knows": ("qwen3", lambda f: None, ("--dtype", "fp7"), 2, "fp7"),
    "table nobody knows": ("qwen3", lambda f: None, ("--mapping", "qwen33"), 2, "qwen3"),
    "table that is not there": ("qwen3", lambda f: None, ("--mapping", "none.toml"), 4, "none.toml"),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
@pytest.mark.parametrize("form", ["text", "json"])
def test_a_bad_source_is_one_clear_error(mbx: Run, here: Path, case: str, form: str) -> None:
    family, damage, options, code, said_of = BAD_SOURCES[case]
    shutil.copytree(TINY / family, here / "src")
    damage(here / "src")
    source = "./src"
    said = mbx("convert", "hf-to-mcore", source, "out", *options, *(["--json"] if form == "json" else []))
    assert said.code == code
    assert_nothing_left(here / "out")
    if form == "json":
        error = said.document["error"]
        assert set(error) == {"fact", "hint", "details", "exit_code"} and error["exit_code"] == code
        assert said_of in " ".join([error["fact"], *error["details"]])
    else:
        assert said.stdout == "" and said_of in said.stderr
        assert said.stderr.startswith("error: ") and said.stderr.count("error: ") == 1
        assert "Traceback" not in said.stderr


def test_an_undamaged_copy_of_each_source_converts(mbx: Run, here: Path) -> None:
    """The negative control: what the cases above damage is fine before."""
    for family in sorted({case[0] for case in BAD_SOURCES.values()}):
        shutil.copytree(TINY / family, here / family)
        assert mbx("convert", "hf-to-mcore", f"./{family}", f"{family}.out").code == 0


@pytest.fixture
def ckpt(mbx: Run, here: Path) -> Path:
    assert mbx("convert", "hf-to-mcore", TINY / "qwen3", "ckpt").code == 0
    return here / "ckpt"


def poison(iteration: Path) -> None:
    """A pickle that would make a file, were it run."""

    class Poison:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {iteration / 'ran'}",)

    (iteration / ".metadata").write_bytes(pickle.dumps(Poison(), protocol=2))


BAD_CHECKPOINTS: dict[str, tuple[Damage, str]] = {
    "metadata that runs code": (poison, "posix.system"),
    "no metadata": (lambda i: (i / ".metadata").unlink(), ".metadata"),
    "unfinished": (lambda i: (i / "metadata.json").unlink(), "not finished"),
    "missing data file": (lambda i: (i / "__0_0.distcp").unlink(), "__0_0.distcp"),
    "truncated data file": (lambda i: os.truncate(i / "__0_0.distcp", 1000), "__0_0.distcp"),
    "overwritten data": (lambda i: (i / "__0_0.distcp").write_bytes(bytes(300_000)), "__0_0.distcp"),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_one_clear_error(mbx: Run, here: Path, ckpt: Path, case: str) -> None:
    damage, said_of = BAD_CHECKPOINTS[case]
    damage(ckpt / "iter_0000000")
    said = mbx("convert", "mcore-to-hf", "ckpt", "out")
    assert said.code == 4 and said_of in said.stderr and said.stderr.count("error: ") == 1
    assert_nothing_left(here / "out")
    assert not (ckpt / "iter_0000000" / "ran").exists()


def test_a_target_inside_the_source_is_refused(mbx: Run, ckpt: Path) -> None:
    said = mbx("convert", "mcore-to-hf", "ckpt", "ckpt/out")
    assert said.code == 2 and not (ckpt / "out").exists()


def test_a_full_disk_is_seen_before_a_byte_is_written(mbx: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    for options in ((), ("--dry-run",)):
        said = mbx("convert", "hf-to-mcore", TINY / "llama", "out", *options)
        assert said.code == 5 and "error: " in said.stderr
        assert_nothing_left(here / "out")
    said = mbx("convert", "hf-to-mcore", TINY / "llama", "out", "--dry-run", "--json")
    assert said.code == 5 and said.document["plan"]["disk"]["fits"] is False


@pytest.mark.parametrize(
    "raised, code", [(RuntimeError("odd"), 70), (KeyboardInterrupt(), 130), (MemoryError(), 5), (OSError(5, "EIO"), 4)]
)
def test_what_ends_a_run_midway_leaves_nothing(
    mbx: Run, here: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int
) -> None:
    from mbx.formats.files import FileSource

    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr(FileSource, "read_into", fail)
    said = mbx("convert", "hf-to-mcore", TINY / "llama", "out")
    assert said.code == code and said.stderr.count("error: ") == 1 and "Traceback" not in said.stderr
    assert_nothing_left(here / "out")
    said = mbx("convert", "hf-to-mcore", TINY / "llama", "out", "--json")
    assert said.code == code and said.document["error"]["exit_code"] == code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_cleanly(mbx: Run, here: Path, number: signal.Signals) -> None:
    code = f"""
import os, signal, sys, time
from mbx.formats.files import FileSource
read = FileSource.read_into
def slow(self, *a):
    os.kill(os.getpid(), {number.value})
    time.sleep(0.3)
    read(self, *a)
FileSource.read_into = slow
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background of a shell start with it ignored
from mbx.cli import main
sys.exit(main(sys.argv[1:]))
"""
    argv = [sys.executable, "-c", code, "convert", "hf-to-mcore", str(TINY / "llama"), "out", "--workers", "1"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=here, env=_environment())
    assert done.returncode == 130 and "interrupted" in done.stderr and "Traceback" not in done.stderr
    line = f"to go on: mbx convert hf-to-mcore {TINY / 'llama'} out --workers 1 --resume"
    assert line in " ".join(done.stderr.split())  # where work was done, a plain rerun is refused
    assert not (here / "out").exists()
    # The piece in hand may have been finished, and is then kept for --resume.
    assert mbx("convert", "hf-to-mcore", TINY / "llama", "out", "--resume").code == 0


def test_debug_shows_the_traceback(mbx: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBX_DEBUG", "1")
    said = mbx("convert", "hf-to-mcore", "./none", "out")
    assert said.code == 4 and "Traceback" in said.stderr and "StorageError" in said.stderr


def test_long_lists_are_cut_for_humans_and_whole_in_json(mbx: Run, here: Path) -> None:
    options = ("convert", "hf-to-mcore", TINY / "qwen2", "out", "--mapping", "mistral", "--allow-unused-key", "x")
    options += tuple(part for key in ("max_window_layers", "use_sliding_window", "use_mrope", "sliding_window")
                     for part in ("--allow-unused-key", key))  # fmt: skip
    details = mbx(*options, "--json").document["error"]["details"]
    said = mbx(*options)
    assert said.code == 3 and len(details) > 0
    shown = [line for line in said.stderr.splitlines() if line.startswith("  ") and "more; --json" not in line]
    assert len(shown) == min(10, len(details))


def test_a_closed_pipe_is_no_traceback(here: Path) -> None:
    command = f"{sys.executable} -m mbx models show llama | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=_environment(), cwd=here)
    assert "Traceback" not in done.stderr and done.stdout.splitlines()[-1] in ("0", "141")


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_closed_stream_is_no_failure(here: Path, closed: str) -> None:
    command = f"{sys.executable} -m mbx models show llama {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=_environment(), cwd=here)
    assert done.returncode == 0 and done.stderr == "" and bool(done.stdout) == (closed == "2>&-")


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(TINY.parents[1])}
