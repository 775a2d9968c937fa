"""Gemma and GLM-4 in Megatron Core give Transformers' logits, and each part that mbx adds is needed for it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from _mcore_configs import SMALL
from _planted import convert

from converters.errors import UnsupportedError
from fixtures.make_tiny import make
from mappings import table_text
from mbx.models.megatron.config import transformer_config
from mbx.proof.parity import Leg, parity

SCALE, POST = '"model.scale_embeddings" = true', '"model.post_layernorms" = true'
NEEDS = {"gemma": (SCALE,), "gemma3_text": (SCALE, POST), "glm4": (POST,)}
ONE_BASE = (r'"model\.rotary_base_local".*\n', ""), (r"\nignore = \[", '\nignore = ["rope_local_base_freq", ')


def forward(name: str, folder: Path, *edits: tuple[str, str]) -> Leg:
    """The forward leg under the shipped table, as one that claims a forward pass, after regular-expression `edits`."""
    text = re.sub(r"(?m)^unsupported .*\n", "", table_text(name))
    missing = [need for need in NEEDS[name] if need not in text]
    text = text.replace("[config.fixed]", "\n".join(["[config.fixed]", *missing]), 1)
    for pattern, replacement in edits:
        text, count = re.subn(pattern, replacement, text)
        assert count == 1
    own = folder / f"own_{name}.toml"
    own.write_text(text, encoding="utf-8")
    source = make(name, folder / "hf")
    return parity(source, convert(source, folder / "mcore", str(own)), forward=True, mapping=str(own)).legs[-1]


@pytest.mark.parametrize("name", sorted(NEEDS))
def test_forward_agrees(name: str, tmp_path: Path) -> None:
    leg = forward(name, tmp_path)
    assert leg.status == "passed", leg


@pytest.mark.parametrize(("name", "part"), [("gemma", SCALE), ("gemma3_text", SCALE)])
def test_unscaled_embeddings_fail(name: str, part: str, tmp_path: Path) -> None:
    assert forward(name, tmp_path, (re.escape(part) + r".*\n", "")).status == "failed"


@pytest.mark.parametrize("name", ["gemma3_text", "glm4"])
def test_a_missing_norm_behind_the_sublayers_fails(name: str, tmp_path: Path) -> None:
    assert forward(name, tmp_path, (re.escape(POST) + r".*\n", "")).status == "failed"


def test_one_rotary_base_for_all_layers_fails(tmp_path: Path) -> None:
    assert forward("gemma3_text", tmp_path, *ONE_BASE).status == "failed"


@pytest.mark.parametrize("off", [None, False])
def test_a_feature_that_is_off_needs_no_field_and_one_that_is_on_does(off: object) -> None:
    assert transformer_config({**SMALL, "mrope_interleaved": off}).num_layers == SMALL["num_layers"]  # type: ignore[dict-item]
    with pytest.raises(UnsupportedError, match="mrope_interleaved"):
        transformer_config({**SMALL, "mrope_interleaved": True})
