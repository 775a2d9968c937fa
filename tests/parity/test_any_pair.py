"""`mbx.proof.parity` for every pair of formats and layouts: equal ones pass, and one changed value is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from _planted import convert
from _stores import changed_hf, changed_mcore, per_layer, read_hf, read_mcore, write_mcore

from converters.errors import MbxError
from converters.mcore.layout import Layout
from fixtures.make_tiny import NAMES, make
from mbx.proof.compare import Reading
from mbx.proof.parity import Leg, ParityReport, parity
from mbx.run.job import Options, plan_hf_to_mcore, run
from mbx.run.reshard import plan_mcore_to_mcore

NAME = "qwen3"
FC1 = "decoder.layers.mlp.linear_fc1.weight"
EMBEDDING = "embedding.word_embeddings.weight"


@pytest.fixture(scope="module")
def good(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tiny / NAME, tmp_path_factory.mktemp("good") / "mcore")


@pytest.fixture(scope="module")
def cut(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model at TP 2, PP 2, with padding."""
    options = Options(layout=Layout(tp=2, pp=2, vocab_divisor=64), sync=False)
    run(plan_hf_to_mcore(tiny / NAME, target := tmp_path_factory.mktemp("cut") / "mcore", options))
    return target


def leg(report: ParityReport, name: str) -> Leg:
    return next(found for found in report.legs if found.name == name)


def statuses(report: ParityReport) -> dict[str, str]:
    return {leg.name: leg.status for leg in report.legs}


def both_ways(a: Path, b: Path) -> list[ParityReport]:
    return [parity(a, b), parity(b, a)]


def test_the_sides_may_come_in_either_order(tiny: Path, good: Path) -> None:
    for report in both_ways(tiny / NAME, good):
        assert report.passed and statuses(report) == dict.fromkeys(("cover", "config", "weights"), "passed")
        assert report.compared_values > 10_000 and not report.differences


def test_layouts_and_padding_may_differ(good: Path, cut: Path) -> None:
    for report in both_ways(good, cut):
        assert report.passed
        assert any("5 padding rows, all zero" in line for line in report.padding)


def test_layers_may_be_stacked_or_apart(tiny: Path, good: Path, tmp_path: Path) -> None:
    apart = write_mcore(per_layer(read_mcore(good)), tmp_path / "apart", good / "iter_0000000" / "hf")
    for report in (*both_ways(good, apart), *both_ways(tiny / NAME, apart)):
        assert report.passed, [leg for leg in report.legs if leg.status != "passed"]
    tensors = per_layer(read_mcore(good))
    tensors["decoder.layers.2.mlp.linear_fc1.weight"][3, 4] += 1
    wrong = write_mcore(tensors, tmp_path / "wrong", good / "iter_0000000" / "hf")
    for report in (*both_ways(good, wrong), *both_ways(tiny / NAME, wrong)):
        assert [d.elements for d in report.differences] == [1]


def test_a_whole_stack_in_one_chunk_is_cut_at_layers(good: Path, tmp_path: Path) -> None:
    """Torch writes all layers as one chunk here: the other side asks for single layers of it."""
    whole = changed_mcore(good, tmp_path / "whole", lambda tensors: None)
    apart = write_mcore(per_layer(read_mcore(good)), tmp_path / "apart", good / "iter_0000000" / "hf")
    assert parity(apart, whole).passed


def test_a_legacy_checkpoint_is_a_side_like_any_other(tiny: Path, good: Path, tmp_path: Path) -> None:
    options = Options(layout=Layout(tp=2, pp=2), format="torch", sync=False)
    run(plan_mcore_to_mcore(good, legacy := tmp_path / "legacy", options))
    for report in (*both_ways(good, legacy), *both_ways(tiny / NAME, legacy)):
        assert report.passed, [leg for leg in report.legs if leg.status != "passed"]
    shutil.rmtree(next(legacy.glob("iter_*")) / "hf")
    report = parity(tiny / NAME, legacy)
    assert report.passed and "args says" in leg(report, "config").summary


