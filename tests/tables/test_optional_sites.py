"""Prediction layers exist where the checkpoint has them, whole or not at all."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent)]

from _moe_cases import headers_of  # noqa: E402
from _scaffold import stored  # noqa: E402

from converters.errors import CoverageError  # noqa: E402
from converters.mcore.layout import Layout  # noqa: E402
from converters.planning.exporter import plan_export  # noqa: E402
from converters.planning.importer import plan_import  # noqa: E402
from mbx.tables import table_for  # noqa: E402


@pytest.mark.parametrize(
    "name", ["deepseek_v3", "glm4_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "nemotron_super"]
)
def test_prediction_layers_are_whole_or_absent_in_both_directions(name: str) -> None:
    config, headers = headers_of(name)
    table = table_for(config)
    prefixes = ("mtp.", f"model.layers.{config['num_hidden_layers']}.")
    layers = {n for n in headers if n.startswith(prefixes) and not n.endswith(("embed_tokens.weight", "head.weight"))}
    bare = {n: h for n, h in headers.items() if not n.startswith(prefixes)}
    plan = plan_import(table, config, stored(bare), Layout())
    back = plan_export(table, plan.config, stored({d.name: (d.dtype, d.shape) for d in plan.drafts}))
    assert {d.name for d in back.drafts} == set(bare)
    for missing in layers:
        with pytest.raises(CoverageError):
            plan_import(table, config, stored({n: h for n, h in headers.items() if n != missing}), Layout())
