"""The expression language: what it computes, and that nothing else gets through."""

import pytest

from converters.errors import TableError
from converters.rows.expr import evaluate, evaluate_int

ENV = {"L": 5, "n": 12, "pattern": "M*-M*-", "types": ["full", "sliding"], "tied": False, "cfg": {"a": {"b": 3}}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("n // 4 - 1", 2),
        ("(L + 1) % 3 == 0", True),
        ("pattern[L] == '-'", True),
        ("types[L % 2] == 'sliding' and not tied", True),
        ("tied or n", 12),
        ("0 < L < n", True),
        ("L in [1, 5]", True),
        ("7 if tied else 8", 8),
        ("cfg['a']['b'] * 2", 6),
        ("-1", -1),
        ("None is None", True),
    ],
)
def test_value(text: str, value: object) -> None:
    assert evaluate(text, ENV) == value


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "().__class__",
        "[x for x in types]",
        "lambda: 1",
        "n ** 99999",
        "'a' * 999999999",
        "n << 9999",
        "f'{n}'",
        "open",
        "types[9]",
        "cfg['zz']",
        "n // 0",
        "1 +",
        "(" * 400,
    ],
)
def test_anything_else_is_a_table_error(text: str) -> None:
    with pytest.raises(TableError):
        evaluate(text, ENV)


def test_a_truth_value_is_no_number() -> None:
    with pytest.raises(TableError, match="whole number"):
        evaluate_int("n == 12", ENV)