def test_settings_that_only_args_state_are_held_against_the_folder(tiny: Path, good: Path, tmp_path: Path) -> None:
    run(plan_mcore_to_mcore(good, legacy := tmp_path / "legacy", Options(format="torch", sync=False)))
    shutil.rmtree(next(legacy.glob("iter_*")) / "hf")
    other = changed_hf(tiny / NAME, tmp_path / "hf", config={"rope_theta": 5e5})
    report = parity(other, legacy)
    assert statuses(report) == {"cover": "passed", "config": "failed", "weights": "passed"}
    (line,) = leg(report, "config").details
    assert "model.rotary_base" in line and "base of the rotary frequencies" in line and "`rope_theta`" in line


def test_folders_may_be_cut_into_files_differently(tiny: Path, tmp_path: Path) -> None:
    for report in both_ways(tiny / NAME, changed_hf(tiny / NAME, tmp_path / "hf", files=3)):
        assert report.passed
    wrong = changed_hf(
        tiny / NAME, tmp_path / "wrong", lambda t: t["model.layers.1.mlp.up_proj.weight"][2].zero_(), files=2
    )
    for report in both_ways(tiny / NAME, wrong):
        assert statuses(report)["weights"] == "failed"
        assert report.first is not None and report.first.name == "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_experts_may_be_fused_or_apart(name: str, tmp_path: Path) -> None:
    apart, fused = make(name, tmp_path / "v4"), make(name, tmp_path / "v5", layout="v5")
    assert set(read_hf(apart)) != set(read_hf(fused))
    for report in both_ways(apart, fused):
        assert report.passed, [leg for leg in report.legs if leg.status != "passed"]

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        key = next(key for key in tensors if key.endswith("layers.1.mlp.experts.gate_up_proj"))
        tensors[key][[2, 3]] = tensors[key][[3, 2]]

    wrong = changed_hf(fused, tmp_path / "wrong", swap)
    report = parity(apart, wrong)
    assert statuses(report) == {"cover": "passed", "config": "passed", "weights": "failed"}
    assert (
        report.first is not None
        and report.first.cause is not None
        and "another order of experts" in report.first.cause
    )
    assert leg(parity(wrong, apart), "weights").status == "failed"


#: What Transformers 5 cannot hold: heads for several tokens, which it drops, and a router that it keeps in fp32.
_LOSSY = ("deepseek_v3", "glm4_moe", "glm4_moe_air", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "minimax_m2")
_LOSSY += ("nemotron_super",)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_what_transformers_5_wrote_again_is_the_same_or_said_not_to_be(name: str, tmp_path: Path) -> None:
    """Every family as the hub has it against what Transformers 5 saves of it: names, fusing, config spelling."""
    before = make(name, tmp_path / "v4")
    try:
        after = make(name, tmp_path / "v5", layout="v5")
    except ValueError as error:
        pytest.skip(str(error))
    for report in both_ways(before, after):
        expected = "failed" if name in _LOSSY else "passed"
        assert statuses(report)["cover"] == expected and statuses(report)["config"] == "passed", report.legs
        assert not any(difference.elements for difference in report.differences)


def test_a_repeated_output_layer_may_be_left_out_but_has_to_repeat(tmp_path: Path) -> None:
    """A folder that declares its head tied and stores another one is not the same as one that stores none."""
    without = make("llama_tied", tmp_path / "without")
    repeated = changed_hf(
        without, tmp_path / "with", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    for report in both_ways(without, repeated):
        assert report.passed and report.waived == ("lm_head.weight",)
    wrong = changed_hf(repeated, tmp_path / "wrong", lambda t: t["lm_head.weight"][3].neg_())
    for report in both_ways(without, wrong):
        assert statuses(report)["weights"] == "failed"
        assert any("should repeat `model.embed_tokens.weight`" in line for line in leg(report, "weights").details)


def test_a_head_under_a_name_that_no_release_loads_fails(tmp_path: Path) -> None:
    """The module is `mtp_model_layer` since 0.17; in torch_dist every release asks for `transformer_layer`."""
    source = make("deepseek_v3", tmp_path / "hf")
    good = convert(source, tmp_path / "mcore")

    def rename(t: dict[str, torch.Tensor]) -> None:
        for name in [name for name in t if ".transformer_layer." in name]:
            t[name.replace(".transformer_layer.", ".mtp_model_layer.")] = t.pop(name)

    newer = changed_mcore(good, tmp_path / "newer", rename)
    assert any(".mtp_model_layer." in name for name in read_mcore(newer))
    for report in (*both_ways(source, newer), *both_ways(good, newer)):
        assert statuses(report)["cover"] == "failed"
        assert any("mtp_model_layer" in line for line in leg(report, "cover").details)


def test_a_quantised_folder_is_held_against_a_plain_one(tmp_path: Path) -> None:
    quantised = make("deepseek_v3_fp8", tmp_path / "fp8")
    run(plan_hf_to_mcore(quantised, tmp_path / "mcore", Options(sync=False)))
    from mbx.run.job import plan_mcore_to_hf

    run(plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "plain", Options(sync=False)))
    for report in both_ways(quantised, tmp_path / "plain"):
        assert statuses(report)["cover"] == statuses(report)["weights"] == "passed"
    wrong = changed_hf(tmp_path / "plain", tmp_path / "wrong", lambda t: t["model.norm.weight"].neg_())
    for report in both_ways(quantised, wrong):
        assert report.first is not None and report.first.name == "model.norm.weight"


