"""Pruning's algebra: what stays is what a search by hand finds, and is read as NumPy would index it."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters.engine.regions import Region
from converters.engine.selected import Picked, read_picked
from converters.errors import CoverageError, UnsupportedError, UsageError
from converters.planning.join import Joiner
from converters.pruning.axes import Axes, axes_of
from converters.pruning.choosing import Importance, Pruning, best_heads, choose
from converters.pruning.kept import WIDTHS, Kept
from converters.stored import Bytes
from converters.tensors import StoredTensor
from mbx.run.job import Options
from mbx.run.journal import plan_digest
from mbx.run.prune import plan_prune
from mbx.tables import table_for

LLAMA = Path(__file__).resolve().parents[2] / "fixtures" / "tiny" / "llama"
FIELDS = {
    "num_layers": 3,
    "hidden_size": 8,
    "num_attention_heads": 6,
    "num_query_groups": 3,
    "ffn_hidden_size": 12,
    "num_moe_experts": 8,
    "moe_router_topk": 2,
}


def importance(seed: int = 0, **fields: int) -> Importance:
    draw, all_fields = np.random.default_rng(seed).random, {**FIELDS, **fields}
    layers = range(all_fields["num_layers"])
    counts = {name: all_fields[name] for name in ("ffn_hidden_size", "num_attention_heads", "num_moe_experts")}
    widths = {name: {(layer, None): draw(count) for layer in layers} for name, count in counts.items()}
    return Importance(draw(len(layers)), {**widths, "hidden_size": {(None, None): draw(all_fields["hidden_size"])}})


@given(st.integers(0, 1000), st.integers(1, 7))
def test_the_sum_that_stays_is_the_largest(seed: int, count: int) -> None:
    found = importance(seed)
    kept = choose(Pruning(hidden=count), found, FIELDS)
    scores = found.widths["hidden_size"][None, None]
    best = max(combinations(range(8), count), key=lambda chosen: sum(scores[list(chosen)]))
    assert kept.of("hidden_size", 1).tolist() == list(best)
    assert kept.layers == (0, 1, 2) and kept.size("hidden_size") == count


@given(st.integers(0, 1000), st.sampled_from([(6, 3), (3, 3), (4, 2), (2, 2), (1, 1), (2, 1)]))
def test_heads_stay_evenly_in_groups(seed: int, left: tuple[int, int]) -> None:
    heads, groups = left
    scores = np.random.default_rng(seed).random(6)
    stay, shared = best_heads(scores, 3, groups, heads)
    sums = [scores[0:2].sum(), scores[2:4].sum(), scores[4:6].sum()]
    assert shared.tolist() == sorted(sorted(range(3), key=lambda group: -sums[group])[:groups])
    for group in shared:
        own = [head for head in stay if head // 2 == group]
        assert len(own) == heads // groups
        assert min(scores[own]) >= max([scores[h] for h in (2 * group, 2 * group + 1) if h not in own], default=0)
    assert len(stay) == heads and sorted(stay) == stay.tolist()


def test_as_many_experts_stay_in_each_group_of_a_router() -> None:
    fields = {**FIELDS, "moe_router_num_groups": 2, "moe_router_group_topk": 1}
    found = importance()
    kept = choose(Pruning(experts=4), found, fields)
    for layer in range(3):
        stay = kept.of("num_moe_experts", layer).tolist()
        scores = found.widths["num_moe_experts"][layer, None]
        for first in (0, 4):
            own = sorted(range(first, first + 4), key=lambda expert: -scores[expert])[:2]
            assert sorted(own) == [expert for expert in stay if first <= expert < first + 4]
    with pytest.raises(UsageError, match="could be to 1"):
        choose(Pruning(experts=2), found, fields)


@pytest.mark.parametrize(
    ("pruning", "said"),
    [
        (Pruning(), "nothing is left out"),
        (Pruning(layers=(0, 1, 2)), "nothing is left out"),
        (Pruning(hidden=8), "nothing is left out"),
        (Pruning(layers=(1, 0)), "ascending"),
        (Pruning(layers=(0, 3)), "are 0-2"),
        (Pruning(layers=(0,), keep_layers=1), "one of them"),
        (Pruning(keep_layers=4), "cannot be left of 3"),
        (Pruning(hidden=0), "cannot be left of 8"),
        (Pruning(hidden=9), "cannot be left of 8"),
        (Pruning(heads=4), "evenly"),
        (Pruning(heads=6, kv_heads=2), "2 each"),
        (Pruning(shared_ffn=2), "has no moe_shared"),
        (Pruning(experts=1), "sent to 2"),
    ],
)
def test_what_cannot_be_left_is_said(pruning: Pruning, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        choose(pruning, importance(), FIELDS)


def test_a_layer_that_nobody_scored_is_named() -> None:
    kept = Kept((0, 1), {"ffn_hidden_size": {(0, None): np.arange(3)}})
    with pytest.raises(CoverageError, match="`ffn` stay at layer 1"):
        kept.of("ffn_hidden_size", 1)


@given(st.data())
def test_what_is_picked_is_what_numpy_indexes(data: st.DataObject) -> None:
    """Any rows and columns, near and far, in any part: read in calls that hold no more than a strip."""
    rows, cols = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 9))
    item = data.draw(st.sampled_from([1, 2, 4]))
    stored = np.random.default_rng(0).integers(0, 256, (rows, cols, item), np.uint8)
    picks = [
        np.array(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1))), np.int64)
        if data.draw(st.booleans())
        else None
        for size in (rows, cols)
    ]
    picked = Picked("w", (), *picks)
    wanted = stored if picks[0] is None else stored[picks[0]]
    wanted = wanted if picks[1] is None else wanted[:, picks[1]]
    first = data.draw(st.integers(0, len(wanted) - 1))
    count = data.draw(st.integers(1, len(wanted) - first))

    def read(region: Region, row: int, out: Bytes) -> None:
        assert region.tensor == "w"
        out[:] = stored[row : row + len(out)].reshape(len(out), -1)

    origin = StoredTensor("w", {1: "U8", 2: "BF16", 4: "F32"}[item], (rows, cols), ())
    found = read_picked(picked, origin, first, count, read, at_once=data.draw(st.booleans()))
    assert (found == wanted[first : first + count].reshape(count, -1)).all()


def joiner() -> Joiner:
    config = json.loads((LLAMA / "config.json").read_bytes())
    table = table_for(config, None)
    return Joiner.at(table, table.config.to_mcore(config))


def test_dimensions_run_along_what_they_grow_with() -> None:
    llama = joiner()
    rows = {row.spec.param: row for row in llama.table.expand(llama.env, None)}
    found = {param: axes_of(row, llama, WIDTHS.keys() & llama.env.keys()) for param, row in rows.items()}
    hidden, heads, groups, ffn = "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size"
    assert found == {
        "embedding.word_embeddings.weight": Axes((None,), hidden),
        "decoder.final_layernorm.weight": Axes((hidden,)),
        "output_layer.weight": Axes((None,), hidden),
        "self_attention.linear_qkv.layer_norm_weight": Axes((hidden,)),
        "self_attention.linear_qkv.weight": Axes((heads, groups, groups), hidden),
        "self_attention.linear_proj.weight": Axes((hidden,), heads),
        "mlp.linear_fc1.layer_norm_weight": Axes((hidden,)),
        "mlp.linear_fc1.weight": Axes((ffn, ffn), hidden),
        "mlp.linear_fc2.weight": Axes((hidden,), ffn),
    }


def test_a_parameter_that_nothing_is_known_of_is_refused() -> None:
    llama = joiner()
    row = next(iter(llama.table.expand(llama.env, None)))
    odd = replace(row, spec=replace(row.spec, param="self_attention.odd.weight", op="col"))
    with pytest.raises(UnsupportedError, match="odd.weight"):
        axes_of(odd, llama, ["hidden_size"])


def test_an_interrupted_run_goes_on_with_the_same_choice_alone(tmp_path: Path) -> None:
    fields = {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 96, "num_attention_heads": 8}
    digests = []
    for seed in (1, 1, 2):
        job = plan_prune(LLAMA, tmp_path / "out", Pruning(ffn=40), Options(), importance=importance(seed, **fields))
        digests.append(plan_digest(job.plan, job.tensors))
    assert digests[0] == digests[1] != digests[2]
