"""`mbx.proof.parity` sees every planted defect, in the leg that should see it, and calls nothing passed unseen."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from _planted import Bits, convert, copy, edit, table_with
from safetensors.torch import load_file, save_file

from converters.errors import DeviceError, MbxError, StorageError, UsageError
from converters.mcore.layout import Layout
from converters.rows.config_spelling import canonical
from converters.rows.expr import Value
from fixtures.make_tiny import make
from mbx.formats.hf import read_config
from mbx.formats.registry import open_megatron as open_torch_dist
from mbx.models.device import Spread
from mbx.models.forward.models import MegatronModel, TransformersModel, vocab_size
from mbx.models.forward.parity import compare_models, read_prompts
from mbx.models.prompts import Prompts
from mbx.proof.parity import Leg, ParityReport, parity
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run
from mbx.tables import shipped

NAME = "qwen3"
QKV, FC1 = "decoder.layers.self_attention.linear_qkv.weight", "decoder.layers.mlp.linear_fc1.weight"
SHORT = Prompts(num_prompts=1, num_tokens=16)
SWAPPED = (
    '["mlp.gate_proj.weight", "mlp.up_proj.weight"]',
    '["mlp.up_proj.weight", "mlp.gate_proj.weight"]',
)


@pytest.fixture(scope="module")
def good(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tiny / NAME, tmp_path_factory.mktemp("good") / "mcore")


@pytest.fixture
def hurt(good: Path, tmp_path: Path) -> Path:
    """A copy to plant a defect in."""
    return copy(good, tmp_path / "hurt")


def statuses(report: ParityReport) -> dict[str, str]:
    return {leg.name: leg.status for leg in report.legs}


def leg(report: ParityReport, name: str) -> Leg:
    return next(found for found in report.legs if found.name == name)


def test_a_sound_checkpoint_passes_every_leg(tiny: Path, good: Path) -> None:
    report = parity(tiny / NAME, good, forward=True)
    assert statuses(report) == dict.fromkeys(("cover", "config", "weights", "forward"), "passed")
    assert report.passed
    forward = leg(report, "forward")
    assert "max |Δlogit|" in forward.summary and "nats (mean over positions)" in forward.summary
    assert "top-1 100.00%" in forward.summary
    assert "96 positions" in forward.details[0]


def test_swapped_gate_and_up_in_a_table_survives_cover_and_round_trip_and_not_forward(
    tiny: Path, tmp_path: Path
) -> None:
    own = table_with(NAME, tmp_path, *SWAPPED)
    wrong = convert(tiny / NAME, tmp_path / "mcore", own)
    run(plan_mcore_to_hf(wrong, tmp_path / "hf", Options(mapping=own, sync=False)))
    assert filecmp.cmp(tiny / NAME / "model.safetensors", tmp_path / "hf" / "model.safetensors", shallow=False)

    by_itself = parity(tiny / NAME, wrong, forward=True, mapping=own, prompts=SHORT)
    assert statuses(by_itself) == {"cover": "passed", "config": "passed", "weights": "passed", "forward": "failed"}

    by_the_right_table = parity(tiny / NAME, wrong, forward=True, prompts=SHORT)
    assert statuses(by_the_right_table)["cover"] == "passed"
    assert statuses(by_the_right_table)["weights"] == "failed"
    assert statuses(by_the_right_table)["forward"] == "failed"
    assert any(FC1 in text for text in leg(by_the_right_table, "weights").details)
    assert not by_itself.passed and not by_the_right_table.passed


def test_plain_concatenation_of_q_k_and_v_fails_weights_and_forward(tiny: Path, hurt: Path) -> None:
    weights = load_file(tiny / NAME / "model.safetensors")

    def concatenated(_: Bits, at: tuple[int, ...]) -> Bits:
        names = [f"model.layers.{at[0]}.self_attn.{kind}_proj.weight" for kind in "qkv"]
        return torch.cat([weights[name] for name in names]).view(torch.uint16).numpy()[None]

    edit(hurt, QKV, concatenated)
    report = parity(tiny / NAME, hurt, forward=True, prompts=SHORT)
    assert statuses(report) == {"cover": "passed", "config": "passed", "weights": "failed", "forward": "failed"}


def test_wrong_rope_theta_fails_config(tiny: Path, hurt: Path) -> None:
    path = hurt / "iter_0000000" / "hf" / "config.json"
    config = json.loads(path.read_text())
    config["rope_theta"] = 1e4
    path.write_text(json.dumps(config))
    report = parity(tiny / NAME, hurt)
    assert statuses(report) == {"cover": "passed", "config": "failed", "weights": "passed"}
    assert any("model.rotary_base" in text and "10000.0" in text for text in leg(report, "config").details)


def test_one_flipped_bit_is_found_and_named(tiny: Path, hurt: Path) -> None:
    def flip(bits: Bits, at: tuple[int, ...]) -> Bits:
        if at == (2, 0, 0):
            bits[0, 5, 7] ^= 1
        return bits

    edit(hurt, FC1, flip)
    report = parity(tiny / NAME, hurt)
    assert statuses(report) == {"cover": "passed", "config": "passed", "weights": "failed"}
    assert leg(report, "weights").details == (f"`{FC1}`: 1 element(s) differ, first at [2, 5, 7]",)


def test_every_nan_is_a_difference_and_never_a_pass(tiny: Path, tmp_path: Path) -> None:
    """NaN on both sides, bit for bit: the weights agree, the logits cannot."""
    source = copy(tiny / NAME, tmp_path / "hf")
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    report = parity(source, convert(source, tmp_path / "mcore"), forward=True, prompts=SHORT)
    assert statuses(report) == {"cover": "passed", "config": "passed", "weights": "passed", "forward": "failed"}
    assert "not finite" in leg(report, "forward").summary


def test_nan_on_one_side_fails_weights(tiny: Path, hurt: Path) -> None:
    edit(hurt, "decoder.final_layernorm.weight", lambda bits, _: np.full_like(bits, 0x7FC0))
    report = parity(tiny / NAME, hurt, forward=True, prompts=SHORT)
    assert statuses(report)["weights"] == statuses(report)["forward"] == "failed"


def _without(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_truncated_vocabulary_fails_cover_and_is_not_compared(tiny: Path, tmp_path: Path) -> None:
    short = copy(tiny / NAME, tmp_path / "hf")
    weights = load_file(short / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:-7].clone()
    save_file(weights, short / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] - 7}))
    report = parity(tiny / NAME, convert(short, tmp_path / "mcore"), forward=True, prompts=SHORT)
    assert "passed" not in statuses(report).values()
    assert any("embedding.word_embeddings.weight" in text and "shape" in text for text in report.legs[0].details)


def test_more_rows_than_the_vocabulary_pass_as_padding(tiny: Path, tmp_path: Path) -> None:
    """The control of the test above: rows behind the vocabulary are padding, as Megatron Core has it."""
    options = Options(layout=Layout(tp=2, vocab_divisor=64), sync=False)
    run(plan_hf_to_mcore(tiny / NAME, tmp_path / "mcore", options))
    report = parity(tiny / NAME, tmp_path / "mcore", forward=True, prompts=SHORT)
    assert report.passed


def test_a_missing_tensor_fails_every_leg_that_needs_it(tiny: Path, tmp_path: Path) -> None:
    """A checkpoint without its output layer, against a folder that has one."""
    tied = copy(tiny / NAME, tmp_path / "hf")
    _without(tied, "lm_head.weight")
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    report = parity(tiny / NAME, convert(tied, tmp_path / "mcore"), forward=True, prompts=SHORT)
    assert statuses(report) == dict.fromkeys(("cover", "config", "weights", "forward"), "failed")
    assert "missing in the checkpoint: `output_layer.weight`" in leg(report, "cover").details
    assert "output_layer.weight" in " ".join([leg(report, "forward").summary, *leg(report, "forward").details])


def test_a_head_that_is_declared_tied_and_is_not_fails_weights(tiny: Path, tmp_path: Path) -> None:
    source = copy(tiny / NAME, tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    weights = load_file(source / "model.safetensors")
    head = weights["lm_head.weight"]
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    target = convert(source, tmp_path / "mcore")
    assert parity(source, target).passed
    save_file({**weights, "lm_head.weight": head}, source / "model.safetensors", metadata={"format": "pt"})
    found = leg(parity(source, target), "weights")
    assert found.status == "failed"
    assert found.details == ("`lm_head.weight` should repeat `model.embed_tokens.weight` in the folder, and does not",)


@pytest.mark.parametrize("name", ["deepseek_v3_fp8", "gpt_oss_mxfp4"])
def test_a_quantised_folder_is_compared_by_its_decoded_values(name: str, tmp_path: Path) -> None:
    source = make(name, tmp_path / "hf")
    target = convert(source, tmp_path / "mcore")
    assert parity(source, target).passed
    edit(target, "decoder.final_layernorm.weight", lambda bits, _: bits ^ 1)
    assert statuses(parity(source, target))["weights"] == "failed"


def test_an_extra_tensor_fails_cover(tiny: Path, good: Path, tmp_path: Path) -> None:
    tied = copy(tiny / NAME, tmp_path / "hf")
    _without(tied, "lm_head.weight")
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    report = parity(tied, good)
    assert leg(report, "cover").details == ("unexpected in the checkpoint: `output_layer.weight`",)
    assert not report.passed


def test_a_leg_that_did_not_run_is_no_pass(tiny: Path, good: Path, hurt: Path, tmp_path: Path) -> None:
    own = table_with(NAME, tmp_path, "model_types", 'unsupported = "no such forward pass"\nmodel_types')
    report = parity(tiny / NAME, good, forward=True, mapping=own)
    assert leg(report, "forward") == Leg("forward", "not run", "no such forward pass")
    assert not report.passed
    for path in sorted((hurt / "iter_0000000" / "hf").iterdir()):
        path.unlink()
    (hurt / "iter_0000000" / "hf").rmdir()
    for name in ("common.pt", "run_config.yaml"):  # they would say the same settings
        (hurt / "iter_0000000" / name).unlink(missing_ok=True)
    report = parity(tiny / NAME, hurt)
    assert statuses(report) == {"cover": "passed", "config": "not run", "weights": "passed"}
    assert not report.passed


def test_foreign_rope_constants_are_lent_and_said(peers: Path) -> None:
    """This Llama saw 128 positions before scaling; Megatron Core fixes 8192."""
    report = parity(peers / "llama" / "hf", peers / "llama" / "mcore", forward=True)
    forward = leg(report, "forward")
    assert forward.status == "passed"
    assert "near and from position 128" in forward.details[0]
    assert any("original_max_position_embeddings is 128" in text for text in forward.details)


def test_a_wrong_rope_factor_shows_past_the_original_context(tiny: Path, tmp_path: Path) -> None:
    """Far positions are there for a reason: the same defect is larger in them."""
    target = convert(tiny / "llama", tmp_path / "mcore")
    config = read_config(tiny / "llama")
    right = shipped("llama").config.to_mcore(config)
    wrong = {**right, "model.rope_scaling_factor": 16.0}

    opened = open_torch_dist(target)

    def difference(mcore: dict[str, Value], *, far: bool) -> float:
        read = read_prompts(Prompts(far=far), mcore, tiny / "llama", canonical(config))
        models = TransformersModel(tiny / "llama"), MegatronModel(mcore, opened.iteration, opened.tensors)
        found = compare_models(*models, read, vocab_size(mcore))
        assert found is not None and found.forward is not None
        return found.forward.diff.max_abs

    assert difference(right, far=True) < 1e-4
    assert difference(wrong, far=True) > 3 * difference(wrong, far=False) > 3e-4


def test_prompts_can_be_given_or_read_from_a_text(tiny: Path, good: Path, tmp_path: Path) -> None:
    ids = Prompts(token_ids=((5, 6, 7), (1, 2, 3, 4)))
    assert (
        "7 positions: 2 given prompt(s)"
        in leg(parity(tiny / NAME, good, forward=True, prompts=ids), "forward").details[0]
    )
    (tmp_path / "words.txt").write_text("the quick brown fox jumps over the lazy dog\n")
    text = Prompts(text_file=tmp_path / "words.txt", max_text_tokens=12)
    report = parity(tiny / NAME, good, forward=True, prompts=text)
    assert "12 positions: 12 tokens of words.txt" in leg(report, "forward").details[0]
    assert report.passed


@pytest.mark.parametrize(
    ("prompts", "error", "says"),
    [
        (Prompts(token_ids=((),)), UsageError, "without tokens"),
        (Prompts(token_ids=((100000,),)), UsageError, "outside a vocabulary"),
        (Prompts(num_prompts=0), UsageError, "nothing to compare"),
        (Prompts(text_file=Path("no-such-file.txt")), StorageError, "no-such-file.txt"),
    ],
)
def test_prompts_that_cannot_be_read_are_errors(
    tiny: Path, good: Path, prompts: Prompts, error: type[MbxError], says: str
) -> None:
    with pytest.raises(error, match=says):
        parity(tiny / NAME, good, forward=True, prompts=prompts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_an_error(tiny: Path, good: Path) -> None:
    with pytest.raises(DeviceError, match="Transformer Engine|no GPU"):
        parity(tiny / NAME, good, forward=True, spread=Spread(device="cuda"))
