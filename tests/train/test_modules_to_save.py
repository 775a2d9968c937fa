"""The embedding and the output layer trained whole beside adapters: PEFT's modules_to_save, tied or apart."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from _trainings import QWEN3, Raw, raw, run_here, run_world
from safetensors.torch import load_file, save_file
from test_proof import failed, recipe

from converters.errors import UnsupportedError, UsageError
from fixtures.make_tiny import make
from mbx.formats.peft import CONFIG, WEIGHTS
from mbx.run.job import Options
from mbx.run.merge import plan_merge
from mbx.train.budget.predict import predict
from mbx.train.checkpoints.export import export_run
from mbx.train.data.rows import Pattern
from mbx.train.model.blueprint import blueprint
from mbx.train.proof.training import verify_training
from mbx.train.recipe.parse import parse_recipe

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BOTH = ["embed_tokens", "lm_head"]
LORA: dict[str, object] = {"rank": 4, "alpha": 8.0, "targets": ["linear_qkv"], "modules_to_save": BOTH}


@pytest.fixture(scope="module", params=["enlarged", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 in fp32, so that merging rounds nothing away: with eight new tokens, or with tied weights."""
    folder = tmp_path_factory.mktemp("base")
    source = QWEN3 if request.param == "enlarged" else make("qwen3_tied", folder / "stored")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    if request.param == "enlarged":
        tokenizer.add_tokens([f"<new{n}>" for n in range(8)])
        model.resize_token_embeddings(251 + 8)
    model.save_pretrained(folder / request.param)
    tokenizer.save_pretrained(folder / request.param)
    return folder / request.param


def short(run: Path, base: Path, steps: int = 2, **lora: object) -> Raw:
    optim = {"lr": 1e-2, "schedule": "constant"}
    return raw(run, model={"path": str(base)}, train={"steps": steps}, optim=optim, lora={**LORA, **lora})


def loss(model: torch.nn.Module, step: int, padding: int = 0) -> float:
    """Of one global batch, [8, 32]; `padding` rows of the vocabulary stand behind Transformers' and give zeros."""
    rows = [Pattern(model.config.vocab_size, 32, 1234).row(8 * step + n) for n in range(8)]  # type: ignore[union-attr, arg-type]
    tokens, labels = (torch.stack([torch.from_numpy(getattr(r, x)) for r in rows]) for x in ("tokens", "labels"))
    with torch.no_grad():
        logits = torch.nn.functional.pad(model(tokens).logits, (0, padding))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()


def test_what_is_exported_is_what_was_trained(base: Path, tmp_path: Path) -> None:
    """The live model's next loss is PEFT's and the merged model's, and a run that begins from the export has it."""
    whole = run_here(short(tmp_path / "whole", base, 4))
    assert run_here(short(tmp_path / "run", base)) == whole[:2]
    adapter, _ = export_run(tmp_path / "run", tmp_path / "adapter")
    merged, _ = export_run(tmp_path / "run", tmp_path / "merged", merged=True)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    tensors = load_file(adapter / WEIGHTS)
    for name in (EMBED, HEAD):
        assert (tensors[f"base_model.model.{name}"] - before[name]).abs().max() > 1e-3
    live = peft.PeftModel.from_pretrained(plain, str(adapter)).eval()
    assert loss(live, 2) == pytest.approx(whole[2], abs=1e-5)
    together = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert loss(together, 2) == pytest.approx(whole[2], abs=1e-5)
    again = short(tmp_path / "again", base, 1, adapter=str(adapter), modules_to_save=[])
    found = json.loads((adapter / CONFIG).read_text())
    assert sorted(found["modules_to_save"]) == BOTH and bool(found.get("ensure_weight_tying")) == (base.name == "tied")
    rows = [loss(live, 0)]  # a new run reads the first rows
    assert run_here(again) == pytest.approx(rows, abs=1e-5)
    again = short(tmp_path / "from_run", base, 1, adapter=str(tmp_path / "run"), modules_to_save=[])
    assert run_here(again) == pytest.approx(rows, abs=1e-5)
    assert run_here(short(tmp_path / "run", base, 4), resume=True) == whole[2:]


def test_other_rows_and_other_modules_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"q_proj is no layer of this model's vocabulary.* embed_tokens, lm_head"):
        run_here(short(tmp_path / "run", QWEN3, modules_to_save=["q_proj"]))
    with pytest.raises(UsageError, match=r"lora\.modules_to_save=embed_tokens, and lora\.rank 0"):
        parse_recipe({"lora": {"modules_to_save": ["embed_tokens"]}})
    run_here(short(tmp_path / "run", QWEN3, 1, modules_to_save=["lm_head"]))
    with pytest.raises(UnsupportedError, match="holds lm_head whole"):
        plan_merge(QWEN3, tmp_path / "run", tmp_path / "merged", Options())
    adapter, _ = export_run(tmp_path / "run", tmp_path / "adapter")
    assert [name for name in load_file(adapter / WEIGHTS) if "lora" not in name] == [f"base_model.model.{HEAD}"]
    with pytest.raises(UsageError, match="holds `lm_head.weight`, which lora.modules_to_save leaves out"):
        run_here(short(tmp_path / "x", QWEN3, adapter=str(adapter), modules_to_save=["embed_tokens"]))
    tensors = load_file(adapter / WEIGHTS)
    name = f"base_model.model.{HEAD}"
    save_file({**tensors, name: torch.cat((tensors[name], tensors[name][:8]))}, adapter / WEIGHTS)
    with pytest.raises(UsageError, match="holds 259 rows of lm_head.weight, and the model 251"):
        run_here(short(tmp_path / "y", QWEN3, adapter=str(adapter), modules_to_save=[]))


def test_the_budget_counts_what_is_trained_whole(base: Path, tmp_path: Path) -> None:
    wanted = json.loads((base / "config.json").read_text())
    layer = wanted["vocab_size"] * wanted["hidden_size"]
    budgets = []
    for modules in ([], BOTH):
        made = parse_recipe(short(tmp_path, base, modules_to_save=modules))
        budgets.append(predict(made, blueprint(made), 1))
    less, more = budgets
    assert (less.counts.whole, more.counts.whole) == (0, layer if base.name == "tied" else 2 * layer)
    assert more.parts["gradients"] - less.parts["gradients"] == 4 * more.counts.whole
    assert more.parts["optimizer"] - less.parts["optimizer"] == 8 * more.counts.whole  # in fp32


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "llama_tied"])
def test_the_proof_passes(family: str, tmp_path: Path) -> None:
    lora = {"rank": 4, "alpha": 6.0, "modules_to_save": BOTH}
    report = verify_training(parse_recipe(recipe(tmp_path, family, lora=lora)))
    assert failed(report) == set()


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["tp", "pp"])
def test_the_proof_passes_on_two_processes(axis: str, tmp_path: Path) -> None:
    lora = {"rank": 4, "alpha": 6.0, "modules_to_save": BOTH}
    jobs = [recipe(tmp_path, family, lora=lora, parallel={axis: 2}) for family in ("qwen3", "llama_tied")]
    found = run_world(2, [{"recipe": job, "verify": True} for job in jobs], tmp_path / "legs.json")
    assert [[leg for leg in legs if leg[1] != "passed"] for legs in found] == [[], []]
