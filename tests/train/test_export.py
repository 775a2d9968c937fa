"""What a run leaves behind loads in Transformers and PEFT, with Megatron Core's own values."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from _trainings import QWEN3, Raw, raw, run_here
from safetensors.torch import load_file, save_file

from converters.errors import UsageError
from fixtures.make_tiny import make
from mbx.formats import hf
from mbx.formats.peft import CONFIG, WEIGHTS
from mbx.models.megatron.build import build_model
from mbx.models.megatron.core.cpu import megatron_on_cpu
from mbx.models.megatron.processes import process_group
from mbx.run.job import Options, plan_hf_to_mcore, run
from mbx.train.checkpoints.export import export_run
from mbx.train.checkpoints.state import RECIPE
from mbx.train.model.blueprint import blueprint
from mbx.train.recipe.parse import parse_recipe
from tests.judge import load_torch_dist
from tests.oracles import compare_logits, hf_logits, mcore_logits

STEPS = 4


def short(run_dir: Path, **sections: dict[str, object]) -> Raw:
    base = raw(run_dir, train={"steps": STEPS}, optim={"lr": 1e-2, "schedule": "constant"}, **sections)
    return base


@pytest.fixture(scope="module")
def fp32_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Qwen3 stored in fp32, so that merging rounds nothing away."""
    folder = tmp_path_factory.mktemp("base")
    model = transformers.AutoModelForCausalLM.from_pretrained(QWEN3, dtype=torch.float32)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(QWEN3).save_pretrained(folder)
    return folder


