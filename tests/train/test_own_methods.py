"""A method of adapters of the user's own: (IA)³, as the example has it, against PEFT's, under two layouts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _trainings import ROOT, Raw, raw, run_here, run_world

from converters.errors import UnsupportedError, UsageError
from mbx.train.checkpoints.export import export_run
from mbx.train.data.rows import Pattern
from mbx.train.recipe.parse import parse_recipe
from mbx.train.run.hooks import load_hooks
from mbx.train.run.prepare import prepare

QWEN2 = ROOT / "fixtures" / "tiny" / "qwen2"  # with biases on queries, keys and values
EXAMPLE = ROOT / "examples" / "own_adapter.sh"
STEPS, LENGTH, VOCABULARY, PADDING = 4, 32, 251, 5
STEADY: dict[str, object] = {"lr": 0.05, "schedule": "constant"}
IA3: dict[str, object] = {"method": "ia3", "rank": 1, "targets": ["k_proj", "v_proj", "down_proj"]}


def own_file(folder: Path) -> Path:
    """The file that the example writes."""
    file = folder / "ia3.py"
    file.write_text(EXAMPLE.read_text().partition("<<'END'\n")[2].partition("\nEND\n")[0] + "\n")
    return file


def recipe(run_dir: Path, **sections: dict[str, object]) -> Raw:
    asked = {"lora": IA3, "model": {"path": str(QWEN2), "vocab_divisor": 64}, "optim": STEADY, **sections}
    asked["train"] = {"steps": STEPS, "eval_every": STEPS, "eval_steps": 1, **sections.get("train", {})}
    return raw(run_dir, **asked)


def validated(run_dir: Path) -> float:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return next(float(record["loss"]) for record in lines if record["kind"] == "eval")


def losses_of(model: torch.nn.Module) -> float:
    """Transformers' mean over the run's validation rows, with logits of 0 where the run's embedding is padded."""
    rows = [Pattern(VOCABULARY, LENGTH, 1235).row(n) for n in range(8)]
    tokens, labels = (
        torch.from_numpy(np.stack([getattr(row, name) for row in rows])) for name in ("tokens", "labels")
    )
    with torch.no_grad():
        logits = F.pad(model(tokens).logits, (0, PADDING))
    return float(F.cross_entropy(logits.flatten(0, 1), labels.flatten()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    """A folder of runs, and the losses of each: by one process, by ranks of two layouts, and stopped and resumed."""
    folder = tmp_path_factory.mktemp("methods")
    file = own_file(folder)
    hooks = load_hooks(file)
    job = {"recipe": recipe(folder / "tp", parallel={"tp": 2}), "hooks": str(file)}
    found = {
        "tp": run_world(2, [job], folder / "losses.json")[0],
        "one": run_here(recipe(folder / "one"), hooks=hooks),
    }
    found["parts"] = run_here(recipe(folder / "parts", train={"steps": 2, "eval_every": 0}), hooks=hooks)
    found["parts"] += run_here(recipe(folder / "parts"), hooks=hooks, resume=True)
    return folder, found


def test_two_ranks_train_as_one_does(trained: tuple[Path, dict[str, list[float]]]) -> None:
    _, found = trained
    assert found["tp"] == pytest.approx(found["one"], abs=1e-4)
    assert found["one"][-1] < found["one"][0] - 0.02


def test_a_resumed_run_goes_on(trained: tuple[Path, dict[str, list[float]]]) -> None:
    _, found = trained
    assert found["parts"] == found["one"]


@pytest.mark.parametrize("run", ["one", "tp"])
def test_peft_computes_what_was_trained(
    trained: tuple[Path, dict[str, list[float]]], run: str, tmp_path: Path
) -> None:
    """An exported folder, read by PEFT, has the validation loss that the run had; the base has another."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, _ = trained
    export_run(folder / run, tmp_path / "adapter", method=load_hooks(own_file(tmp_path)).methods["ia3"])
    base = AutoModelForCausalLM.from_pretrained(QWEN2, dtype=torch.float32)
    plain = losses_of(base)
    adapted = losses_of(PeftModel.from_pretrained(base, tmp_path / "adapter").eval())
    assert adapted == pytest.approx(validated(folder / run), abs=1e-4)
    assert abs(adapted - plain) > 0.01


def test_what_a_method_does_not_do_is_refused(tmp_path: Path) -> None:
    hooks = load_hooks(own_file(tmp_path))
    cases: list[tuple[dict[str, dict[str, object]], type[Exception], str]] = [
        ({"lora": {**IA3, "method": "ia4"}}, UsageError, "lora.method=ia4: no file of yours has it"),
        ({"lora": {**IA3, "dora": True}}, UnsupportedError, "takes no lora.dora"),
        ({"lora": {**IA3, "targets": ["lm_head", "k_proj"]}}, UnsupportedError, "adapts no `output_layer"),
        ({"run": {"export_every": 1}}, UnsupportedError, "takes no run.export_every"),
    ]
    for sections, kind, said in cases:
        with pytest.raises(kind, match=said):
            prepare(parse_recipe(recipe(tmp_path / "run", **sections)), hooks=hooks)


def test_a_run_of_it_needs_its_file(trained: tuple[Path, dict[str, list[float]]], tmp_path: Path) -> None:
    folder, _ = trained
    with pytest.raises(UsageError, match="no file of yours has it"):
        prepare(parse_recipe(recipe(tmp_path / "run")))
    with pytest.raises(UsageError, match="trained by the method `ia3`"):
        export_run(folder / "one", tmp_path / "adapter")
