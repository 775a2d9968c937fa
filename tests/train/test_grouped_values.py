"""Gated delta nets of Transformers on a kernel that takes one number of heads for all."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import AutoModelForCausalLM

from fixtures.make_tiny import make
from mbx.models.transformers.grouped_values import repeated_heads


def _kernel(documentation: str) -> types.ModuleType:
    """A package whose kernel says of itself what `documentation` does."""

    def chunk_gated_delta_rule() -> None: ...

    chunk_gated_delta_rule.__doc__ = documentation
    home = types.ModuleType("fla.ops.gated_delta_rule")
    home.chunk_gated_delta_rule = chunk_gated_delta_rule  # type: ignore[attr-defined]
    return home


@pytest.mark.parametrize(("documentation", "told"), [("q [B, T, H, K]", 8), ("v [B, T, HV, V]", 4)])
def test_a_kernel_of_one_number_of_heads_is_given_as_many_queries_as_values(
    tmp_path: Path, documentation: str, told: int
) -> None:
    folder = make("qwen3_next", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    home = sys.modules[type(model).__module__]
    given: list[tuple[int, int]] = []
    whole: Any = home.torch_chunk_gated_delta_rule  # type: ignore[attr-defined]

    def watched(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **others: object) -> object:
        given.append((key.shape[2], value.shape[2]))
        return whole(query, key, value, **others)

    ids = torch.arange(70)[None] % 50
    with torch.no_grad():
        before = model(ids).logits
        fla = {"fla": types.ModuleType("fla"), "fla.ops": types.ModuleType("fla.ops")}
        fla["fla"].__spec__ = sys.__spec__
        with (
            patch.dict(sys.modules, fla | {"fla.ops.gated_delta_rule": _kernel(documentation)}),
            patch.object(home, "torch_chunk_gated_delta_rule", watched),
            repeated_heads(model),
        ):
            behind = model(ids).logits
    assert given and set(given) == {(told, 8)}
    assert torch.allclose(before, behind, atol=1e-6)
    assert home.torch_chunk_gated_delta_rule is whole  # type: ignore[attr-defined]
