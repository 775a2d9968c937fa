"""`mbx verify ci`: a correct matrix passes; a difference, a leg that cannot run and a broken file do not."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from _planted import convert, table_with
from _stores import changed_mcore

from converters.errors import MbxError, UsageError
from converters.mcore.layout import Layout
from fixtures.make_tiny import NAMES, make
from mbx.cli import main
from mbx.proof.ci.checks import Check, described, read_checks
from mbx.proof.ci.matrix import Result, run_checks
from mbx.proof.ci.report import junit, markdown

NAME = "qwen3"
FC1 = "decoder.layers.mlp.linear_fc1.weight"
SWAPPED = (
    '["mlp.gate_proj.weight", "mlp.up_proj.weight"]',
    '["mlp.up_proj.weight", "mlp.gate_proj.weight"]',
)


def checked(text: str, folder: Path) -> tuple[Result, ...]:
    path = folder / "mbx-ci.toml"
    path.write_text(text)
    return run_checks(read_checks(path), Path)


def source(tiny: Path, *lines: str) -> str:
    return "\n".join(("[[check]]", f'source = "{tiny / NAME}"', *lines))


def statuses(results: tuple[Result, ...]) -> dict[tuple[str, str], str]:
    return {(result.layout, result.leg.name): result.leg.status for result in results}


def test_every_layout_and_leg_is_run(tiny: Path, tmp_path: Path) -> None:
    results = checked(
        source(tiny, 'legs = ["cover", "config", "weights", "round-trip"]', "layouts = [{}, { tp = 2, pp = 2 }]"),
        tmp_path,
    )
    assert statuses(results) == {
        (layout, leg): "passed"
        for layout in ("tp1", "tp2 pp2")
        for leg in ("cover", "config", "weights", "round-trip")
    }
    assert "all passed" in markdown(results)


@pytest.mark.slow  # `make parity-ci`, a part of `make test`, runs the same checks
def test_every_family_passes_its_checks(tmp_path: Path) -> None:
    """All shipped tables, each by a tiny model of its own: converted, held against the source, and back."""
    for name in NAMES:
        make(name, tmp_path / name)
    legs = ("cover", "config", "weights", "round-trip")
    results = run_checks([Check(name, legs, source=str(tmp_path / name)) for name in NAMES], Path)
    assert len(results) == len(NAMES) * len(legs) > 160
    assert [(result.check, result.leg) for result in results if not result.passed] == []


def test_a_wrong_table_is_seen_by_the_forward_leg_alone(tiny: Path, tmp_path: Path) -> None:
    own = table_with(NAME, tmp_path, *SWAPPED)
    results = checked(source(tiny, f'mapping = "{own}"'), tmp_path)
    found = {result.leg.name: result.leg.status for result in results}
    assert found == {
        "cover": "passed",
        "config": "passed",
        "weights": "passed",
        "round-trip": "passed",
        "forward": "failed",
    }


def test_a_pair_that_differs_is_named_with_its_cause(tiny: Path, tmp_path: Path) -> None:
    good = convert(tiny / NAME, tmp_path / "mcore")
    wrong = changed_mcore(good, tmp_path / "wrong", lambda t: t.update({FC1: t[FC1].roll(96, 1)}))
    results = checked(f'[[check]]\nleft = "{tiny / NAME}"\nright = "{wrong}"\nlegs = ["cover", "weights"]', tmp_path)
    assert [result.leg.status for result in results] == ["passed", "failed"]
    assert "gate and up are swapped" in results[1].leg.details[-1]
    assert "gate and up are swapped" in markdown(results) and "gate and up are swapped" in junit(results)


def test_no_name_breaks_the_xml(tiny: Path, tmp_path: Path) -> None:
    text = source(tiny, 'name = "a\\u0001\\ufffe<b>&\\"c"', 'legs = ["cover"]')
    assert ElementTree.fromstring(junit(checked(text, tmp_path)))[0].get("name") == 'a\ufffd\ufffd<b>&"c'


def test_a_leg_that_was_asked_for_and_cannot_run_is_no_pass(tiny: Path, tmp_path: Path) -> None:
    own = table_with(NAME, tmp_path, "model_types", 'unsupported = "no such forward pass"\nmodel_types')
    results = checked(source(tiny, f'mapping = "{own}"', 'legs = ["cover", "forward"]'), tmp_path)
    assert [result.leg.status for result in results] == ["passed", "not run"]
    suite = ElementTree.fromstring(junit(results))[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors"), suite.get("skipped")) == (
        "2",
        "0",
        "1",
        "0",
    )
    assert "– not run" in markdown(results) and "1 of 2 did not pass" in markdown(results)


def test_what_cannot_be_converted_fails_every_leg_and_the_others_still_run(tiny: Path, tmp_path: Path) -> None:
    text = source(tiny, 'name = "uneven"', "layouts = [{ tp = 3 }, {}]", 'legs = ["cover", "weights"]')
    results = checked(text + f'\n[[check]]\nsource = "{tmp_path / "absent"}"\nlegs = ["cover"]', tmp_path)
    assert [result.leg.status for result in results] == ["failed", "failed", "passed", "passed", "failed"]
    assert "‹tp› 3" in results[0].leg.summary


def test_tolerance_decides_the_forward_leg(peers: Path, tmp_path: Path) -> None:
    """The same sound model under a limit that rounding alone exceeds.

    Experts are summed in another order by the two libraries; dense models are equal to the bit on some processors.
    """
    text = f'[[check]]\nsource = "{peers / "qwen3_moe" / "hf"}"\nlegs = ["forward", "loss"]\ntolerance = '
    assert {result.leg.status for result in checked(text + "1e-12", tmp_path)} == {"failed"}
    assert {result.leg.status for result in checked(text + "1e-4", tmp_path)} == {"passed"}


def test_the_command_writes_both_reports_and_ends_with_the_code(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, xml, text = tmp_path / "checks.toml", tmp_path / "out.xml", tmp_path / "out.md"
    path.write_text(source(tiny, 'legs = ["cover", "weights"]'))
    arguments = ["verify", "ci", str(path), "--junit", str(xml), "--markdown", str(text), "--json"]
    assert main(arguments) == 0
    doc = json.loads(capsys.readouterr().out)
    assert doc["passed"] and [entry["leg"] for entry in doc["results"]] == ["cover", "weights"]
    assert ElementTree.parse(xml).getroot()[0].get("tests") == "2" and "all passed" in text.read_text()
    path.write_text(source(tiny, 'legs = ["cover"]', "layouts = [{ tp = 3 }]"))
    assert main(arguments[:3]) == 1
    assert "did not pass" in capsys.readouterr().out
    assert main(["verify", "ci", str(tmp_path / "absent.toml")]) == 4


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no \\[\\[check\\]\\]"),
        ("[[check]]\n", "it needs `source`"),
        ('[[check]]\nsource = "a"\nleft = "b"', "it needs `source`"),
        ('[[check]]\nsource = "a"\nlegs = []', "legs ="),
        ('[[check]]\nsource = "a"\nlegs = ["colour"]', "legs ="),
        ('[[check]]\nsource = "a"\nlayouts = [{ pt = 2 }]', "'pt'"),
        ('[[check]]\nsource = "a"\nlegs = [["cover"]]', "legs ="),
        ('[[check]]\nsource = "a"\nname = ["b"]', "name ="),
        ('[[check]]\nsource = "a"\nlayouts = []', "layouts ="),
        ('[[check]]\nsource = "a"\nlayouts = [{ tp = "2" }]', "layout tp ="),
        ('[[check]]\nsource = "a"\nlayouts = [{ tp = true }]', "layout tp ="),
        ('[[check]]\nsource = "a"\nlayouts = [{ pp = 2.0 }]', "layout pp ="),
        ('[[check]]\nsource = "a"\nlayouts = [{ pipeline = 2 }]', "layout pipeline ="),
        ('[[check]]\nleft = "a"\nright = "b"\nlayouts = [{ tp = 2 }]', "layouts with"),
        ('[[check]]\nleft = "a"\nright = "b"\nformat = "torch"', "format with"),
        ('[[check]]\nleft = "a"\nright = "b"\nlegs = ["round-trip"]', "round trip"),
        ('[[check]]\nsource = "a"\ndtype = "fp32"\nlegs = ["round-trip"]', "round trip"),
        ('[[check]]\nsource = "a"\ntolerance = "small"', "tolerance"),
        ('[[check]]\nsource = "a"\ntolerance = nan', "tolerance"),
        ('[[check]]\nsource = "a"\ntolerance = inf', "tolerance"),
        ('[[check]]\nsource = "a"\ntolerance = -1', "tolerance"),
        ('[[check]]\nsource = "a"\ntokens = 0', "tokens"),
        ('[[check]]\nsource = "a"\nmax_memory = "1KB"', "too small"),
        ('[[check]]\nsource = "a"\n[[check]]\nsource = "b/a"', "two checks"),
        ('[[check]]\nsource = "a"\nspeed = 3', "unknown key speed"),
        ("[checks]\n", "unknown section"),
        ("[[check]\n", "cannot be read"),
    ],
)
def test_a_file_that_says_something_else_is_refused(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says):
        checked(text, tmp_path)


def test_an_absent_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MbxError, match="there is no"):
        read_checks(tmp_path / "mbx-ci.toml")


def test_the_checks_of_this_project_can_be_read() -> None:
    checks = read_checks(Path(__file__).parents[2] / "mbx-ci.toml")
    assert {Path(check.source or "").name for check in checks} == {"llama", "qwen2", "qwen3", "mistral"}
    assert any("forward" in check.legs for check in checks)
    assert described(Layout(tp=2, pp=2)) == "tp2 pp2" and described(Layout()) == "tp1"


def test_a_table_is_checked_on_a_small_model_of_it(tmp_path: Path) -> None:
    """With every leg, forward included; the model is the same each time."""
    results = checked('[[check]]\nsource = "qwen2"\n', tmp_path)
    assert {result.leg.name: result.leg.status for result in results} == dict.fromkeys(
        ("cover", "config", "weights", "round-trip", "forward"), "passed"
    )
    assert results[0].check == "qwen2"


@pytest.mark.parametrize("name", ["mimo", "llama_nemotron", "sarvam_moe"])
def test_a_table_without_a_class_in_transformers_says_that_it_is_not_possible(name: str, tmp_path: Path) -> None:
    results = checked(f'[[check]]\nsource = "{name}"\n', tmp_path)
    assert results and not any(result.passed for result in results)
    assert "not possible: transformers" in results[0].leg.summary and f"`{name}`" in results[0].leg.summary


def test_queries_scaled_by_position_pass_every_leg(tmp_path: Path) -> None:
    """Transformers' Ministral 3 repeats the context length among its rotary settings."""
    results = checked('[[check]]\nsource = "ministral3"\n', tmp_path)
    legs = dict.fromkeys(("cover", "config", "weights", "round-trip", "forward"), "passed")
    assert {result.leg.name: result.leg.status for result in results} == legs


def test_a_megatron_checkpoint_is_a_source(tiny: Path, tmp_path: Path) -> None:
    good = convert(tiny / NAME, tmp_path / "mcore")
    results = checked(f'[[check]]\nsource = "{good}"\nlayouts = [{{ tp = 2 }}]\n', tmp_path)
    assert statuses(results) == {
        ("tp2", leg): "passed" for leg in ("cover", "config", "weights", "round-trip", "forward")
    }
