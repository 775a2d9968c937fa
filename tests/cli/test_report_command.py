"""`mbx report` finds the page that is meant, opens or serves it; `diff` and `budget` write one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import webbrowser
from functools import partial
from pathlib import Path
from urllib.request import urlopen

import pytest
from _cli import TINY, Run

STEP = {"kind": "step", "step": 1, "loss": 2.0, "tokens_per_s": 9.0, "memory_gib": 1.0, "lr": 1e-4}
ROOT = Path(__file__).parents[2]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a browser was asked to open, on a machine with a desktop."""
    asked: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: asked.append(url) or True)
    monkeypatch.setenv("DISPLAY", ":0")
    return asked


def test_a_file_is_opened(mbx: Run, here: Path, opened: list[str]) -> None:
    (here / "report.html").write_text("<!doctype html>")
    said = mbx("report", "report.html")
    assert said.code == 0 and opened == [(here / "report.html").as_uri()]
    assert said.stdout == f"{here / 'report.html'}\n" and not said.stderr


def test_a_runs_page_is_drawn_anew(mbx: Run, here: Path, opened: list[str]) -> None:
    (here / "run").mkdir()
    (here / "run" / "report.html").write_text("stale")
    (here / "run" / "metrics.jsonl").write_text(json.dumps(STEP) + "\n")
    document = mbx("report", "run", "--json").document
    assert document == {"report": str(here / "run" / "report.html"), "opened": False} and opened == []
    assert "1 steps, last loss 2.0000" in (here / "run" / "report.html").read_text()


def test_a_matrixs_page_is_found(mbx: Run, here: Path, opened: list[str]) -> None:
    (here / "matrix").mkdir()
    (here / "matrix" / "matrix.html").write_text("<!doctype html>")
    assert mbx("report", "matrix").code == 0 and opened[0].endswith("/matrix/matrix.html")


def test_without_a_desktop_the_path_is_said(mbx: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    (here / "report.html").write_text("<!doctype html>")
    said = mbx("report", "report.html")
    assert said.code == 0 and said.stdout.endswith("report.html\n") and "--serve" in said.stderr


@pytest.mark.parametrize(
    ("name", "code", "fact"),
    [("absent.html", 4, "does not exist"), ("folder", 2, "no run and no matrix"), ("a.txt", 2, "no HTML file")],
)
def test_what_is_no_report_is_refused(mbx: Run, here: Path, name: str, code: int, fact: str) -> None:
    (here / "folder").mkdir()
    (here / "a.txt").touch()
    said = mbx("report", name)
    assert said.code == code and fact in said.stderr


def test_it_is_served_until_interrupted_and_nothing_else_is(here: Path) -> None:
    (here / "report.html").write_text("<!doctype html><p>page</p>")
    (here / "secret.txt").write_text("secret")
    command = [sys.executable, "-m", "mbx", "report", "report.html", "--serve"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # tests in the background of a shell start with the signal ignored, and so would the server
    heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    opened = subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, text=True, env=environment, preexec_fn=heed)
    with opened as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        for path in ("", "secret.txt", "../secret.txt"):
            with urlopen(url + path, timeout=20) as answer:
                assert answer.read() == b"<!doctype html><p>page</p>"
        server.send_signal(signal.SIGINT)
        try:
            assert server.wait(timeout=30) == 0
        finally:
            server.kill()


def test_a_port_that_is_taken_is_named(mbx: Run, here: Path) -> None:
    import socket

    (here / "report.html").write_text("<!doctype html>")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = mbx("report", "report.html", "--serve", "--port", taken.getsockname()[1])
    assert said.code == 2 and "cannot be served" in said.stderr and "--port 0" in said.stderr


def test_diff_writes_what_it_says(mbx: Run, here: Path) -> None:
    assert mbx("convert", "hf-to-mcore", TINY / "llama", "cast", "--dtype", "fp16").code == 0
    said = mbx("diff", TINY / "llama", "cast", "--html", "diff.html", "--json")
    page = (here / "diff.html").read_text()
    assert said.code == 1 and "What changed" in page and "http" not in page
    assert all(change["name"] in page for change in said.document["changes"]) and "BF16 → F16" in page
    assert mbx("diff", TINY / "llama", TINY / "llama", "--html", "same.html").code == 0
    assert "Nothing changed" in (here / "same.html").read_text()
    assert mbx("diff", TINY / "llama", TINY / "qwen3", "--html", "other.html").code == 1
    other = (here / "other.html").read_text()
    assert "Added" in other and "model.layers.0.self_attn.q_norm.weight" in other and "Settings" in other


def test_budget_writes_what_it_says(mbx: Run, here: Path) -> None:
    said = mbx("budget", "qwen3_8b_sft", "--device", "24 GB", "--html", "budget.html", "--json").document
    page = (here / "budget.html").read_text()
    assert f'id="verdict">{said["fits"]}<' in page and said["variants"][0]["overrides"][0] in page
    assert f"{said['total_bytes'] / 2**30:.2f} GiB" in page and all(part in page for part in said["bytes"])
    assert mbx("budget", "llama3_70b_sft", "--html", "stages.html").code == 0
    assert "By stage" in (here / "stages.html").read_text()
