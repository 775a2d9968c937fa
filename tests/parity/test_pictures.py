"""The forward leg of models that see: drawn pictures through Transformers' tower into both decoders."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from fixtures.wrapped import make_wrapped
from mbx.models.megatron import pictures as megatron_pictures
from mbx.models.megatron.rotary import axes_of_pairs
from mbx.models.pictures import Pictures, Seen
from mbx.models.prompts import Prompts
from mbx.proof.legs import Leg
from mbx.proof.parity import parity
from mbx.run.job import Options, plan_hf_to_mcore, run

SHORT = Prompts(num_prompts=1, num_tokens=12)
#: Gemma 3 sees both ways within a picture, Gemma 4 in windowed layers alone; Qwen2.5 turns by axes one behind the
#: other, Qwen3 interleaved and with deepstack; Ministral 3 and Llama 4 count pictures like text; GLM-4.5V has experts
#: and pairs of neighbours.
KINDS = ("gemma3", "gemma4", "qwen2_5_vl", "qwen3_vl", "ministral3", "glm4v_moe")


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A tiny folder by model type, and the checkpoint made from it."""
    root = tmp_path_factory.mktemp("pictures")

    def make(kind: str) -> tuple[Path, Path]:
        source, target = make_wrapped(kind, root / kind), root / f"{kind} mcore"
        run(plan_hf_to_mcore(source, target, Options(sync=False)))
        return source, target

    return cache(make)


def forward(sides: tuple[Path, Path]) -> Leg:
    found = parity(*sides, forward=True, prompts=SHORT)
    return next(leg for leg in found.legs if leg.name == "forward")


@pytest.mark.parametrize("kind", KINDS)
def test_both_libraries_agree_on_pictures(sides: Callable[[str], tuple[Path, Path]], kind: str) -> None:
    leg = forward(sides(kind))
    assert leg.status == "passed", leg.details
    assert any("pictures" in line for line in leg.details if line.startswith("reached"))
    assert dict(leg.figures)["max_abs"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    ["gemma4_e2b", "glm4v", "internvl", "kimi_k25", "llama4", "minimax_m3_vl", "mistral3", "qwen2_vl", "qwen3_vl_moe"],
)
def test_both_libraries_agree_on_pictures_everywhere(sides: Callable[[str], tuple[Path, Path]], kind: str) -> None:
    leg = forward(sides(kind))
    assert leg.status == "passed" and dict(leg.figures)["max_abs"] < 1e-4, leg.details


def test_a_wrong_section_is_found(sides: Callable[[str], tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    right = megatron_pictures._axes
    monkeypatch.setattr(megatron_pictures, "_axes", lambda config: [*right(config)[1:], right(config)[0]])
    assert forward(sides("qwen2_5_vl")).status == "failed"


@pytest.mark.parametrize(
    "spoilt",
    [
        lambda seen: replace(seen, deepstack=seen.deepstack[::-1]),
        lambda seen: replace(seen, deepstack=seen.deepstack[:1]),
        lambda seen: replace(seen, features=seen.features.flip(0)),
        lambda seen: replace(seen, positions=seen.positions[[0, 2, 1]]),
    ],
    ids=["mergers exchanged", "merger dropped", "features out of order", "height for width"],
)
def test_what_a_tower_gives_has_to_arrive(
    sides: Callable[[str], tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch, spoilt: Callable[[Seen], Seen]
) -> None:
    right = megatron_pictures.seeing
    monkeypatch.setattr(
        "mbx.models.megatron.tracing.seeing",
        lambda model, config, batch, seen: right(model, config, batch, spoilt(seen)),
    )
    assert forward(sides("qwen3_vl")).status == "failed"


def test_one_picture_sees_itself_both_ways_and_no_other(
    sides: Callable[[str], tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(megatron_pictures, "_show_each_other", lambda *_, **__: None)
        assert forward(sides("gemma3")).status == "failed"
    monkeypatch.setattr(Pictures, "numbers", lambda self, ids: self.places(ids).long() - 1)  # one picture of the two
    assert forward(sides("gemma3")).status == "failed"


@pytest.mark.slow
def test_where_pictures_of_gemma_4_see_themselves(
    sides: Callable[[str], tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In windowed layers, and in no others; what layers take of their own there is not the picture's token's."""
    plain = megatron_pictures._show_each_other
    for wrong in (lambda *_, **__: None, lambda *given, **_: plain(*given, windowed_alone=False)):
        with monkeypatch.context() as patched:
            patched.setattr(megatron_pictures, "_show_each_other", wrong)
            assert forward(sides("gemma4")).status == "failed"
    monkeypatch.setattr(megatron_pictures, "_put_under", lambda *_: None)
    assert forward(sides("gemma4_e2b")).status == "failed"


def test_a_model_whose_pictures_nobody_draws_is_not_proved(tmp_path: Path) -> None:
    source = make_wrapped("qwen2_5_omni", tmp_path / "hf")
    run(plan_hf_to_mcore(source, tmp_path / "mcore", Options(sync=False)))
    found = parity(source, tmp_path / "mcore", forward=True, prompts=SHORT)
    assert not found.proved and any("pictures or sounds" in gap.line for gap in found.gaps)


def test_a_tower_of_another_width_is_said(tmp_path: Path) -> None:
    source = make_wrapped("qwen2_5_vl", tmp_path / "hf")
    run(plan_hf_to_mcore(source, tmp_path / "mcore", Options(sync=False)))
    config = json.loads((source / "config.json").read_text("utf-8"))
    config["vision_config"]["out_hidden_size"] = 32
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    leg = forward((source, tmp_path / "mcore"))
    assert leg.status != "passed" and "internal" not in leg.summary


def test_pairs_turn_by_axes() -> None:
    assert axes_of_pairs([2, 1, 1], interleaved=False) == [0, 0, 1, 2]
    assert axes_of_pairs([4, 2, 2], interleaved=True) == [0, 1, 2, 0, 1, 2, 0, 0]


def test_runs_of_a_token_are_pictures() -> None:
    ids = torch.tensor([[5, 9, 9, 1, 9, 2]])
    assert Pictures(9, {}).numbers(ids).tolist() == [[-1, 0, 0, -1, 1, -1]]
