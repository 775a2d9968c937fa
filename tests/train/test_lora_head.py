"""Adapters on the output layer, tied or apart, and on a router, a linear of Transformers or a parameter."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from _trainings import QWEN3, Raw, raw, run_here, run_world
from safetensors.torch import load_file, save_file
from test_modules_to_save import loss
from test_proof import failed, recipe

from converters.errors import UnsupportedError
from fixtures.make_tiny import make
from mbx.formats.peft import CONFIG, WEIGHTS
from mbx.train.checkpoints.export import export_run
from mbx.train.lora.attach import check_lora
from mbx.train.model.blueprint import blueprint
from mbx.train.proof.training import verify_training
from mbx.train.recipe.parse import parse_recipe

#: Family → what is adapted beside attention, and the module as PEFT names it.
BASES = {"qwen3": "lm_head", "qwen3_tied": "lm_head", "qwen3_moe": "gate", "llama4_scout": "router"}
LINEAR = pytest.param("llama4_scout", marks=pytest.mark.slow)

#: A vocabulary of 251 in 252 rows.
PADDING = 1


@pytest.fixture(
    scope="module", params=[pytest.param("qwen3", marks=pytest.mark.slow), "qwen3_tied", "qwen3_moe", LINEAR]
)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in fp32, so that merging rounds nothing away."""
    folder = tmp_path_factory.mktemp("base")
    source = make(request.param, folder / "stored")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.save_pretrained(folder / request.param)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder / request.param)
    return folder / request.param


def short(run: Path, base: Path, steps: int = 2, **lora: object) -> Raw:
    targets = ["q_proj", BASES.get(base.name, "lm_head")]
    return raw(
        run,
        model={"path": str(base), "vocab_divisor": 4},
        train={"steps": steps},
        optim={"lr": 1e-2, "schedule": "constant"},
        lora={"rank": 4, "alpha": 8.0, "targets": targets, **lora},
        run={"export_every": 2},
    )


