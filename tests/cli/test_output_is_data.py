"""What a stranger's names hold is shown, and neither obeyed nor believed; what is secret is not shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from _cli import TINY, Run
from safetensors.torch import load_file, save_file

from converters.errors import StorageError
from mbx.cli.output import out
from mbx.models.tokenizer import read_tokenizer
from mbx.proof.ci.matrix import Result
from mbx.proof.ci.report import junit, markdown
from mbx.proof.legs import Leg
from mbx.text import redacted

pytestmark = pytest.mark.timeout(120)

#: A line break, a concealing colour, a direction mark, a C1 control, a separator, HTML, a link and an end of a cell.
NAME = "x\x1b[8m\u202e\n  weights  passed\x9b2J\u2028<script>alert(1)</script>![y](http://z) [y]: http://z | \x07"


@pytest.fixture
def named(tmp_path: Path) -> Path:
    """A model with a tensor of that name."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_bytes((TINY / "llama" / "config.json").read_bytes())
    tensors = {NAME: torch.zeros(1)}
    for shard in (TINY / "llama").glob("*.safetensors"):
        tensors |= load_file(shard)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


def only_plain(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n")) and "\n  weights  passed" not in text


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_names_are_shown_as_data(mbx: Run, named: Path, tmp_path: Path, form: list[str]) -> None:
    said = mbx("inspect", named, "--tensors", *form)
    assert said.code == 0 and only_plain(said.stdout) and only_plain(said.stderr)
    if form:
        assert NAME in json.dumps(said.document, ensure_ascii=False) or json.dumps(NAME)[1:-1] in said.stdout
    refused = mbx("convert", "hf-to-mcore", named, tmp_path / "out", *form)
    assert refused.code not in (0, 70) and only_plain(refused.stdout) and only_plain(refused.stderr)


def test_tracebacks_are_set_apart(mbx: Run, named: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBX_DEBUG", "1")
    said = mbx("convert", "hf-to-mcore", named, tmp_path / "out")
    assert "| Traceback" in said.stderr and only_plain(said.stderr)


def test_reports_hold_no_markup_of_strangers() -> None:
    results = [Result("check", "tp1", Leg("weights", "failed", NAME, (NAME,)), 0.5)]
    text = markdown(results)
    assert "<script" not in text and "](" not in text and "]:" not in text and only_plain(text)
    (row,) = [line for line in text.split("\n") if line.startswith("| check | tp1")]
    assert row.count("|") == 4
    case = ElementTree.fromstring(junit(results)).find(".//failure")
    assert case is not None and case.text is not None and "<script>" in case.text and "\x1b" not in case.text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:secret@hub.test/x", "https://…@hub.test/x"),
        ("https://secret@hub.test", "https://…@hub.test"),
        ("token hf_abcdefghijklmnop is wrong", "token … is wrong"),
        ("https://hub.test/a@b", "https://hub.test/a@b"),
    ],
)
def test_secrets_are_not_shown(text: str, shown: str) -> None:
    assert redacted(text) == shown


def test_no_stream_shows_a_secret(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBX_DEBUG", "1")
    secret = "https://me:pass-word@hub.test"
    out.error(StorageError(f"{secret} said no", hint=secret, details=[secret]))
    out.message(secret)
    out.warning(secret)
    captured = capsys.readouterr()
    assert captured.err.count("…@hub.test") == 6 and "pass-word" not in captured.err + captured.out


def test_libraries_print_no_names(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`tokenizers` prints options of a token that it does not know, past sys.stdout."""
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((TINY / "llama" / name).read_bytes())
    settings = json.loads((TINY / "llama" / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {"0": {"content": "<x>", NAME: 3}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    read_tokenizer(tmp_path)
    sys.stdout.write("behind\n")
    assert capfd.readouterr().out == "behind\n"


def test_a_folder_does_not_lend_its_modules(tmp_path: Path) -> None:
    """`python -m mbx` in a stranger's checkpoint imports nothing from it."""
    (tmp_path / "typer.py").write_text("open('RAN', 'w')\n")
    (tmp_path / "json.py").write_text("open('RAN', 'w')\n")
    done = subprocess.run(
        [sys.executable, "-m", "mbx", "--version"], cwd=tmp_path, capture_output=True, timeout=60, env=dict(os.environ)
    )
    assert done.returncode == 0 and not (tmp_path / "RAN").exists()
