"""`mbx.diff`: its figures are those that Torch computes from whole tensors, and equal checkpoints have none."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from _planted import convert
from _stores import Tensors, changed_hf, changed_mcore, read_hf

from mbx.cli import main
from mbx.proof.diff import diff

NAME = "qwen3"
FC1 = "decoder.layers.mlp.linear_fc1.weight"


@pytest.fixture(scope="module")
def tuned(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tune: some tensors moved, each by its own amount."""
    torch.manual_seed(0)

    def train(t: Tensors) -> None:
        for number, name in enumerate(sorted(t)):
            if ".mlp." in name or name == "lm_head.weight":
                t[name] = (t[name].float() * (1 + 0.01 * number) + 1e-3 * torch.randn(t[name].shape)).bfloat16()

    return changed_hf(tiny / NAME, tmp_path_factory.mktemp("tuned") / "hf", train)


def test_every_figure_is_what_torch_computes(tiny: Path, tuned: Path) -> None:
    before, after = read_hf(tiny / NAME), read_hf(tuned)
    found = diff(tiny / NAME, tuned)
    assert found.unchanged == sum(torch.equal(before[name], after[name]) for name in before)
    assert len(found.changes) + found.unchanged == len(before) and not found.config
    for change in found.changes:
        a, b = before[change.name].double(), after[change.name].double()
        assert change.relative == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-9)
        assert change.max_abs == float((b - a).abs().max())
        assert (change.differing, change.compared) == (int((a != b).sum()), a.numel())
    assert [c.relative for c in found.changes] == sorted((c.relative for c in found.changes), reverse=True)
    every = torch.cat([(after[name] - before[name]).double().flatten() for name in before])
    norm = torch.cat([tensor.double().flatten() for tensor in before.values()]).norm()
    assert found.relative == pytest.approx(float(every.norm() / norm), rel=2e-3)


def test_formats_may_differ(tiny: Path, tuned: Path, tmp_path: Path) -> None:
    checkpoint = convert(tuned, tmp_path / "mcore")
    assert diff(tuned, checkpoint).same
    found = diff(tiny / NAME, checkpoint)
    assert found.relative == pytest.approx(diff(tiny / NAME, tuned).relative, rel=1e-9)
    assert {change.name for change in found.changes} > {FC1, "output_layer.weight"}
    back = diff(checkpoint, tiny / NAME)
    assert {c.name for c in back.changes} == {c.name for c in found.changes}


def test_added_removed_resized_cast_and_reconfigured(tiny: Path, tmp_path: Path) -> None:
    def change(t: Tensors) -> None:
        t["model.extra.weight"] = torch.ones(2)
        t.pop("model.layers.0.self_attn.q_norm.weight")
        t["model.embed_tokens.weight"] = torch.cat([t["model.embed_tokens.weight"], torch.ones(5, 32).bfloat16()])
        t["model.norm.weight"] = t["model.norm.weight"].float() + 1
        t["lm_head.weight"] = t["lm_head.weight"].T.clone()

    config = {"model_type": "none", "architectures": ["None"]}
    before = changed_hf(tiny / NAME, tmp_path / "before", config=config)
    found = diff(before, changed_hf(before, tmp_path / "after", change, config={"vocab_size": 256}))
    assert found.added == ("model.extra.weight",) and found.removed == ("model.layers.0.self_attn.q_norm.weight",)
    assert found.config == (("vocab_size", 251, 256),)
    by_name = {change.name: change for change in found.changes}
    assert set(by_name) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    grown = by_name["model.embed_tokens.weight"]
    assert grown.shapes == ((251, 32), (256, 32)) and (grown.differing, grown.compared) == (0, 251 * 32)
    assert by_name["model.norm.weight"].dtypes == ("BF16", "F32") and by_name["model.norm.weight"].max_abs == 1.0
    assert by_name["lm_head.weight"].relative is None and found.changes[0].name == "lm_head.weight"


def test_values_that_are_not_finite_have_no_norm(tiny: Path, tmp_path: Path) -> None:
    name = "model.norm.weight"
    wrong = changed_hf(tiny / NAME, tmp_path / "wrong", lambda t: t[name][0].fill_(math.nan))
    found = diff(tiny / NAME, wrong)
    assert [c.name for c in found.changes] == [name]
    assert found.changes[0].relative is None and found.relative is None and found.changes[0].differing == 1


def test_equal_checkpoints_differ_in_nothing(tiny: Path, tmp_path: Path) -> None:
    checkpoint = convert(tiny / NAME, tmp_path / "mcore")
    for pair in ((tiny / NAME, tiny / NAME), (checkpoint, checkpoint), (tiny / NAME, checkpoint)):
        found = diff(*pair)
        assert found.same and found.relative == 0.0 and found.unchanged > 10


def test_the_command_says_it_and_ends_with_the_code(
    tiny: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diff", str(tiny / NAME), str(tuned), "--top", "3"]) == 1
    text = capsys.readouterr().out
    assert "relative" in text and "more changed" in text and "unchanged; |Δ| / |A| over all" in text
    assert main(["diff", str(tuned), str(tuned)]) == 0
    assert "no difference in 47 tensors" in capsys.readouterr().out
    wrong = changed_mcore(convert(tuned, tmp_path / "a"), tmp_path / "b", lambda t: t[FC1][0].neg_())
    assert main(["diff", str(tmp_path / "a"), str(wrong), "--json"]) == 1
    assert f'"name": "{FC1}"' in capsys.readouterr().out


def test_two_models_that_have_little_in_common_are_listed_and_not_refused(tiny: Path) -> None:
    found = diff(tiny / NAME, tiny / "llama")
    resized = {change.name: change.shapes for change in found.changes if change.relative is None}
    assert resized["model.layers.0.self_attn.o_proj.weight"] == ((32, 128), (32, 192))
    assert "model.layers.0.self_attn.q_norm.weight" in found.removed
    assert ("model_type", "qwen3", "llama") in found.config
