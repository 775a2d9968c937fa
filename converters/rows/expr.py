"""The total expression language of the tables: arithmetic, comparison and indexing over config values.

Tables are data a user may receive from anybody, so expressions are walked by this evaluator and never
compiled: no calls, no attributes, no loops, no way to build a large value.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from converters.errors import TableError

Value = None | bool | int | float | str | Sequence["Value"] | Mapping[str, "Value"]
Env = Mapping[str, Value]

_MAX_LENGTH = 300
_ARITHMETIC: dict[type[ast.operator], Callable[..., int | float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARE: dict[type[ast.cmpop], Callable[..., bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda item, container: item in container,
    ast.NotIn: lambda item, container: item not in container,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}


@lru_cache(maxsize=4096)
def _parse(text: str) -> ast.expr:
    if len(text) > _MAX_LENGTH:
        raise TableError(f"expression of {len(text)} characters; at most {_MAX_LENGTH} are allowed")
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, RecursionError, ValueError) as error:
        raise TableError(f"`{text}` is not an expression: {error}") from error


def evaluate(expression: str | int | float | bool, env: Env) -> Value:
    """Value of `expression` over `env`; a number or a truth value stands for itself.

    Raises TableError on a name `env` lacks and on every construct outside the language.
    """
    if not isinstance(expression, str):
        return expression
    try:
        return _walk(_parse(expression), env, expression)
    except (TypeError, KeyError, IndexError, ZeroDivisionError) as error:
        raise TableError(f"`{expression}` cannot be evaluated: {type(error).__name__}: {error}") from error


def evaluate_int(expression: str | int, env: Env) -> int:
    """`evaluate`, for a whole number; anything else is a TableError."""
    value = evaluate(expression, env)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TableError(f"`{expression}` is {value!r}; a whole number was expected")
    return value


@lru_cache(maxsize=4096)
def names(expression: str | int | float | bool) -> frozenset[str]:
    """Names an expression refers to."""
    if not isinstance(expression, str):
        return frozenset()
    return frozenset(node.id for node in ast.walk(_parse(expression)) if isinstance(node, ast.Name))


def _walk(node: ast.expr, env: Env, text: str) -> Value:
    match node:
        case ast.Constant(value=value) if value is None or isinstance(value, bool | int | float | str):
            return value
        case ast.Name(id=name):
            if name not in env:
                raise TableError(f"`{text}` refers to `{name}`, which the config does not define")
            return env[name]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            a, b = _walk(left, env, text), _walk(right, env, text)
            if not isinstance(a, int | float) or not isinstance(b, int | float):
                raise TableError(f"`{text}`: arithmetic on {a!r} and {b!r}")
            return _ARITHMETIC[type(op)](a, b)
        case ast.BoolOp(op=op, values=values):
            result: Value = None
            for value in values:
                result = _walk(value, env, text)
                if bool(result) is isinstance(op, ast.Or):
                    return result
            return result
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _walk(operand, env, text)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return _walk(body if _walk(test, env, text) else orelse, env, text)
        case ast.Compare(left=left, ops=signs, comparators=comparators) if all(type(s) in _COMPARE for s in signs):
            a = _walk(left, env, text)
            for sign, comparator in zip(signs, comparators, strict=True):
                b = _walk(comparator, env, text)
                if not _COMPARE[type(sign)](a, b):
                    return False
                a = b
            return True
        case ast.Subscript(value=value, slice=index):
            container, key = _walk(value, env, text), _walk(index, env, text)
            if isinstance(container, Mapping) and isinstance(key, str):
                return container[key]
            if isinstance(container, Sequence) and isinstance(key, int):
                return container[key]
            raise TableError(f"`{text}`: {key!r} cannot index {type(container).__name__}")
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_walk(element, env, text) for element in elements]
    raise TableError(f"`{text}`: {type(node).__name__} is not allowed in a table")
