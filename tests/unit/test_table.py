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
