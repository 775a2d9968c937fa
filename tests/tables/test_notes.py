"""What Megatron Core computes otherwise than Transformers is said before a conversion, in both directions."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent)]

from _moe_cases import headers_of  # noqa: E402
from _scaffold import stored  # noqa: E402

from converters.mcore.layout import Layout  # noqa: E402
from converters.planning.exporter import plan_export  # noqa: E402
from converters.planning.importer import plan_import  # noqa: E402
from converters.rows.expr import Value  # noqa: E402
from fixtures.index import load_config  # noqa: E402
from mbx.tables import table_for  # noqa: E402


def notes_of(name: str, keys: dict[str, Value]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    config, headers = headers_of(name)
    config = {**config, **keys}
    table = table_for(config)
    plan = plan_import(table, config, stored(headers), Layout())
    back = plan_export(table, plan.config, stored({d.name: (d.dtype, d.shape) for d in plan.drafts}))
    return plan.notes, back.notes


def test_groups_of_the_full_size_deepseek_v2_are_ranked_otherwise() -> None:
    """DeepSeek-V2 chooses 6 experts from 3 of 8 groups: Megatron Core takes two scores a group, the model had one."""
    full = load_config("DeepSeek-V2")
    sizes = {key: full[key] for key in ("n_group", "topk_group", "num_experts_per_tok")}
    assert sizes == {"n_group": 8, "topk_group": 3, "num_experts_per_tok": 6}
    for notes in notes_of("deepseek_v2", {**sizes, "n_group": 4}):
        (line,) = notes
        assert "by its best 1 in Transformers" in line and "by its best 2 in Megatron Core" in line


@pytest.mark.parametrize(
    ("name", "keys", "said"),
    [
        ("deepseek_v2", {}, False),  # 2 experts from 2 groups: one score each
        ("deepseek_v2_lite", {}, False),
        ("deepseek_v3", {}, False),  # 4 from 2: two scores each, as trained
        ("deepseek_v3", {"num_experts_per_tok": 2}, True),
        ("deepseek_v3", {"num_experts_per_tok": 2, "topk_group": 4}, False),  # all groups are chosen
        ("kimi_k2", {}, False),
    ],
)
def test_only_such_a_ranking_is_said(name: str, keys: dict[str, Value], said: bool) -> None:
    assert [len(notes) for notes in notes_of(name, keys)] == [said, said]
