"""Reports as pages: text is shown and not obeyed, and curves of any length are drawn."""

from __future__ import annotations

import re

import pytest

from mbx.page import Dot, cell, curve, document, items, prose, table


def test_what_is_markup_is_shown() -> None:
    assert document("<b>", [items(["a < `b<c`"])]).count("<b>") == 0
    assert prose("`a` & `b`") == "<code>a</code> &amp; <code>b</code>" and prose("one ` alone") == "one ` alone"


def test_a_table_has_its_numbers_flush_right() -> None:
    text = table([(cell("x"), cell("1", "number"))], ("name", "count"), numbers=(1,), kind="row")
    assert (
        '<th scope="col">name</th><th scope="col" class="number">count</th>' in text
        and '<tr class="row"><td>x</td>' in text
    )


@pytest.mark.parametrize("line", [[(1.0, 2.0)], [(1.0, 2.0), (2.0, 9.0)], [(n + 0.0, n % 3 + 0.0) for n in range(50)]])
def test_a_curve_stays_within_its_picture(line: list[tuple[float, float]]) -> None:
    dot = Dot(line[-1][0], 100.0, "bad", "far <off>", "dots")
    text = curve(line, [dot], {0.0: "0", 3.0: "3"}, ("first", "last"))
    places = [tuple(map(float, pair.split(","))) for pair in re.search('points="(.*?)"', text)[1].split()]  # type: ignore[index]
    assert len(places) == len(line) and all(0 <= x <= 640 and 0 <= y <= 220 for x, y in places)
    assert "far &lt;off&gt;" in text and 'class="dots"' in text and "first" in text
