"""What stops a run, what is refused before it starts, and what it writes down."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
from _trainings import QWEN3, raw, run_here

from converters.errors import DeviceError, DifferenceError, LayoutError, MbxError, UsageError
from mbx.train.data.rows import Pattern, Row
from mbx.train.model.build import first_microbatch
from mbx.train.recipe.parse import parse_recipe
from mbx.train.run.dataset import Dataset
from mbx.train.run.log import METRICS, Log, Step, chart, line
from mbx.train.run.loop import train
from mbx.train.run.prepare import prepare
from mbx.train.run.report import read_metrics, write_report


def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    """A global batch has one loss, however it is cut into micro-batches."""
    cuts = [run_here(raw(tmp_path / str(n), train={"steps": 5, "micro_batch": n})) for n in (1, 4, 8)]
    assert np.abs(np.diff(cuts, axis=0)).max() < 1e-4


def test_evaluation_and_metrics(tmp_path: Path) -> None:
    losses = run_here(raw(tmp_path / "run", train={"steps": 4, "eval_every": 2, "eval_steps": 1}))
    records = [json.loads(text) for text in (tmp_path / "run" / METRICS).read_text().splitlines()]
    assert [r["loss"] for r in records if r["kind"] == "step"] == losses
    assert [r["step"] for r in records if r["kind"] == "eval"] == [2, 4]
    report = write_report(tmp_path / "run")
    assert "<polyline" in report.read_text() and report.suffix == ".html"
    assert len(read_metrics(tmp_path / "run")[0]) == 4
    with pytest.raises(UsageError, match=r"\.html or \.png"):
        write_report(tmp_path / "run", tmp_path / "x.pdf")


def test_validation_is_one_pass_per_token_whatever_the_batch(tmp_path: Path) -> None:
    """Five chats of different lengths, of which batches of two and of four leave some over: Transformers' own mean."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.listed_examples import read_examples

    path = tmp_path / "d.jsonl"
    lines = [{"prompt": "go " * n, "completion": "on " * (7 - n)} for n in range(1, 6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = []
    for kind, micro, total, packed in (("completion", 1, 2, False), ("completion", 2, 4, True), ("text", 2, 4, False)):
        if kind == "text":
            path = tmp_path / "d.txt"
            path.write_text("the lazy dog does not mind " * 9)
        run = tmp_path / f"{micro}{kind}"
        run_here(
            raw(
                run,
                train={"steps": 1, "eval_every": 1, "micro_batch": micro, "global_batch": total},
                data={"kind": kind, "path": str(path), "eval_path": str(path), "pack": packed},
                optim={"lr": 0.0},
                run={"save": False},
            )
        )
        found.append(json.loads((run / METRICS).read_text().splitlines()[1])["loss"])
    recipe = parse_recipe(raw(tmp_path / "x", data={"kind": "completion", "length": 32}))
    tokenizer, model = _tokenizer(), AutoModelForCausalLM.from_pretrained(QWEN3, dtype=torch.float32)
    sums = []
    for file, kind, length in ((tmp_path / "d.jsonl", "completion", 99), (tmp_path / "d.txt", "text", 32)):
        data, loss, tokens = dataclasses.replace(recipe.data, kind=kind), 0.0, 0
        for example in read_examples(data, file, tokenizer):
            for at in range(0, len(example.tokens) - 1, length):  # a text is cut into rows
                ids = torch.tensor(example.tokens[at : at + length + 1])[None]
                labels = ids.masked_fill(~torch.tensor(example.learn[at : at + length + 1])[None], -100)
                count = int((labels[:, 1:] != -100).sum())
                loss, tokens = loss + float(model(ids, labels=labels).loss) * count, tokens + count
        sums.append(loss / tokens)
    assert np.abs(np.subtract(found, [sums[0], *sums])).max() < 1e-5


def _tokenizer():  # type: ignore[no-untyped-def]
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(QWEN3)


@dataclasses.dataclass(frozen=True)
class Poisoned:
    """Rows whose loss is not a number from row `bad` on: their weights are infinite."""

    bad: int
    weight: float
    good: Pattern = Pattern(251, 32, 1234)

    def row(self, index: int) -> Row:
        row = self.good.row(index)
        return row if index < self.bad else dataclasses.replace(row, mask=np.full(32, self.weight, np.float32))


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    recipe = raw(tmp_path / "run", train={"steps": 6}, run={"save_every": 1})
    prepared = dataclasses.replace(prepare(parse_recipe(recipe)), data=Dataset(Poisoned(24, float("nan"))))
    with pytest.raises(DifferenceError, match="step 4: the loss is nan"):
        train(prepared, live=False)
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "3"


def test_a_spike_stops_the_run(tmp_path: Path) -> None:
    recipe = parse_recipe(raw(tmp_path / "run", train={"steps": 6, "spike_factor": 1.05}, optim={"lr": 10.0}))
    with pytest.raises(DifferenceError, match="spike_factor"):
        train(prepare(recipe), live=False)


@pytest.mark.parametrize(
    ("sections", "error", "words"),
    [
        ({"data": {"length": 4096}}, UsageError, "exceeds the model's 512 positions"),
        ({"data": {"kind": "chat"}}, UsageError, "needs a file"),
        ({"model": {"path": "/nowhere"}}, MbxError, "no folder"),
        ({"model": {"path": ""}}, UsageError, "no model is named"),
        ({"parallel": {"tp": 3}}, LayoutError, "parallel.tp 3 does not divide num_attention_heads"),
        ({"parallel": {"tp": 2}}, UsageError, "does not divide the world"),
        ({"parallel": {"ep": 2}}, LayoutError, "parallel.ep 2: this model has no experts"),
        ({"parallel": {"pp": 2, "vpp": 4}}, LayoutError, "16|layers"),
        ({"fp8": {"recipe": "delayed"}}, UsageError, "precision=bf16"),
        ({"fp8": {"recipe": "delayed"}, "train": {"precision": "bf16"}}, DeviceError, "needs a GPU"),
        ({"run": {"kernels": "te"}}, DeviceError, "transformer_engine"),
        ({"run": {"device": "cuda"}}, DeviceError, "there is none"),
        ({"model": {"config": {"gradient_accumulation_fusion": True}}}, DeviceError, "Apex"),
        ({"lora": {"rank": 4, "targets": ["q_prooj"]}}, UsageError, "q_prooj"),
        ({"lora": {"rank": 4, "targets": ["linear_kv_up_proj"]}}, UsageError, "linear_kv_up_proj"),
        ({"data": {"kind": "chat", "path": "x"}, "parallel": {"cp": 2}}, UsageError, "world"),
    ],
)
def test_refused_before_anything_runs(
    tmp_path: Path, sections: dict[str, dict[str, object]], error: type[MbxError], words: str
) -> None:
    with pytest.raises(error, match=words):
        prepare(parse_recipe(raw(tmp_path / "run", **sections)))
    assert not (tmp_path / "run").exists()


def test_layouts_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(LayoutError, match="parallel.tp 3 does not divide num_attention_heads"):
        prepare(parse_recipe(raw(tmp_path / "run", parallel={"tp": 3})))
    with pytest.raises(UsageError, match="context parallelism"):
        path = tmp_path / "d.jsonl"
        path.write_text("{}")
        prepare(parse_recipe(raw(tmp_path / "run", data={"kind": "chat", "path": str(path)}, parallel={"cp": 2})))


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    import shutil

    shutil.copytree(QWEN3, tmp_path / "hf", ignore=shutil.ignore_patterns("*token*"))
    (tmp_path / "d.jsonl").write_text("{}")
    sections = {"model": {"path": str(tmp_path / "hf")}, "data": {"kind": "chat", "path": str(tmp_path / "d.jsonl")}}
    with pytest.raises(UsageError, match="no tokenizer"):
        prepare(parse_recipe(raw(tmp_path / "run", **sections)))


def test_cached_fp8_weights_are_renewed_at_each_step() -> None:
    """Layers that keep a quantised copy of their weight must be told that a step begins; a frozen one stays right."""
    from torch import nn

    class Layer(nn.Linear):
        is_first_microbatch = False

    frozen = Layer(2, 2).requires_grad_(False)
    model = nn.Sequential(Layer(2, 2), nn.Linear(2, 2), nn.Sequential(Layer(2, 2)), frozen)
    for mark in (first_microbatch(model), model.set_is_first_microbatch):  # the schedule's call is the same
        for layer in model.modules():
            if isinstance(layer, Layer):
                layer.is_first_microbatch = False
        mark()
        assert [m.is_first_microbatch for m in model.modules() if isinstance(m, Layer)] == [True, True, False]


def test_log_line_and_plot() -> None:
    step = Step(7, 2.5, 1e-4, 0.5, 4096, 0.5, 8192.0, 300.0, 0.4, 20.0)
    assert line(step, 100).startswith(
        "step   7/100  loss 2.5000  lr 0.0001  grad 0.500  8,192 tok/s  300.0 TFLOP/s (40.0% MFU)"
    )
    assert line(step, 100).endswith("  0.50 s  46 s left") and line(step, 7).endswith("  0.50 s")
    drawn = chart([3.0, 2.0, float("nan"), 1.0], height=2).splitlines()
    assert drawn == ["    3.000 █", "    1.000 ██ ▁"]
    assert chart([]) == "" and chart([2.0, 2.0], height=1) == "    2.000 ▁▁"


class Terminal(io.StringIO):
    """A stderr that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("first_s", "told"), [(70.0, True), (4.0, False), (11.0, False)])
def test_a_slow_first_step_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], first_s: float, told: bool
) -> None:
    log = Log(parse_recipe(raw(tmp_path / "run")), main=True, live=False)
    for number, took in enumerate((first_s, 4.0, 4.0), 1):
        log.step(Step(number, 1.0, 1e-3, 1.0, 64, took, 64 / took, 1.0, 0.0, 1.0))
    said = capsys.readouterr().err
    assert said.count("kernels were compiled") == told
    log.close()


def test_without_messages_it_records_and_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(parse_recipe(raw(tmp_path / "run")), main=True, messages=False)
    log.step(Step(1, 1.0, 1e-3, 1.0, 64, 1.0, 64.0, 1.0, 0.0, 1.0))
    log.message("a line")
    log.close()
    said = capsys.readouterr()
    assert said.out == said.err == "" and '"loss": 1.0' in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_the_live_view_draws_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    log = Log(parse_recipe(raw(tmp_path / "run")), main=True)
    for number, loss in enumerate((6.0, 5.0, 4.5), 1):
        log.step(Step(number, loss, 1e-4, 0.5, 64, 0.5, 128.0, 0.0, 0.0, 1.0))
    log.message("a line beside it")
    log.close()
    shown = screen.getvalue()
    assert "mbx train: custom" in shown and "3/20" in shown and "6.000" in shown and "█" in shown
    assert "a line beside it" in shown


@pytest.mark.parametrize(("key", "value", "package"), [("tensorboard", True, "tensorboard"), ("wandb", "x", "wandb")])
def test_missing_loggers_are_named(tmp_path: Path, key: str, value: object, package: str) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(UsageError, match=f"{package} is not installed"):
        prepare(parse_recipe(raw(tmp_path / "run", run={key: value})))
