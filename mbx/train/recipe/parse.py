"""Recipes: small TOML files whose keys are the fields of `mbx.train.recipe.sections`.

Everything a run depends on stands in one. Unknown keys are errors; the fields are the documentation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

from converters.errors import UsageError
from converters.rows.expr import Value
from mbx.train.recipe.sections import Range, Recipe

SECTIONS: dict[str, type] = {name: kind for name, kind in get_type_hints(Recipe).items() if kind is not str}
#: Up to three shares of Megatron-LM's `--split`, the first above 0.
_SPLIT = re.compile(r"(?=[^,]*[1-9])\d*\.?\d+(,\d*\.?\d+){0,2}")


def parse_recipe(raw: Mapping[str, object]) -> Recipe:
    """A recipe from parsed TOML: every key known, every value of its field's type and range."""
    arguments: dict[str, object] = {}
    for key, value in raw.items():
        if key in ("name", "description"):
            arguments[key] = _typed(key, str, value)
        elif key in SECTIONS:
            if not isinstance(value, Mapping):
                raise UsageError(f"`{key}` is a section, got {value!r}", hint=f"write {key}.FIELD=value")
            kinds = field_types(key)
            if unknown := [name for name in value if name not in kinds]:
                raise unknown_key(f"{key}.{unknown[0]}")
            arguments[key] = SECTIONS[key](**{k: _typed(f"{key}.{k}", kinds[k], v) for k, v in value.items()})
        else:
            raise unknown_key(key)
    recipe = Recipe(**arguments)  # type: ignore[arg-type]
    _check(recipe)
    return recipe


def all_keys() -> list[str]:
    """Every key a recipe may hold, dotted."""
    return list(Recipe().flat())


def field_types(section: str) -> dict[str, object]:
    """What each key of a section takes: a type, choices, or a number with its range."""
    return get_type_hints(SECTIONS[section], include_extras=True)


def _typed(key: str, kind: object, value: object) -> object:
    kind, limits = get_args(kind) if get_origin(kind) is Annotated else (kind, Range())
    if get_origin(kind) is Literal:
        if value not in (choices := get_args(kind)):
            close = get_close_matches(str(value), choices, n=1)
            raise UsageError(
                f"`{key}` is {value!r}; choices: {', '.join(choices)}",
                hint=f"did you mean {key}={close[0]}?" if close else None,
            )
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(kind, type):
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise UsageError(f"`{key}` must be of type {kind.__name__}, got {value!r}")
        if isinstance(value, int | float):
            _check_range(key, value, limits)
        return value
    if kind == tuple[str, ...]:
        if isinstance(value, str):
            value = [part for part in value.split(",") if part]
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise UsageError(f"`{key}` must be a list of strings, got {value!r}")
        return tuple(value)
    if not isinstance(value, Mapping):
        raise UsageError(f"`{key}` must be a table, got {value!r}")
    return _flat(value)


def _flat(value: Mapping[str, object], prefix: str = "") -> dict[str, Value]:
    """TOML nests `model.vocab_size = 1`; a flat config keeps the dot in the name."""
    out: dict[str, Value] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            out |= _flat(inner, f"{prefix}{key}.")
        else:
            out[prefix + key] = inner  # type: ignore[assignment]
    return out


def unknown_key(key: str) -> UsageError:
    """The error about a key that no recipe has, with those that it may stand for."""
    known = all_keys()
    leaves = {name.rpartition(".")[2]: name for name in known}
    close = get_close_matches(key, known, n=3) or [
        leaves[m] for m in get_close_matches(key.rpartition(".")[2], list(leaves), n=2)
    ]
    return UsageError(
        f"a recipe has no key `{key}`",
        hint=f"did you mean {', '.join(close)}?" if close else "`mbx train ‹recipe› NAME ‹show›` prints every key",
    )


def _check_range(key: str, value: float, limits: Range) -> None:
    low, high = limits.low, limits.high
    if not math.isfinite(value):
        raise UsageError(f"`{key}` must be a finite number, got {value}")
    if limits.below and not low <= value < high:
        raise UsageError(f"`{key}` must be at least {low} and below {high}, got {value}")
    if high < math.inf and not low <= value <= high:
        raise UsageError(f"`{key}` must be {low} to {high}, got {value}")
    if value < low:
        raise UsageError(f"`{key}` must {'not be negative' if low == 0 else f'be at least {low}'}, got {value}")


def _check(recipe: Recipe) -> None:
    """What can be said of keys together without reading a file, and of keys that a run would leave unread."""
    d, t, o, lora, p = recipe.data, recipe.train, recipe.optim, recipe.lora, recipe.parallel
    adapted = f"lora.adapter={lora.adapter}" if lora.adapter else "lora.dora=true" if lora.dora else ""
    rules: tuple[tuple[object, str, str | None], ...] = (
        (
            o.warmup_steps > t.steps,
            f"optim.warmup_steps {o.warmup_steps} exceed train.steps {t.steps}",
            "optim.warmup_steps=0 trains without a warm-up, optim.warmup_fraction=0.05 warms up by share",
        ),
        (
            o.min_lr > o.lr and o.schedule != "constant",
            f"optim.min_lr {o.min_lr:g} is above optim.lr {o.lr:g}",
            f"optim.min_lr={o.lr / 10:g}",
        ),
        (
            d.path and d.kind in ("mock", "pattern"),
            f"data.kind `{d.kind}` reads no file, got data.path={d.path}",
            "data.kind=chat, completion, text or indexed reads one",
        ),
        (
            d.eval_path and d.kind not in ("chat", "completion", "text"),
            f"data.kind `{d.kind}` takes no data.eval_path, got {d.eval_path}",
            "data.split sets its share for validation" if d.kind == "indexed" else None,
        ),
        (
            d.eval_path and not t.eval_every,
            f"data.eval_path={d.eval_path} is never read: train.eval_every is 0",
            "train.eval_every=100",
        ),
        (
            d.kind == "indexed" and not _SPLIT.fullmatch(d.split),
            f"`data.split` is shares of training, validation and test, got {d.split!r}",
            "data.split=969,30,1",
        ),
        (
            adapted and not lora.rank,
            f"{adapted}, and lora.rank 0 trains every weight",
            "lora.rank=16 trains adapters",
        ),
        (
            lora.rank and not lora.alpha,
            "lora.alpha 0 multiplies every adapter by 0",
            f"lora.alpha={2 * lora.rank}",
        ),
        (not recipe.run.dir, "`run.dir` is empty", "run.dir=runs/NAME"),
        (
            p.vpp > 1 and p.pp == 1,
            f"parallel.vpp {p.vpp} interleaves pipeline stages, and parallel.pp is 1",
            "parallel.vpp=1, or parallel.pp=2 on two GPUs",
        ),
    )
    for broken, fact, hint in rules:
        if broken:
            raise UsageError(fact, hint=hint)
