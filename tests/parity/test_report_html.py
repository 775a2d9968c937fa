"""The HTML report: well formed, on its own, says what the report says, and a browser shows it without a complaint."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from _planted import convert
from _stores import changed_mcore

from converters.errors import StorageError
from mbx.cli import main
from mbx.models.forward.divergence import BorderDiff
from mbx.proof.parity import ParityReport, parity
from mbx.proof.report.html import page, write
from tests.browser import BROWSER, run

NAME = "qwen3"
FC1, FINAL = "decoder.layers.mlp.linear_fc1.weight", "decoder.final_layernorm.weight"


class Balanced(HTMLParser):
    """Fails on a tag that is closed wrongly; collects the text."""

    VOID = frozenset(("meta", "br", "rect", "line", "circle", "polyline"))

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.text: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(html: str) -> Balanced:
    parser = Balanced()
    parser.feed(html)
    parser.close()
    assert not parser.open
    return parser


@pytest.fixture(scope="module")
def wrong(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> ParityReport:
    work = tmp_path_factory.mktemp("wrong")

    def change(t: dict) -> None:
        t[FC1] = t[FC1].roll(96, 1)
        t[FINAL][2] = float("nan")

    return parity(tiny / NAME, changed_mcore(convert(tiny / NAME, work / "a"), work / "<b>&", change))


def test_the_page_says_what_the_report_says(wrong: ParityReport) -> None:
    found = parsed(page(wrong))
    text = " ".join(found.text)
    assert "Parity is not proved" in text and "gate and up are swapped" in text and "not finite" in text
    assert FC1 in text and FINAL in text and "weights" in text
    assert "<b>&" in text  # a name that is markup is shown, not obeyed


def test_the_page_needs_nothing_from_elsewhere(wrong: ParityReport) -> None:
    html = page(wrong)
    assert not re.search(r"<script|<link|<img|@import|url\(", html)
    assert not [value for name, value in parsed(html).attributes if name in ("src", "href")]


def test_a_sound_pair_has_no_plots_and_says_so(tiny: Path, tmp_path: Path) -> None:
    report = parity(tiny / NAME, convert(tiny / NAME, tmp_path / "mcore"))
    html = page(report)
    assert "Parity holds" in " ".join(parsed(html).text) and "<svg" not in html
    assert html.count('class="tensor"') == 0 and page(report) == html


def test_hidden_states_are_drawn_and_the_first_layer_that_diverges_is_named(wrong: ParityReport) -> None:
    relative = (0.0, 4e-7, 8e-7, 3e-2, math.inf)
    names = ("embedding", "layer 0", "layer 1", "layer 2", "final norm")
    borders = tuple(BorderDiff(name, value, value) for name, value in zip(names, relative, strict=True))
    html = page(replace(wrong, borders=borders))
    text = " ".join(parsed(html).text)
    assert html.count('class="border"') == len(borders) and "The first to diverge is layer 2: " in text
    assert html.count('<circle class="bad"') == 2 and "nan" not in html and 'cx="inf' not in html
    sound = page(replace(wrong, borders=borders[:3]))
    assert "The first to diverge" not in sound and sound.count('class="border"') == 3
    assert "Hidden states" not in page(wrong)


def test_the_option_writes_it(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = convert(tiny / NAME, tmp_path / "mcore")
    target = tmp_path / "report.html"
    assert main(["verify", "parity", str(tiny / NAME), str(checkpoint), "--html", str(target)]) == 0
    assert "parity holds" in capsys.readouterr().out and target.read_text().startswith("<!doctype html>")


def test_a_file_that_cannot_be_written_is_an_error(wrong: ParityReport, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot write"):
        write(wrong, tmp_path / "absent" / "report.html")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
def test_a_browser_lays_it_out(wrong: ParityReport, tmp_path: Path) -> None:
    """The document after layout has the verdict, a bar a tensor, and a picture of it is not blank."""
    borders = tuple(BorderDiff(f"layer {n}", 10.0**-n, 10.0**-n) for n in range(8))
    write(replace(wrong, borders=borders), target := tmp_path / "report.html")
    shot = tmp_path / "report.png"
    dom = run(tmp_path, "--dump-dom", target.as_uri())
    assert 'id="verdict">failed' in dom and dom.count("<rect") == 2 * len(wrong.differences)
    assert dom.count("<circle") == len(borders)
    run(tmp_path, "--window-size=1000,1600", f"--screenshot={shot}", target.as_uri())
    assert shot.stat().st_size > 20_000  # an empty page of this size compresses to a few kilobytes
