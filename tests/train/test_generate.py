"""What a run trained answers with what it learned; the best checkpoint, early stopping, exports along the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from _trainings import ROOT, raw, run_here

from converters.errors import UsageError
from mbx.cli import main
from mbx.train.checkpoints.best import Best, read_best
from mbx.train.checkpoints.export import export_run
from mbx.train.checkpoints.generate import Sampling, generate
from mbx.train.checkpoints.state import finished
from mbx.train.recipe.parse import parse_recipe

LLAMA = ROOT / "fixtures" / "tiny" / "llama"
QUESTION, ANSWER = "count", "1 2 3 4"


def chats(tmp_path: Path) -> dict[str, object]:
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join([json.dumps({"messages": turns})] * 4))
    return {"kind": "chat", "path": str(path), "length": 64, "pack": False}


def test_a_run_answers_with_what_it_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    train: dict[str, object] = {"steps": 30, "micro_batch": 2, "global_batch": 2}
    recipe = raw(run, model={"path": str(LLAMA)}, data=chats(tmp_path), train=train, optim={"lr": 1e-2})
    losses = run_here({**recipe, "run": {**recipe["run"], "export_every": 20}})
    assert losses[-1] < 0.05
    sampling = Sampling(max_tokens=20)
    assert generate(LLAMA, [QUESTION], sampling) != [ANSWER], "untrained weights do not know it"
    assert [text.strip() for text in generate(run, [QUESTION, QUESTION], sampling)] == [ANSWER] * 2
    exports = sorted(path.name for path in (run / "export").iterdir())
    assert exports == ["step_0000020", "step_0000030"]
    assert main(["train", "generate", str(run / "export" / exports[-1]), "--prompt", QUESTION, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"][0]["answer"].strip() == ANSWER
    assert not list(run.glob(".generate-*"))


def test_an_adapter_answers_on_its_base(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train: dict[str, object] = {"steps": 40, "micro_batch": 2, "global_batch": 2}
    run_here(
        raw(
            run,
            model={"path": str(LLAMA)},
            data=chats(tmp_path),
            train=train,
            optim={"lr": 3e-2},
            lora={"rank": 8, "alpha": 32},
        )
    )
    sampling = Sampling(max_tokens=20)
    answers = generate(run, [QUESTION], sampling)
    adapter, _ = export_run(run, tmp_path / "adapter")
    assert generate(adapter, [QUESTION], sampling, base=LLAMA) == answers
    merged, _ = export_run(run, tmp_path / "merged", merged=True)
    assert generate(merged, [QUESTION], sampling) == answers
    assert answers[0].strip() == ANSWER
    drawn = [generate(merged, [QUESTION], Sampling(20, 2.0, 1.0, seed, raw=True)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_is_nothing_to_generate_from_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no run, no adapter and no model's folder"):
        generate(tmp_path, ["x"], Sampling())


def test_the_best_checkpoint_stays_and_patience_ends_a_run(tmp_path: Path) -> None:
    """Validation on another seed's sequences: training on its own ends up worse there."""
    run = tmp_path / "run"
    keep = {"keep_best": True, "keep": 1, "dir": str(run), "device": "cpu"}
    train: dict[str, object] = {
        "steps": 60,
        "micro_batch": 2,
        "global_batch": 2,
        "eval_every": 2,
        "eval_steps": 1,
        "patience": 3,
    }
    losses = run_here({**raw(run, train=train, optim={"lr": 0.3, "schedule": "constant"}), "run": keep})
    best = read_best(run)
    assert best.waited == 3 and len(losses) == best.step + 6 < 60
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = {r["step"]: r["loss"] for r in records if r["kind"] == "eval"}
    assert best.loss == min(evaluations.values()) == evaluations[best.step]
    assert [path.name for path in finished(run)] == [f"iter_{n:07d}" for n in (best.step, len(losses))]
    export_run(run, tmp_path / "best", best=True)
    export_run(run, tmp_path / "last")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("best", "last")]
    assert weights[0] != weights[1]


def test_best_is_forgotten_behind_a_resumed_step() -> None:
    best = Best().after(2, 3.0).after(4, 3.5)
    assert best == Best(2, 3.0, 1)
    assert best.after(6, 2.0) == Best(6, 2.0, 0)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"train": {"patience": 2}}, "train.patience needs validation"),
        ({"run": {"keep_best": True}}, "run.keep_best needs validation"),
        ({"run": {"export_every": 5, "save": False}}, "run.export_every needs checkpoints"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(
    sections: dict[str, dict[str, object]], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        parse_recipe(raw(tmp_path, **sections))
