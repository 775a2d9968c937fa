"""Every door and every how-to, followed literally."""

from __future__ import annotations

from pathlib import Path

import pytest
from _follow import follow, not_printed
from _pages import ROOT, blocks

FOLLOWED = sorted((ROOT / "docs" / "start").glob("*.md")) + sorted((ROOT / "docs" / "howto").glob("*.md"))
#: What every run of the tests can afford; the others run models, or search settings, for ten seconds and more.
QUICK = ("install", "convert", "from-verl")


def _param(page: Path) -> object:
    marks = [] if page.stem in QUICK else [pytest.mark.slow]
    return pytest.param(page, id=page.stem, marks=marks)


@pytest.mark.parametrize("page", [_param(page) for page in FOLLOWED])
def test_the_page_leads_where_it_says(page: Path, tmp_path: Path) -> None:
    done = follow(page, tmp_path)
    assert done.faults == []
    assert done.ran > 0 and done.held > 0


@pytest.mark.parametrize("page", FOLLOWED, ids=lambda page: page.stem)
def test_what_nobody_runs_has_its_reason(page: Path) -> None:
    skipped = [block for block in blocks(page) if block.not_run]
    assert all(len(block.not_run) > 8 for block in skipped)
    ran = [block for block in blocks(page) if block.language == "sh" and not block.not_run]
    assert len(skipped) <= 2 * len(ran)


def test_what_is_not_printed_is_seen() -> None:
    assert not_printed("a 1 s\nb", "x\na 2 s\nb") == "a 1 s"
    assert not_printed("a … s\n…\nb", "x\na 2 s\ny\nb\n") is None
    assert not_printed("b\na", "a\nb") == "a"


def test_a_page_that_fails_is_seen(tmp_path: Path) -> None:
    made = tmp_path / "page.md"
    made.write_text("```sh\necho one\n```\n```text\ntwo\n```\n\n```sh\nfalse\n```\n\n```sh\necho three\n```\n")
    (folder := tmp_path / "folder").mkdir()
    done = follow(made, folder)
    assert done.ran == 2 and len(done.faults) == 2