def test_folders_of_an_architecture_without_a_table_are_compared_by_name(tiny: Path, tmp_path: Path) -> None:
    config = {"model_type": "no_such_model", "architectures": ["NoSuchModel"]}
    a = changed_hf(tiny / NAME, tmp_path / "a", config=config)
    b = changed_hf(tiny / NAME, tmp_path / "b", lambda t: t.pop("model.norm.weight"), config=config)
    assert parity(a, a).passed
    assert leg(parity(a, b), "cover").details == ("missing in the second: `model.norm.weight`",)
    assert leg(parity(b, a), "cover").details == ("unexpected in the second: `model.norm.weight`",)


def test_a_difference_in_dtype_is_no_pass_and_says_whether_the_values_agree(tiny: Path, tmp_path: Path) -> None:
    wide = changed_hf(tiny / NAME, tmp_path / "wide", lambda t: t.update({n: x.float() for n, x in t.items()}))
    report = parity(wide, tiny / NAME)
    assert statuses(report) == {"cover": "failed", "config": "passed", "weights": "failed"}
    assert all(d.cause == "the values are those of F32, cast to BF16" for d in report.differences)
    assert {(d.expected, d.found) for d in report.dtypes} == {("F32", "BF16")}


def test_a_declared_cast_is_no_difference(tiny: Path, tmp_path: Path) -> None:
    run(plan_hf_to_mcore(tiny / NAME, tmp_path / "mcore", Options(dtype="fp32", sync=False)))
    assert parity(tiny / NAME, tmp_path / "mcore", dtype="fp32").passed
    assert not parity(tiny / NAME, tmp_path / "mcore").passed


def test_what_stands_in_the_padding_is_said(tiny: Path, cut: Path, tmp_path: Path) -> None:
    wrong = changed_mcore(cut, tmp_path / "wrong", lambda t: t[EMBEDDING][-1].fill_(1))
    report = parity(tiny / NAME, wrong)
    assert report.passed  # no token reaches these rows
    (line,) = [line for line in report.padding if EMBEDDING in line]
    assert "5 padding rows, 32 of 160 padding value(s) are not zero" in line


def test_memory_is_bounded_and_the_result_does_not_depend_on_it(tiny: Path, good: Path, tmp_path: Path) -> None:
    wrong = changed_mcore(good, tmp_path / "wrong", lambda t: t[FC1].mul_(-1))
    reports = [parity(tiny / NAME, wrong, reading=Reading(w, size)) for size, w in ((1 << 24, 1), (1 << 30, 4))]
    assert reports[0].differences == reports[1].differences
    assert reports[0].first is not None and reports[0].first.cause == "every sign is turned"


def test_an_empty_comparison_is_no_pass(tiny: Path, good: Path, tmp_path: Path) -> None:
    empty = changed_mcore(
        good, tmp_path / "empty", lambda t: [t.pop(n) for n in list(t) if n != "x"] and t.update(x=torch.ones(1))
    )
    report = parity(empty, good)
    assert statuses(report)["weights"] == "failed" and not report.passed


def test_what_is_no_checkpoint_is_an_error(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(MbxError, match="neither"):
        parity(tiny / NAME, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    with pytest.raises(MbxError):
        parity(tmp_path, tiny / NAME)
