"""The table grammar: what is refused, and where the message points."""

import re

import pytest

from converters.errors import TableError
from converters.rows.parse import parse_table
from mappings import table_names, table_text

LLAMA = table_text("llama")


def test_every_shipped_table_parses() -> None:
    assert {parse_table(name, table_text(name)).name for name in table_names()} == set(table_names())


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ('{ norm = "model.norm.weight" }', '{ nrom = "model.norm.weight" }', "unknown key `nrom`"),
        ('{ norm = "model.norm.weight" }', '{ norm = "x", col = "y" }', "exactly one op"),
        ('rows = ["attn", "mlp"]', 'rows = ["attn", "mpl"]', "block `mpl` has no"),
        ('rows = ["attn", "mlp"]', 'rows = ["attn"]', "no site uses mlp"),
        ("mcore         = ", "mcroe         = ", "unknown key `mcroe`"),
        ("[dims]", "[dims]\nheads = 1", "Cannot overwrite"),
        ('= "rope_scaling"', '= "rope_scaling"\nrop = "rope_scaling"', "`rop` is not registered"),
        ('"model.norm.weight"', '"model.norm.{X}"', "unknown placeholder"),
        ("normalization = ", "num_layers = 3\nnormalization = ", "sets `num_layers` twice"),
        ('model_types   = ["llama"]', 'model_types = "llama"', "must be a list"),
        ('{ norm = "model.norm.weight" }', '{ norm = "x", dtype = "bf16" }', "only fp32"),
        ('{ norm = "model.norm.weight" }', '{ norm = "x.{E}" }', "needs `{E}`"),
    ],
)
def test_a_malformed_table_is_refused(before: str, after: str, complaint: str) -> None:
    assert before in LLAMA
    with pytest.raises(TableError, match=re.escape(complaint)):
        parse_table("llama", LLAMA.replace(before, after, 1))


CHILD = """
model_types   = ["novel"]
architectures = ["NovelForCausalLM"]
extends       = "llama"
[config]
init_method_std = { hf = "novel_range", else = 0.5 }
ignore = ["novel_key"]
[config.via]
rope = "rope_scaling"
[config.fixed]
attention_dropout = 0.0
[rows.head]
"-spare" = { drop = "spare.weight" }
[rows.attn]
"self_attention.linear_qkv.layer_norm_weight" = []
"self_attention.linear_proj.weight" = { row = "self_attn.dense.weight" }
"""


def test_a_table_that_extends_another_says_only_what_differs() -> None:
    child, base = parse_table("novel", CHILD), parse_table("llama", LLAMA)
    assert child.model_types == ("novel",) and child.notes == ""
    assert {**child.blocks, "attn": (), "head": ()} == {**base.blocks, "attn": (), "head": ()}
    rows = {spec[0].param: spec[0].hf for spec in child.blocks["attn"]}
    assert rows["self_attention.linear_proj.weight"] == ("self_attn.dense.weight",)
    assert "self_attention.linear_qkv.layer_norm_weight" not in rows and len(rows) == len(base.blocks["attn"]) - 1
    assert child.blocks["head"][:-1] == base.blocks["head"] and child.blocks["head"][-1][0].drop
    fields = {row.mcore: row for row in child.config.rows}
    assert fields["init_method_std"].hf == "novel_range" and "attention_dropout" not in fields
    assert child.config.fixed["attention_dropout"] == 0.0
    assert {"rope", "yarn"} & child.config.groups.keys() == {"rope"}  # both set `model.rope_scaling`
    assert child.config.ignore == base.config.ignore | {"novel_key"}


def test_a_table_leaves_out_what_another_has() -> None:
    text = CHILD.replace(
        "[config]\n", '[config]\nwithout = ["num_query_groups", "hidden_act", "yarn", "pretraining_tp"]\n'
    )
    text = text.replace('rope = "rope_scaling"\n', "").replace("[rows.head]", "[rows]\nmlp = []\n[rows.head]")
    text += (
        '[sites]\ndecoder = { mcore = "decoder.layers.{L}.", n = "num_layers", rows = ["attn"] }\n[when]\nmlp = "L"\n'
    )
    child, base = parse_table("novel", text), parse_table("llama", LLAMA)
    assert {row.mcore for row in base.config.rows} - {row.mcore for row in child.config.rows} == {
        *("num_query_groups", "attention_dropout"),
    }
    assert base.config.require.keys() - child.config.require.keys() == {"hidden_act"}
    assert not child.config.groups and child.config.ignore == {"novel_key"}
    assert "mlp" not in child.blocks and "mlp" not in child.when


@pytest.mark.parametrize("said", ['"rope_base"', '["rope_base"]'])
def test_a_table_leaves_out_nothing_that_another_has_not(said: str) -> None:
    with pytest.raises(TableError, match="`without`.*rope_base"):
        parse_table("novel", CHILD.replace("[config]\n", f"[config]\nwithout = {said}\n"))


def test_a_shipped_table_is_short() -> None:
    assert [name for name in table_names() if len(table_text(name).splitlines()) > 120] == []


@pytest.mark.parametrize("name", ["novel", "nowhere"])
def test_a_table_extends_a_shipped_one(name: str) -> None:
    with pytest.raises(TableError, match="there is no table"):
        parse_table("novel", CHILD.replace('"llama"', f'"{name}"'))
