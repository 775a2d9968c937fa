"""Several places of data: one behind the other, or by weights; deterministic, counted in epochs, resumed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from _trainings import QWEN3, raw, run_here

from converters.errors import UsageError
from mbx.cli import main
from mbx.train.data.mixture import Mixture
from mbx.train.data.rows import Examples, Row, example_rows
from mbx.train.data.tokens import Example
from mbx.train.recipe.catalogue import load_recipe
from mbx.train.recipe.mlm_args import from_recipe, to_recipe
from mbx.train.recipe.parse import parse_recipe
from mbx.train.recipe.sections import Data
from mbx.train.recipe.toml import dump_toml
from mbx.untrusted.toml_files import parse_toml


def rows_of(first: int, count: int) -> Examples:
    """`count` rows, each of one example whose tokens are its number from `first` on."""
    examples = [Example(np.full(3, first + n), np.ones(3, np.bool_)) for n in range(count)]
    made = example_rows(Data(kind="completion", length=2, pack=False), examples, 0)
    assert isinstance(made, Examples)
    return made


def number(row: Row) -> int:
    return int(row.tokens[0])


def test_every_stretch_holds_each_parts_share() -> None:
    weights = (0.5, 0.3, 0.2)
    mixture = Mixture([rows_of(0, 40), rows_of(100, 25), rows_of(200, 35)], weights)
    assert mixture.counts == (50, 30, 20) and mixture.count == 100
    seen = Counter[int]()
    for index in range(250):
        seen[number(mixture.row(index)) // 100] += 1
        for part, weight in enumerate(weights):
            assert abs(seen[part] - weight * (index + 1)) <= 1.5


def test_a_part_is_gone_through_whole_before_a_row_comes_again() -> None:
    mixture = Mixture([rows_of(0, 8), rows_of(100, 4)], (0.25, 0.75))  # an epoch: 3 rows of the first, 9 of the second
    drawn = [number(mixture.row(index)) for index in range(6 * mixture.count)]
    for first, count in ((0, 8), (100, 4)):
        own = [one for one in drawn if one // 100 == first // 100]
        passes = [own[at : at + count] for at in range(0, len(own) - count + 1, count)]
        assert all(sorted(each) == list(range(first, first + count)) for each in passes)
        assert len({tuple(each) for each in passes}) > 1  # each in an order of its own
    assert drawn == [number(mixture.row(index)) for index in range(6 * mixture.count)]


def test_a_part_of_little_weight_has_a_row() -> None:
    assert Mixture([rows_of(0, 8), rows_of(100, 4)], (0.999, 0.001)).counts == (12, 1)


@pytest.mark.parametrize(
    ("word", "path"),
    [
        ("data=a.jsonl", "a.jsonl"),
        ("data=a.jsonl,b.jsonl", ("a.jsonl", "b.jsonl")),
        ('data=["a,b.jsonl"]', ("a,b.jsonl",)),
        ("data=[ab].jsonl", "[ab].jsonl"),
        ('data={"a.jsonl"=3,"b.jsonl"=1}', {"a.jsonl": 3.0, "b.jsonl": 1.0}),
    ],
)
def test_overrides_name_several(word: str, path: object) -> None:
    assert load_recipe("qwen3_0_6b_sft", [word]).data.path == path


def test_weights_are_told_one_by_one_and_written_down() -> None:
    recipe = load_recipe("qwen3_0_6b_sft", ["data=x.jsonl", "data.path./d/a b.jsonl=3", "data.path.b.jsonl=1"])
    assert recipe.data.path == {"/d/a b.jsonl": 3.0, "b.jsonl": 1.0} and recipe.data.weights == (0.75, 0.25)
    assert parse_recipe(parse_toml(dump_toml(recipe.to_dict()))) == recipe
    assert parse_recipe(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ({"a": 0.0, "b": 1.0}, "gives a the weight 0"),
        ({"a": -1.0}, "must not be negative"),
        ({"a": "much"}, "must be of type float"),
        (["a", ""], "an empty text"),
        (3, "must be text or a list or a table"),
    ],
)
def test_what_is_no_mixture_is_refused(path: object, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_recipe({"data": {"path": path}})


def test_megatron_lms_blend_is_translated_both_ways() -> None:
    text = "--data-path 0.3 /d/a 0.7 /d/b"
    found = to_recipe(text)
    assert found.result["data"]["path"] == {"/d/a": 0.3, "/d/b": 0.7}  # type: ignore[index]
    flags = from_recipe({"data": found.result["data"]}).flags
    assert text in " ".join(flags)
    with pytest.raises(UsageError, match="a weight stands in front of each path"):
        to_recipe("--data-path 0.3 /d/a 0.7")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Twelve chats, and six completions of other words."""
    monkeypatch.setenv("MBX_CACHE_DIR", str(tmp_path / "cache"))
    chats = [[{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a " * n}] for n in range(1, 13)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    alpaca = [{"instruction": f"do {n}", "input": "", "output": "done"} for n in range(6)]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, alpaca)))
    return tmp_path / "a.jsonl", tmp_path / "b.jsonl"


def test_the_plan_says_what_the_places_come_to(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    a, b = files
    shared = [f"model={QWEN3}", "data.length=64", "data.pack=false", "run.device=cpu", f"run.dir={a.parent / 'run'}"]
    command = ["train", "--recipe", "qwen3_0_6b_sft", *shared, f'data={{"{a}"=1,"{b}"=2}}', "train.epochs=2"]
    command.append("train.global_batch=6")
    assert main([*command, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    data = found["data"]
    assert [(one["place"], one["rows"], one["rows_an_epoch"]) for one in data["mixture"]] == [
        (str(a), 12, 6),
        (str(b), 6, 12),
    ]
    assert (data["rows"], data["examples"], found["recipe"]["train"]["steps"]) == (18, 18, 6)
    assert main([*command, "--show-data=4"]) == 0
    said = capsys.readouterr().out
    assert [line.partition("jsonl:")[2][:2] for line in said.splitlines() if ".jsonl:" in line][:4] == [
        *("1:", "1:"),
        *("2:", "2:"),
    ]
    assert f"66.7% of the rows are from {b}: 4 passes over it" in said
    assert f"33.3% of the rows are from {a}: 1 passes over it" in said
    assert main([*command[:-3], f"data={a},{b}", "--dry-run", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["data"]
    assert (listed["rows"], listed["examples"], listed["mixture"]) == (18, 18, [])


def test_a_mixture_resumes_where_it_was_and_under_its_own_weights_alone(files: tuple[Path, Path]) -> None:
    a, b = files

    def recipe(run: str, steps: int, weights: tuple[float, float] = (1.0, 2.0)) -> dict[str, dict[str, object]]:
        path = {str(a): weights[0], str(b): weights[1]}
        data = {"kind": "auto", "path": path, "length": 48, "eval_share": 0.2}
        train = {"steps": steps, "eval_every": 2, "global_batch": 2, "micro_batch": 1}
        return raw(a.parent / run, data=data, train=train, optim={"schedule": "constant"})

    whole = run_here(recipe("whole", 4))
    first = run_here(recipe("parts", 2))
    assert first + run_here(recipe("parts", 4), resume=True) == whole
    with pytest.raises(UsageError, match="the rows are not those"):
        run_here(recipe("parts", 5, (1.0, 1.0)), resume=True)