def batch(recipe: Raw, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels of one global batch, [8, 32]."""
    from mbx.train.data.rows import Pattern

    rows = [Pattern(251, 32, 1234).row(8 * step + n) for n in range(8)]
    return tuple(torch.stack([torch.from_numpy(getattr(r, x)) for r in rows]) for x in ("tokens", "labels"))  # type: ignore[return-value]


def test_full_training_round_trip(tmp_path: Path) -> None:
    recipe = short(tmp_path / "run")
    run_here(recipe)
    target, kind = export_run(tmp_path / "run", tmp_path / "hf")
    assert kind == "Hugging Face model"
    ids = torch.randint(0, 251, (2, 40), generator=torch.Generator().manual_seed(1))
    with megatron_on_cpu(), process_group():
        model = build_model(blueprint(parse_recipe(recipe)).config)
        load_torch_dist(model, tmp_path / "run" / f"iter_{STEPS:07d}")
        trained = mcore_logits(model, ids, vocab_size=251)
    assert compare_logits(hf_logits(target, ids), trained).ok
    assert not compare_logits(hf_logits(QWEN3, ids), trained).ok, "training must have changed something"


@pytest.mark.parametrize("dora", [False, True])
def test_adapters(tmp_path: Path, fp32_base: Path, dora: bool) -> None:
    """Applied by Megatron Core = applied by PEFT = merged; and read back they continue where they were."""
    recipe = short(tmp_path / "run", model={"path": str(fp32_base)}, lora={"rank": 4, "alpha": 8.0, "dora": dora})
    losses = run_here(recipe)
    adapter, _ = export_run(tmp_path / "run", tmp_path / "adapter")
    merged, _ = export_run(tmp_path / "run", tmp_path / "merged", merged=True)
    tokens, labels = batch(recipe, 0)

    base = transformers.AutoModelForCausalLM.from_pretrained(fp32_base, dtype=torch.float32)
    with torch.no_grad():
        plain = base(tokens).logits
        applied = peft.PeftModel.from_pretrained(base, str(adapter)).eval()(tokens).logits
        together = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(tokens).logits
    assert (applied - together).abs().max() < 1e-4
    assert (applied - plain).abs().max() > 1e-2
    assert losses[0] == pytest.approx(
        torch.nn.functional.cross_entropy(plain.flatten(0, 1), labels.flatten()).item(), abs=1e-5
    )

    again = short(
        tmp_path / "again",
        model={"path": str(fp32_base)},
        lora={"rank": 4, "alpha": 8.0, "dora": dora, "adapter": str(adapter)},
    )
    again["train"] = {**again["train"], "steps": 1}
    reference = torch.nn.functional.cross_entropy(applied.flatten(0, 1), labels.flatten()).item()
    assert run_here(again)[0] == pytest.approx(reference, abs=1e-5)


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path, fp32_base: Path) -> None:
    model = {"path": str(fp32_base)}
    run_here(short(tmp_path / "run", model=model, lora={"rank": 4, "targets": ["linear_qkv"]}))
    adapter, _ = export_run(tmp_path / "run", tmp_path / "adapter")
    for number, (lora, words) in enumerate(
        [
            ({"rank": 8}, "r=4"),
            ({"rank": 4, "alpha": 4.0, "targets": ["linear_qkv"]}, "lora_alpha=32"),
            ({"rank": 4, "targets": ["linear_proj"]}, "lora.targets does not"),
        ]
    ):
        again = short(tmp_path / f"run{number}", model=model, lora={**lora, "adapter": str(adapter)})
        with pytest.raises(UsageError, match=words):
            run_here(again)
    tensors = load_file(adapter / WEIGHTS)
    tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 32)
    tensors["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"] = torch.zeros(96, 4)
    save_file(tensors, adapter / WEIGHTS)
    config = json.loads((adapter / CONFIG).read_text())
    config["target_modules"] = [*config["target_modules"], "up_proj"]
    (adapter / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UsageError, match="up_proj"):
        lora = {"rank": 4, "targets": ["linear_qkv"], "adapter": str(adapter)}
        run_here(short(tmp_path / "run9", model=model, lora=lora))


def test_only_adapters_are_trained(tmp_path: Path) -> None:
    from mbx.formats.torch_dist import find_iteration
    from mbx.torchfile.dcp import read_dcp

    run_here(short(tmp_path / "run", lora={"rank": 2, "targets": ["linear_proj"]}))
    names = read_dcp(find_iteration(tmp_path / "run")).tensors
    assert names
    assert all(".linear_proj.lora_" in name for name in names)


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_text"])
def test_gated_norms_keep_the_values_of_a_16_bit_run(family: str, tmp_path: Path) -> None:
    """Megatron Core trains gamma, the folder holds 1 + gamma: 16 bits would round it, and the logits with it."""
    source = make(family, tmp_path / "hf")
    trained = load_file(source / "model.safetensors")
    steps = torch.Generator().manual_seed(2)
    for name in (name for name in trained if name.endswith("linear_attn.norm.weight")):
        trained[name] = trained[name].float() + 0.02 * torch.randn(trained[name].shape, generator=steps)
    save_file(trained, source / "model.safetensors", {"format": "pt"})
    made = run(plan_hf_to_mcore(source, tmp_path / "run", Options(dtype="bf16", sync=False))).target
    iteration = next(made.glob("iter_*"))
    (iteration / "hf" / hf.KEPT).unlink()  # a conversion's, which a run does not leave
    (iteration / RECIPE).write_text(json.dumps({"lora": {"rank": 0}}))
    target, _ = export_run(made, tmp_path / "out")
    exported = load_file(target / "model.safetensors")
    norms = [name for name in exported if name.endswith("linear_attn.norm.weight")]
    wanted = {}
    for name, tensor in trained.items():
        gamma = (tensor.float() - 1).bfloat16().float()
        wanted[name] = 1 + gamma if name in norms else tensor.bfloat16().float()
    assert norms and all(torch.equal(exported[name].float(), wanted[name]) for name in wanted)
    assert {exported[name].dtype for name in exported if name not in norms} == {torch.bfloat16}

    ids = torch.randint(0, 251, (2, 40), generator=torch.Generator().manual_seed(1))
    written = hf_logits(target, ids)
    model = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    model.load_state_dict(wanted, strict=False)
    with torch.no_grad():
        assert compare_logits(model(ids).logits, written).ok
        rounded = {name: wanted[name].bfloat16().float() for name in norms}
        model.load_state_dict(rounded, strict=False)
        assert compare_logits(model(ids).logits, written).max_abs > 1e-2, "rounding must show"


@pytest.mark.parametrize("lora", [{}, {"rank": 2, "targets": ["linear_qkv", "linear_fc1"]}])
def test_a_folder_beside_a_run_is_what_its_checkpoint_gives(tmp_path: Path, lora: dict[str, object]) -> None:
    """Out of the live model, and out of what was stored of it: file by file."""
    recipe = short(tmp_path / "run", lora=lora)
    run_here({**recipe, "run": {**recipe["run"], "export_every": STEPS}})
    target, _ = export_run(tmp_path / "run", tmp_path / "stored")
    live = tmp_path / "run" / "export" / f"step_{STEPS:07d}"
    names = {path.name for path in target.iterdir()}
    assert names == {path.name for path in live.iterdir()}
    for name in names - {hf.MANIFEST}:  # which names its source
        assert (live / name).read_bytes() == (target / name).read_bytes(), name