def test_what_is_exported_is_what_was_trained(base: Path, tmp_path: Path) -> None:
    """The live model's next loss is PEFT's and the merged model's, and a run that begins from the export has it."""
    whole = run_here(short(tmp_path / "whole", base, 4))
    assert run_here(short(tmp_path / "run", base)) == whole[:2]
    adapter, _ = export_run(tmp_path / "run", tmp_path / "adapter")
    merged, _ = export_run(tmp_path / "run", tmp_path / "merged", merged=True)
    tensors = load_file(adapter / WEIGHTS)
    assert (tmp_path / "run" / "export" / "step_0000002" / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()
    moved = [tensor for name, tensor in tensors.items() if f".{BASES[base.name]}.lora_B" in name]
    assert moved and all(float(tensor.abs().max()) > 1e-3 for tensor in moved)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    live = peft.PeftModel.from_pretrained(plain, str(adapter)).eval()
    assert not live.load_adapter(str(adapter), "default").unexpected_keys
    assert loss(live, 2, PADDING) == pytest.approx(whole[2], abs=1e-5)
    together = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert loss(together, 2, PADDING) == pytest.approx(whole[2], abs=1e-5)
    live.save_pretrained(str(tmp_path / "peft"))  # which saves the vocabulary's layers as well where one is adapted
    first = [loss(live, 0, PADDING)]  # a new run reads the first rows
    for start in ("run", "peft"):
        again = short(tmp_path / f"from-{start}", base, 1, adapter=str(tmp_path / start))
        assert run_here(again) == pytest.approx(first, abs=1e-5)
    assert run_here(short(tmp_path / "run", base, 4), resume=True) == whole[2:]


def test_what_peft_has_no_place_for_is_refused(tmp_path: Path) -> None:
    head = {"rank": 4, "alpha": 8.0, "targets": ["lm_head"]}
    router = {**head, "targets": ["gate"]}
    tied, experts = make("qwen3_tied", tmp_path / "tied"), make("qwen3_moe", tmp_path / "moe")
    for hf, lora, said in (
        (QWEN3, {**head, "modules_to_save": ["lm_head"]}, "trained whole"),
        (tied, {**head, "modules_to_save": ["embed_tokens"]}, "trained whole"),
        (QWEN3, {**head, "dora": True}, "DoRA on `output_layer.weight`"),
        (experts, {**router, "dora": True}, "DoRA on `decoder.layers.0.mlp.router.weight`"),
    ):
        asked = parse_recipe(raw(tmp_path / "run", model={"path": str(hf)}, lora=lora))
        with pytest.raises(UnsupportedError, match=said):
            check_lora(asked, blueprint(asked))


def test_a_head_of_another_base_is_refused(tmp_path: Path) -> None:
    """PEFT saves the output layer that it adapts: one that is not the base's was trained, or enlarged."""
    lora = {"rank": 4, "alpha": 8.0, "targets": ["lm_head"]}
    run_here(raw(tmp_path / "run", model={"path": str(QWEN3)}, train={"steps": 1}, lora=lora))
    adapter, _ = export_run(tmp_path / "run", tmp_path / "adapter")
    tensors = load_file(adapter / WEIGHTS)
    tensors["base_model.model.lm_head.base_layer.weight"] = torch.ones(251, 64)
    save_file(tensors, adapter / WEIGHTS)
    again = raw(tmp_path / "again", model={"path": str(QWEN3)}, lora={**lora, "adapter": str(adapter)})
    with pytest.raises(UnsupportedError, match="trained whole"):
        run_here(again)


@pytest.mark.parametrize("family", ["mixtral", "minimax_m2"])
def test_a_router_that_transformers_renames_is_refused(family: str, tmp_path: Path) -> None:
    lora = {"rank": 4, "alpha": 8.0, "targets": ["gate"]}
    with pytest.raises(UnsupportedError, match="block_sparse_moe.gate"):
        run_here(raw(tmp_path / "run", model={"path": str(make(family, tmp_path / "hf"))}, lora=lora))


def test_ranks_and_alphas_of_a_router_are_pefts(tmp_path: Path) -> None:
    """PEFT matches patterns with the name of the parameter, and takes no dropout there."""
    lora = {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "gate"], "dropout": 0.1}
    patterns = {"rank_pattern": {"gate": 2}, "alpha_pattern": {"gate": 6.0}}
    run_here(
        raw(
            tmp_path / "run",
            model={"path": str(make("qwen3_moe", tmp_path / "moe"))},
            train={"steps": 1},
            lora={**lora, **patterns},
        )
    )
    adapter, _ = export_run(tmp_path / "run", tmp_path / "adapter")
    said = json.loads((adapter / CONFIG).read_text())
    assert said["lora_dropout"] == 0.0 and said["target_modules"] == ["q_proj"]
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32)
    live = peft.PeftModel.from_pretrained(plain, str(adapter))
    routers = [module for name, module in live.named_modules() if name.endswith("mlp.gate") and hasattr(module, "r")]
    assert routers and all((m.r["default"], m.scaling["default"]) == (2, 3.0) for m in routers)


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["tp", "pp"])
def test_the_proof_passes_on_two_processes(axis: str, tmp_path: Path) -> None:
    """Under PP 2 the first stage trains nothing where the output layer alone is adapted."""
    cases = [("qwen3", ["lm_head"]), ("llama_tied", ["lm_head", "q_proj"])]
    cases += [("qwen3_moe", ["gate", "lm_head"])] if axis == "pp" else []
    lora = {"rank": 4, "alpha": 6.0}
    jobs = [recipe(tmp_path, family, lora={**lora, "targets": t}, parallel={axis: 2}) for family, t in cases]
    found = run_world(2, [{"recipe": job, "verify": True} for job in jobs], tmp_path / "legs.json")
    assert [[leg for leg in legs if leg[1] != "passed"] for legs in found] == [[] for _ in cases]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "target"), [("qwen3", "lm_head"), ("qwen3_moe", "gate"), ("llama4_scout", "router")]
)
def test_the_proof_passes(family: str, target: str, tmp_path: Path) -> None:
    lora = {"rank": 4, "alpha": 6.0, "targets": ["linear_qkv", target]}
    assert failed(verify_training(parse_recipe(recipe(tmp_path, family, lora=lora)))) == set()
