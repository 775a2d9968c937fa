"""Every page that mbx writes, looked at in a browser: two widths, light and dark, on paper, by keyboard."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from _cli import TINY

from mbx.cli import main
from mbx.page import write
from mbx.train.matrix.page import matrix_page
from tests.browser import BROWSER, look, run

KINDS = ("parity", "diff", "budget", "run", "matrix")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    llama, mistral = TINY / "llama", TINY / "qwen3"
    main(["verify", "parity", str(llama), str(mistral), "--html", str(folder / "parity.html")])
    main(["diff", str(llama), str(mistral), "--html", str(folder / "diff.html")])
    main(["budget", "llama3_8b_lora", "--device", "h100", "--fit", "--html", str(folder / "budget.html")])
    steps = [
        {"kind": "step", "step": n, "loss": 3 / n, "tokens_per_s": 9.0 * n, "memory_gib": 1, "lr": 1e-4}
        for n in range(1, 9)
    ]
    steps.append({"kind": "eval", "step": 8, "loss": 0.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    main(["train", "report", str(folder), str(folder / "run.html")])
    ran = {
        "status": "ok",
        "predicted_gib": 1.0,
        "peak_gib": 1.1,
        "first_step_s": 2.0,
        "step_s": 1.0,
        "losses": [2.0, 1.0],
    }
    cells = [
        {**ran, "cell": {"name": name}, "tokens_per_s": speed, "memory_over_time": [[0, 1], [1, 2], [2, 1.5]]}
        for name, speed in (("recipe", 100.0), ("train.recompute=full data.length=8192", 60.0))
    ]
    write(folder / "matrix.html", matrix_page("matrix", "a recipe", cells))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_it_fits_and_follows_the_readers_colours(pages: Path, tmp_path: Path, kind: str) -> None:
    page = pages / f"{kind}.html"
    wide, narrow, dark = look(page, tmp_path, 1200), look(page, tmp_path, 500), look(page, tmp_path, 1200, dark=True)
    for seen in (wide, narrow, dark):
        assert seen.wide <= seen.window and seen.cut == 0 and seen.stops > 0
    assert narrow.window < wide.window
    assert wide.paper == "rgb(255, 255, 255)" and dark.paper != wide.paper and dark.ink != wide.ink


@pytest.mark.parametrize("kind", KINDS)
def test_it_prints_on_white(pages: Path, tmp_path: Path, kind: str) -> None:
    paper = tmp_path / "page.pdf"
    run(
        tmp_path,
        "--blink-settings=preferredColorScheme=0",
        f"--print-to-pdf={paper}",
        (pages / f"{kind}.html").as_uri(),
    )
    assert paper.read_bytes().startswith(b"%PDF") and paper.stat().st_size > 5000


def test_all_have_one_style(pages: Path) -> None:
    styles = {(pages / f"{kind}.html").read_text().partition("<style>")[2].partition("</style>")[0] for kind in KINDS}
    assert len(styles) == 1
