"""A table's digest stands for what the table says: it ties measurements, manifests and journals to it."""

from __future__ import annotations

import pytest

from converters.rows.parse import parse_table
from mappings import table_names, table_text

TEXT = table_text("qwen3")


def digest(text: str, name: str = "qwen3") -> str:
    return parse_table(name, text).digest


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(f"# a comment\n{TEXT}", id="comment"),
        pytest.param(TEXT.replace(" = ", "   =   "), id="spaces"),
        pytest.param(TEXT.replace("Qwen3, dense", "Another note"), id="notes"),
        pytest.param("\n\n".join([TEXT.split("\n\n")[0], *reversed(TEXT.split("\n\n")[1:])]), id="order"),
    ],
)
def test_comments_layout_and_notes_do_not_count(text: str) -> None:
    assert text != TEXT
    assert digest(text) == digest(TEXT)


def test_the_name_does_not_count() -> None:
    assert digest(TEXT, "own") == digest(TEXT)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"mlp.gate_proj.weight", "mlp.up_proj.weight"', '"mlp.up_proj.weight", "mlp.gate_proj.weight"'),
        ('{ row = "mlp.down_proj.weight" }', '{ col = "mlp.down_proj.weight" }'),
        ("gated_linear_unit = true", "gated_linear_unit = false"),
        ('hf = "rope_theta", else = 10000.0', 'hf = "rope_theta", else = 500000.0'),
        ('n = "num_layers"', 'n = "num_layers - 1"'),
        ('heads    = "num_attention_heads"', 'heads    = "num_query_groups"'),
    ],
)
def test_every_other_change_counts(old: str, new: str) -> None:
    assert old in TEXT
    assert digest(TEXT.replace(old, new)) != digest(TEXT)


def test_no_two_tables_say_the_same() -> None:
    digests = {name: parse_table(name, table_text(name)).digest for name in table_names()}
    assert len(set(digests.values())) == len(digests)
