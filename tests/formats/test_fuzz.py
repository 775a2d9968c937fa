"""Damage of any kind ends in an MbxError or in a checkpoint, never in a crash, a hang or a huge allocation.

The readers have suites of their own; here damage goes through the public functions: a table's text, and every file
of a checkpoint on its way through a whole conversion.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters.errors import MbxError, TableError
from converters.mcore.layout import Layout
from converters.rows.parse import parse_table
from converters.rows.table import Table
from tests.formats._runs import convert

TABLES = sorted((Path(__file__).resolve().parents[2] / "mappings").glob("*.toml"))
#: What a value of a table may be replaced with: every TOML type, expressions that are wrong, deep or hostile.
VALUES = (
    "0",
    "-1",
    "1e400",
    "nan",
    "true",
    '""',
    '"x"',
    "[]",
    "[[1], 2]",
    "{}",
    "{ a = 1 }",
    "1979-05-27",
    '"num_layers // 0"',
    '"10 ** 10 ** 10"',
    "\"__import__('os').system('true')\"",
    '"().__class__"',
    '"' + "(" * 200 + '"',
    '"{L}{E}{I}"',
    '"{"',
    '"\\u0000"',
    f'"{"a" * 5000}"',
)


def _damaged(draw: st.DrawFn, text: str) -> str:
    """A table's text with a few lines or values changed."""
    lines = text.splitlines()
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(lines) - 1))
        match draw(st.sampled_from(("drop", "repeat", "value", "cut", "junk", "swap"))):
            case "drop":
                del lines[at]
            case "repeat":
                lines.insert(at, lines[at])
            case "value":
                key, equals, _ = lines[at].partition("=")
                if equals:
                    lines[at] = f"{key}= {draw(st.sampled_from(VALUES))}"
            case "cut":
                lines[at] = lines[at][: draw(st.integers(0, len(lines[at])))]
            case "junk":
                lines.insert(at, draw(st.text(max_size=30)))
            case "swap":
                lines[0], lines[at] = lines[at], lines[0]
        lines = lines or [""]
    return "\n".join(lines)


@st.composite
def damaged_tables(draw: st.DrawFn) -> str:
    return _damaged(draw, draw(st.sampled_from(TABLES)).read_text(encoding="utf-8"))


@settings(max_examples=300, deadline=2000)
@given(damaged_tables())
def test_a_damaged_table_is_a_table_error(text: str) -> None:
    try:
        table = parse_table("fuzzed", text)
    except TableError as error:
        assert "fuzzed" in error.fact or error.fact
        return
    assert isinstance(table, Table)


@settings(max_examples=200, deadline=1000)
@given(st.one_of(st.text(max_size=200), st.binary(max_size=200).map(lambda b: b.decode("latin-1"))))
def test_any_text_is_a_table_error(text: str) -> None:
    with pytest.raises(TableError):
        parse_table("fuzzed", text)


@pytest.mark.parametrize("value", ["0", "[0]", "{}"])
def test_keys_that_are_no_keys_are_a_table_error(value: str) -> None:
    text = next(path for path in TABLES if path.stem == "gemma2").read_text(encoding="utf-8")
    assert (old := 'rope   = "rope_scaling"') in text
    with pytest.raises(TableError, match="config.via"):
        parse_table("fuzzed", text.replace(old, f"rope   = {value}"))


def test_shipped_tables_are_none() -> None:
    """Negative control: undamaged, the same texts parse."""
    assert len(TABLES) > 5
    for path in TABLES:
        assert parse_table(path.stem, path.read_text(encoding="utf-8")).name


@pytest.fixture(scope="module")
def checkpoints(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sound source of each direction."""
    work = tmp_path_factory.mktemp("sound")
    convert("hf-to-mcore", tiny / "llama", work / "mcore", layout=Layout(tp=2))
    return {"hf-to-mcore": tiny / "llama", "mcore-to-hf": work / "mcore"}


def _change(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes with a few places overwritten, cut out or repeated; the start, where headers lie, is met most."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, min(len(out), draw(st.sampled_from((16, 2000, 10**9)))) - 1)))
        match draw(st.sampled_from(("set", "cut", "insert", "end"))):
            case "set" if out:
                out[at] = draw(st.integers(0, 255))
            case "cut":
                del out[at : at + draw(st.sampled_from((1, 8, 100)))]
            case "insert":
                out[at:at] = draw(st.binary(min_size=1, max_size=9))
            case "end":
                del out[at:]
            case _:
                out += b"\0"
    return bytes(out)


@pytest.mark.parametrize("direction", ["hf-to-mcore", "mcore-to-hf"])
@settings(max_examples=80, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_checkpoint_converts_or_says_why_not(
    checkpoints: dict[str, Path], direction: str, data: st.DataObject
) -> None:
    """Values may change, that is no damage a converter can see; a target that appears is whole."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "source"), Path(folder, "target")
        shutil.copytree(checkpoints[direction], source)
        files = [path for path in sorted(source.rglob("*")) if path.is_file()]
        chosen = data.draw(st.sampled_from(files), label="file")
        change: Callable[[st.DrawFn, bytes], bytes] = _change
        chosen.write_bytes(data.draw(st.composite(lambda draw: change(draw, chosen.read_bytes()))(), label="content"))
        try:
            convert(direction, source, target, sync=False)
        except MbxError as error:
            assert error.fact and error.exit_code != 70
            assert not target.exists()
            return
        assert (target / "mbx_manifest.json").is_file()
