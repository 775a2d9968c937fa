"""A format that mbx never heard of: registered from outside, it is sniffed, inspected, converted and verified."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from toy_format import Npy

import mbx
from mbx.cli import main
from mbx.formats.registry import unregister

LINES = len(Path(__file__).with_name("toy_format.py").read_text().splitlines())


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    mbx.register(Npy())
    yield
    unregister("npy")


def test_it_is_as_short_as_promised() -> None:
    assert LINES <= 80


def test_through_the_command_line(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, made, back = tiny / "llama", tmp_path / "npy", tmp_path / "hf"

    def run(*words: object) -> str:
        assert main([*map(str, words), "--json"]) == 0
        return capsys.readouterr().out

    run("convert", "hf-to-mcore", source, made, "--format", "npy", "--dry-run")
    run("convert", "hf-to-mcore", source, made, "--format", "npy")
    # NumPy itself reads what was written
    stored = np.load(made / "iter_0000000" / "decoder.final_layernorm.weight.npy")
    assert stored.dtype == np.uint16 and len(stored) == json.loads((source / "config.json").read_text())["hidden_size"]
    said = json.loads(run("inspect", made))
    assert (said["format"], said["writer"], said["table"], said["fault"]) == ("npy", "mbx", "llama", None)
    run("verify", "parity", source, made)
    run("verify", "integrity", made)
    run("convert", "mcore-to-hf", made, back)
    for path in source.iterdir():
        assert (back / path.name).read_bytes() == path.read_bytes()
    run("convert", "reshard", made, tmp_path / "dist", "--tp", "2")
    run("convert", "reshard", tmp_path / "dist", tmp_path / "again", "--format", "npy")
    run("diff", made, tmp_path / "again")


def test_through_python(tiny: Path, tmp_path: Path) -> None:
    source, made = tiny / "llama", tmp_path / "npy"
    mbx.convert(source, made, mbx.Options(format="npy"))
    with mbx.open(made) as opened, mbx.open(source) as folder:
        assert (opened.format, opened.spelling, opened.writer) == ("npy", "mcore", "mbx")
        ours = opened.as_hf()
        assert set(ours.names()) == set(folder.names())
        for name in folder.names():
            np.testing.assert_array_equal(ours.read(name), folder.read(name))
    assert mbx.verify(source, made).passed and mbx.integrity(made).passed
    assert mbx.inspect(made).format == "npy"


def test_a_changed_value_is_found(tiny: Path, tmp_path: Path) -> None:
    """Negative control."""
    mbx.convert(tiny / "llama", made := tmp_path / "npy", mbx.Options(format="npy"))
    with (made / "iter_0000000" / "output_layer.weight.npy").open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\x7f\x3f")
    assert not mbx.verify(tiny / "llama", made).passed and not mbx.integrity(made).passed


def test_an_installed_package_offers_one(tmp_path: Path, tiny: Path) -> None:
    """As an entry point of the group `mbx.formats`, without a line of the user's."""
    site = tmp_path / "site"
    (site / "toy-1.0.dist-info").mkdir(parents=True)
    (site / "toy-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (site / "toy-1.0.dist-info" / "entry_points.txt").write_text("[mbx.formats]\nnpy = toy_format:Npy\n")
    (site / "toy_format.py").write_text(Path(__file__).with_name("toy_format.py").read_text())
    code = f"""
import sys; sys.path[:0] = [{str(site)!r}, {str(Path(__file__).parents[2])!r}]
from mbx.cli import main
code = main(["convert", "hf-to-mcore", {str(tiny / "llama")!r}, {str(tmp_path / "made")!r}, "--format", "npy"])
sys.exit(code or main(["verify", "parity", {str(tiny / "llama")!r}, {str(tmp_path / "made")!r}]))
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)
