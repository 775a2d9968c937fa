"""Which mechanisms the prompts come to is derived from the config, measured where values decide, and said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from _planted import convert
from _stores import changed_hf

from converters.rows.config_spelling import canonical
from fixtures.make_tiny import make, tiny_config
from mbx.models.prompts import Batch, Passes
from mbx.proof.parity import ParityReport, parity
from mbx.proof.reach import Reach, reach
from mbx.tables import table_for

LIMIT = "clamped activations of 7.0"


def reached(name: str, tokens: int = 48, *, without: str = "", **changes: object) -> Reach:
    config = {key: value for key, value in {**tiny_config(name), **changes}.items() if key != without}
    table = table_for(config)
    fields = table.config.to_mcore(config)
    read = Passes((Batch(torch.zeros(1, tokens, dtype=torch.int64)),), "drawn")
    return reach(canonical(config), fields, read, table, heads=0, megatron=True, transformers=True)


def gaps(found: Reach) -> str:
    return "\n".join(gap.line for gap in found.gaps)


def test_mechanisms_are_read_off_the_config_and_its_fields() -> None:
    assert {"biases of routers", "scaled routing weights", "groups of experts"} <= set(reached("deepseek_v3").reached)
    assert {"attention sinks", "a pattern of layers"} <= set(reached("gpt_oss").reached)
    assert "groups of experts" not in reached("deepseek_v3", topk_group=2, n_group=2).reached, "all of them are taken"
    assert {"a second rotary base", "scaled embeddings"} <= set(reached("gemma3_text").reached)


def test_a_choice_of_keys_that_no_prompt_comes_to_is_named() -> None:
    assert "choice among more than 2048 keys" in gaps(reached("minimax_m3", max_position_embeddings=4096))
    assert "choice among" not in gaps(reached("minimax_m3")), "no position is behind them"


def test_a_choice_of_tokens_is_made_smaller_than_the_prompt_by_one() -> None:
    """Rounding may exchange tokens at the edge of a choice: so small an edge is the least that tells it."""
    found = reached("glm_5", index_topk=256)
    assert found.changes == {"index_topk": 47} and "a choice of 256 tokens, made 47 on both sides" in found.line
    assert not reached("glm_5", index_topk=16).changes, "prompts are longer"
    assert "a choice of" not in reached("glm_5", index_topk=512).line, "no more than the context has"
    unsaid = reached("glm_5", without="index_topk", max_position_embeddings=4096)
    assert not unsaid.changes and "a choice of 2048 tokens, of prompts of 48 tokens" in gaps(unsaid)


def test_one_token_comes_to_nothing() -> None:
    found = reached("gpt_oss", tokens=1)
    assert "attention to other tokens" in gaps(found) and not found.reached


def test_a_size_of_values_is_reached_where_the_logits_feel_it() -> None:
    found = reached("gpt_oss")
    assert found.otherwise == {"swiglu_limit": 7.0} and found.changes["swiglu_limit"] == 7 / 16
    assert LIMIT not in found.line + gaps(found), "nothing is said before it was measured"
    found.settle({"swiglu_limit"})
    assert f"{LIMIT}, made 0.4375 on both sides" in found.line and LIMIT not in gaps(found)
    other = reached("gpt_oss")
    other.settle(())
    assert f"not reached: {LIMIT}" in gaps(other) and LIMIT not in other.line


def test_both_sides_keep_the_ratio_of_their_sizes() -> None:
    found = reached("gpt_oss")
    config = canonical(tiny_config("gpt_oss"))
    assert found.changed({**config, "swiglu_limit": 14.0}, config)["swiglu_limit"] == pytest.approx(14 / 16)


def test_values_that_never_come_to_a_clamp_are_a_gap(tmp_path: Path) -> None:
    """The same model with activations a thousandth of their size: no value comes to the smaller clamp either."""
    live = make("gpt_oss", tmp_path / "live")
    faint = changed_hf(
        live, tmp_path / "faint", lambda t: [t[name].mul_(1e-3) for name in t if "gate_up_proj" in name]
    )
    lines = []
    for folder in (live, faint):
        checkpoint = convert(folder, tmp_path / f"{folder.name} mcore")
        lines.append(said(parity(folder, checkpoint, forward=True)))
    assert LIMIT in lines[0][0] and LIMIT not in lines[0][1]
    assert LIMIT in lines[1][1] and LIMIT not in lines[1][0]


def said(report: ParityReport) -> tuple[str, str]:
    forward = next(leg for leg in report.legs if leg.name == "forward")
    assert forward.status == "passed"
    reached = next(line for line in forward.details if line.startswith("reached: "))
    return reached, "\n".join(gap.line for gap in report.gaps)
