"""Layouts: stages as Megatron Core places them, cuts by name as every table's ops cut, refusals with a way out."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.engine.plan import row_form
from converters.engine.regions import matrix
from converters.errors import LayoutError, UnsupportedError
from converters.mcore.cuts import VOCAB, cut_of, form_of, is_gated
from converters.mcore.keys import canonical_names, parse_key
from converters.mcore.layout import Layout, RankMap, boxes, check
from converters.mcore.pipeline import parse_layout
from converters.mcore.torch_dist import homes, stacks_layers
from converters.rows.config_map import environment
from converters.rows.ops import Form
from converters.rows.table import Row, Table
from converters.tensors import Shape, StoredTensor
from fixtures.index import load_index
from mbx.tables import table_for

#: The reference model of each index fixture that a shipped table covers.
REFERENCES = """
Llama-3.2-1B Llama-3.1-8B Qwen2.5-0.5B Qwen3-8B Mistral-7B-v0.3 Nemotron-4-Minitron-8B-Base gemma-2b gemma-2-2b
gemma-3-1b-pt glm-4-9b-chat-hf GLM-4-9B-0414 Phi-3-mini-4k-instruct OLMo-2-1124-7B granite-3.1-2b-base SmolLM3-3B
Seed-OSS-36B-Base MiMo-7B-Base Mixtral-8x7B-v0.1 Qwen1.5-MoE-A2.7B Qwen3-30B-A3B OLMoE-1B-7B-0924 DeepSeek-V2-Lite
DeepSeek-V3 DeepSeek-V3.2 GLM-5 GLM-4.5-Air MiniMax-M2 Qwen3-Next-80B-A3B-Instruct Nemotron-H-8B-Base-8K
""".split()


def shapes_of(tensors: dict[str, StoredTensor]) -> dict[str, Shape]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def grid(form: Form, shape: Shape, tp: int) -> list[tuple[int, ...]]:
    rows, cols = matrix(shape, 0)
    return [(b.rank, b.row, b.rows, b.col, b.cols) for b in boxes("x", form, rows, cols, tp)]


# --- pipeline stages -----------------------------------------------------------------------------------------------


@st.composite
def even(draw: st.DrawFn) -> tuple[Layout, int]:
    pp, vpp = draw(st.integers(2, 6)), draw(st.integers(1, 4))
    per = [draw(st.integers(1, 3)) * vpp for _ in range(3)]
    first, last = draw(st.booleans()), draw(st.booleans())
    last = last and (pp > 2 or vpp == 1 or not first)
    middle = pp - first - last
    layers = per[1] * middle + per[0] * first + per[2] * last
    return Layout(pp=pp, vpp=vpp, first_stage=per[0] if first else None, last_stage=per[2] if last else None), layers


@settings(max_examples=60, deadline=None)
@given(even())
def test_stages_are_megatron_cores(case: tuple[Layout, int]) -> None:
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    layout, layers = case
    config = TransformerConfig(num_layers=layers, hidden_size=8, num_attention_heads=1)
    config.pipeline_model_parallel_size = layout.pp
    config.virtual_pipeline_model_parallel_size = layout.vpp if layout.vpp > 1 else None
    config.num_layers_in_first_pipeline_stage = layout.first_stage
    config.num_layers_in_last_pipeline_stage = layout.last_stage
    for stage in layout.stages(layers):
        chunk = stage.vpp if layout.vpp > 1 else None
        assert stage.layers == get_num_layers_to_build(config, vp_stage=chunk, pp_rank=stage.pp)
        assert stage.first == get_transformer_layer_offset(config, vp_stage=chunk, pp_rank=stage.pp)


@pytest.mark.parametrize(
    ("text", "pp", "layers", "mtp"),
    [
        ("E|t*5|t*6|t,m,L", 4, 12, 1),
        ("Ett|(tt|)*5,tt|mL", 4, 14, 1),
        ("E,t*2|t|t|L", 2, 4, 0),
        ("Ettt|(tt|)*29,m|L", 16, 61, 1),
    ],
)
def test_custom_layouts_are_megatron_cores(text: str, pp: int, layers: int, mtp: int) -> None:
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    theirs = PipelineParallelLayerLayout(text, pp)
    theirs.validate_layer_layout(layers, mtp)
    ours = Layout(pp=pp, pipeline=text).stages(layers, mtp)
    assert len(ours) == theirs.virtual_pipeline_model_parallel_size * pp
    first = 0
    for stage in ours:
        kinds = theirs.layout[stage.pp][stage.vpp]
        assert (stage.first, stage.layers, stage.mtp) == (
            first,
            kinds.count(LayerType.decoder),
            kinds.count(LayerType.mtp),
        )
        assert stage.embedding == (LayerType.embedding in kinds)
        assert stage.loss == (LayerType.loss in kinds)
        first += stage.layers


@pytest.mark.parametrize(
    ("layers", "layout"),
    [(61, Layout(pp=4, last_stage=13)), (27, Layout(pp=2, first_stage=14)), (48, Layout(pp=4, vpp=2))],
)
def test_layer_order_is_intact(layers: int, layout: Layout) -> None:
    stages = layout.stages(layers)
    assert [stage.first for stage in stages] == [sum(s.layers for s in stages[:i]) for i in range(len(stages))]
    assert sum(stage.layers for stage in stages) == layers
    assert all(a.vpp <= b.vpp for a, b in pairwise(stages))


def test_layout_strings_are_bounded() -> None:
    assert parse_layout("E,t*2|(t|)*2L") == ["Ett", "t", "t", "L"]
    for text in ("(t)*999999999", "((t)*9999)*9999", "E|x|L", "t*"):
        with pytest.raises(LayoutError):
            parse_layout(text)


# --- refusals ------------------------------------------------------------------------------------------------------

MOE = {
    "num_layers": 27,
    "num_attention_heads": 16,
    "num_query_groups": 4,
    "ffn_hidden_size": 96,
    "num_moe_experts": 8,
    "moe_ffn_hidden_size": 48,
}


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (Layout(tp=6), ("num_query_groups = 4", "num_attention_heads = 16", "‹tp› 4")),
        (Layout(pp=2), ("num_layers = 27", "‹pp›")),
        (Layout(ep=3), ("num_moe_experts = 8", "‹ep› 2")),
        (Layout(etp=5), ("moe_ffn_hidden_size = 48", "‹etp› 4")),
        (Layout(pp=3, vpp=2), ("‹vpp› 2", "‹vpp› 1")),
        (Layout(vpp=2), ("‹vpp› 2", "‹pp› is 1")),
        (Layout(tp=0), ("‹tp› 0",)),
        (Layout(pp=3, first_stage=10), ("27 layers", "17")),
        (Layout(pp=2, pipeline="E|t*26,L"), ("26 `t`", "27 wanted")),
    ],
)
def test_impossible_layouts_are_refused_with_a_reason(layout: Layout, words: tuple[str, ...]) -> None:
    with pytest.raises(LayoutError) as caught:
        check(layout, MOE)
    said = " ".join([caught.value.fact, *caught.value.details])
    assert all(word in said for word in words), said


def test_a_layout_that_fits_is_not_refused_and_experts_are_asked_of_a_moe_alone() -> None:
    check(Layout(tp=4, pp=2, ep=4, etp=2, last_stage=13), MOE)
    check(Layout(tp=64), {})
    dense = {key: value for key, value in MOE.items() if "moe" not in key}
    check(Layout(tp=4, etp=1), dense)
    for layout, word in ((Layout(tp=4, etp=2), "`etp` 2"), (Layout(ep=2), "`ep` 2")):
        with pytest.raises(LayoutError, match=f"{word}: this model has no experts"):
            check(layout, dense)
    check(Layout(tp=8, etp=1), MOE)  # two ranks to a key and value head


def test_uneven_stages_are_offered() -> None:
    with pytest.raises(LayoutError) as caught:
        check(Layout(pp=4), {"num_layers": 61})
    assert "‹decoder-last-pipeline-num-layers› 13" in (caught.value.hint or "")
    check(Layout(pp=4, last_stage=13), {"num_layers": 61})


@settings(max_examples=50)
@given(st.integers(1, 70000), st.integers(1, 16), st.integers(1, 128))
def test_padding_is_least_and_divides(vocab: int, tp: int, divisor: int) -> None:
    rows = Layout(tp=tp, vocab_divisor=divisor).padded_vocab(vocab)
    assert rows % (tp * divisor) == 0 and 0 <= rows - vocab < tp * divisor


def test_ranks_are_those_of_the_smallest_world() -> None:
    ranks = RankMap(Layout(tp=2, pp=3, ep=4, etp=1), MOE)
    assert ranks.rank("decoder.layers.mlp.experts.experts.linear_fc1.weight", 9, 7, 0) == 4 + 3
    assert ranks.rank("embedding.word_embeddings.weight", None, None, 1) == 1
    assert ranks.rank("decoder.final_layernorm.weight", None, None, 0) == 8


# --- cuts by name --------------------------------------------------------------------------------------------------


def expanded(name: str) -> tuple[Table, list[tuple[str, Row, Shape, Form]]]:
    """Every Megatron Core key of a full-size model with the form its table gives it."""
    config, headers = load_index(name)
    table = table_for(config)
    mcore = table.config.to_mcore(config, allow_unused=tuple(config))
    env = environment(mcore)
    found = []
    stacked = stacks_layers(table.family, mcore)
    for row in table.expand(env, headers):
        if row.spec.drop or row.same_as or row.layer not in (None, 0, 1, 2, 3) or row.expert not in (None, 0):
            continue
        shapes = [headers[hf][1] for hf in row.hf]
        if row.spec.stacked:
            shapes = [shape[1:] for shape in shapes]
        if row.spec.transpose:
            shapes = [shape[::-1] for shape in shapes]
        rows = sum(shape[0] if shape else 1 for shape in shapes)
        form = row_form(row, table.dims_at(env), rows)
        for home in homes(row, stacked, table.num_layers(env), table.num_experts(env)):
            if home.atoms is not None:
                rows = sum(form.atoms[i] for i in home.atoms)
                found.append((home.key, row, (rows, *shapes[0][1:]), Form((rows,), ((1, (0,)),), cut=form.cut)))
            else:
                found.append((home.key, row, (rows, *shapes[0][1:]) if shapes[0] else (), form))
    return table, found


#: Models whose queries and keys have one norm over all heads.
NORMED_OVER_HEADS = ("MiniMax-M2", "OLMo-2", "OLMoE", "Olmo-3")


@pytest.mark.parametrize("name", REFERENCES)
def test_cuts_by_name_are_the_tables_cuts(name: str) -> None:
    try:
        _, rows = expanded(name)
    except UnsupportedError:
        pytest.skip(f"no shipped table covers {name}")
    depth = {key: parse_key(key).depth for key, *_ in rows}
    shapes = {key: (*(1,) * depth[key], *shape) for key, _, shape, _ in rows}
    for key, row, shape, form in rows:
        cut = cut_of(key, "linear_fc1" in key and "layer_norm" not in key and is_gated(key, shapes))
        assert grid(form_of(cut, shape[0] if shape else 1), shape, 1) is not None
        for tp in (1, 2):
            if name.startswith(NORMED_OVER_HEADS) and key.endswith(("q_layernorm.weight", "k_layernorm.weight")):
                continue  # cut over all heads by a layer that stock Megatron Core does not have
            if row.spec.op.startswith("qkv") and form.mcore_groups < tp:
                continue  # refused before any cut
            if key in VOCAB or form.columns:
                assert cut.dim == form.cut, row.mcore
            else:
                assert grid(form_of(cut, shape[0] if shape else 1), shape, tp) == grid(form, shape, tp), row.mcore


def test_a_name_that_is_not_known_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="linear_fc9"):
        cut_of("decoder.layers.mlp.linear_fc9.weight")


@pytest.mark.parametrize("name", REFERENCES)
def test_table_names_are_canonical(name: str) -> None:
    """The renaming of norms leaves every key that a table writes as it is."""
    try:
        _, rows = expanded(name)
    except UnsupportedError:
        pytest.skip(f"no shipped table covers {name}")
    assert {a: b for a, b in canonical_names([key for key, *_ in rows]).items() if a != b} == {}


def test_separate_norms_become_fused_where_transformer_engine_fuses_them() -> None:
    keys = [
        "decoder.layers.input_layernorm.weight",
        "decoder.layers.self_attention.linear_qkv.weight",
        "decoder.layers.0.pre_mlp_layernorm.weight",
        "decoder.layers.0.mlp.linear_fc1.weight",
        "decoder.layers.1.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.1.mlp.router.weight",
        "decoder.layers.2.pre_mlp_layernorm.weight",
        "decoder.layers.2.mlp.router.weight",
    ]
    changed = {a: b for a, b in canonical_names(keys).items() if a != b}
    assert changed == {
        "decoder.layers.input_layernorm.weight": "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.0.pre_mlp_layernorm.weight": "decoder.layers.0.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.1.mlp.linear_fc1.layer_norm_weight": "decoder.layers.1.pre_mlp_layernorm.weight",
    }


def test_norms_of_sparse_attention_stay_apart() -> None:
    """Megatron Core fuses no norm of latent attention into a projection where an indexer reads what it makes too.

    A layer without an indexer, which takes the choice of one before, has the same module.
    """
    own, fused = (f"decoder.layers.1.self_attention.{name}" for name in ("kv_layernorm.weight", "linear_kv_up_proj."))
    latent = [own, f"{fused}weight"]
    assert canonical_names(latent)[own] == f"{fused}layer_norm_weight"
    sparse = [*latent, "decoder.layers.0.self_attention.core_attention.indexer.linear_wk.weight"]
    assert canonical_names(sparse)[own] == own
    once = [f"{fused}layer_norm_weight" if name == own else name for name in sparse]  # as mbx wrote them before
    assert canonical_names(once)[once[0]] == own
