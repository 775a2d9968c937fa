"""Recipes: small TOML files whose keys are the fields of `mbx.train.recipe.sections`.

Everything a run depends on stands in one. Unknown keys are errors; the fields are the documentation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

from converters.errors import UsageError
from converters.rows.expr import Value
from mbx.train.recipe.sections import Distill, Optim, Range, Recipe, places_of

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
            given = {k: _typed(f"{key}.{k}", kinds[k], v) for k, v in value.items()}
            if key == "train" and given.get("epochs"):
                given = {"steps": 0, **given}
            arguments[key] = SECTIONS[key](**given)
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


def choices(section: str, field: str) -> tuple[str, ...]:
    """The words that a key takes; none where it takes whatever is of its type."""
    kind = field_types(section).get(field)
    return get_args(kind) if get_origin(kind) is Literal else ()


def is_table(kind: object) -> bool:
    """Whether a key takes a table, alone or among others."""
    return any(get_origin(one) is Mapping for one in _kinds(kind))


def _kinds(kind: object) -> tuple[object, ...]:
    return get_args(kind) if isinstance(kind, UnionType) else (kind,)


def _typed(key: str, kind: object, value: object) -> object:
    if isinstance(kind, UnionType):
        return _typed(key, _kind_for(key, kind, value), value)
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
    item, flat = get_args(kind)[1], _flat(value)
    return {k: _typed(f"{key}.{k}", item, v) for k, v in flat.items()} if get_origin(item) is Annotated else flat


def _kind_for(key: str, kind: UnionType, value: object) -> object:
    """Which of several types a key takes by the value that it is given."""
    wanted = Mapping if isinstance(value, Mapping) else tuple if isinstance(value, list | tuple) else type(value)
    found = next((one for one in get_args(kind) if wanted in (one, get_origin(one))), None)
    if found is None:
        names = {str: "text", tuple: "a list", Mapping: "a table"}
        said = " or ".join(names[get_origin(one) or one] for one in get_args(kind))
        raise UsageError(f"`{key}` must be {said}, got {value!r}")
    return found


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


def _said(places: Sequence[str]) -> str:
    return ",".join(places)


def _unread(optim: Optim) -> str | None:
    """A key of Muon's that says other than its default where another optimizer steps."""
    if optim.optimizer == "muon":
        return None
    names = [field.name for field in fields(optim) if field.name.startswith("muon_")]
    return next((name for name in names if getattr(optim, name) != getattr(Optim(), name)), None)


def _check(recipe: Recipe) -> None:
    """What can be said of keys together without reading a file, and of keys that a run would leave unread."""
    d, t, o, lora, p = recipe.data, recipe.train, recipe.optim, recipe.lora, recipe.parallel
    evaluated = f"data.eval_path={_said(places_of(d.eval_path))}" if d.eval_path else ""
    held = evaluated or (f"data.eval_share={d.eval_share:g}" if d.eval_share else "")
    idle = [name for name, weight in d.path.items() if not weight] if isinstance(d.path, Mapping) else []
    saved = f"lora.modules_to_save={_said(lora.modules_to_save)}" if lora.modules_to_save else ""
    adapted = f"lora.adapter={lora.adapter}" if lora.adapter else "lora.dora=true" if lora.dora else saved
    rules: tuple[tuple[object, str, str | None], ...] = (
        (
            t.steps and t.epochs,
            f"train.steps={t.steps} and train.epochs={t.epochs:g} both say how long",
            "give one of them",
        ),
        (
            not t.steps and not t.epochs,
            "`train.steps` must be at least 1, got 0",
            "train.epochs=1 counts the steps of a pass",
        ),
        (
            "" in d.places,
            "data.path names a place by an empty text",
            None,
        ),
        (
            idle,
            f"data.path gives {_said(idle)} the weight 0",
            "leave out what is not trained on",
        ),
        (
            t.epochs and d.kind in ("indexed", "mock", "pattern"),
            f"data.kind `{d.kind}` has no epochs to count, got train.epochs={t.epochs:g}",
            "train.steps=100",
        ),
        (
            t.steps and o.warmup_steps > t.steps,
            f"optim.warmup_steps {o.warmup_steps} exceed train.steps {t.steps}",
            "optim.warmup_steps=0 trains without a warm-up, optim.warmup_fraction=0.05 warms up by share",
        ),
        (
            o.min_lr > o.lr and o.schedule != "constant",
            f"optim.min_lr {o.min_lr:g} is above optim.lr {o.lr:g}",
            f"optim.min_lr={o.lr / 10:g}",
        ),
        (
            unread := _unread(o),
            f"optim.{unread} is of Muon, and optim.optimizer is {o.optimizer}",
            "optim.optimizer=muon",
        ),
        (
            d.path and d.kind in ("mock", "pattern"),
            f"data.kind `{d.kind}` reads no file, got data.path={_said(d.places)}",
            "data.kind=chat, completion, text or indexed reads one",
        ),
        (
            d.eval_path and d.kind not in ("auto", "chat", "completion", "text"),
            f"data.kind `{d.kind}` takes no data.eval_path, got {_said(places_of(d.eval_path))}",
            "data.split sets its share for validation" if d.kind == "indexed" else None,
        ),
        (
            held and not t.eval_every,
            f"{held} is never read: train.eval_every is 0",
            "train.eval_every=100",
        ),
        (
            (t.patience or recipe.run.keep_best) and not t.eval_every,
            f"{'train.patience' if t.patience else 'run.keep_best'} needs validation, and train.eval_every is 0",
            "train.eval_every=100",
        ),
        (
            (recipe.run.keep_best or recipe.run.export_every) and not recipe.run.save,
            f"run.{'keep_best' if recipe.run.keep_best else 'export_every'} needs checkpoints, and run.save is false",
            "run.save=true",
        ),
        (
            recipe.run.export_every and not recipe.model.path,
            "run.export_every writes by the names of a Hugging Face folder, and model.path names none",
            "model=DIR",
        ),
        (
            d.eval_share and d.kind not in ("auto", "chat", "completion", "text"),
            f"data.kind `{d.kind}` takes no data.eval_share, got {d.eval_share:g}",
            "data.split sets its share for validation" if d.kind == "indexed" else None,
        ),
        (
            d.eval_share and d.eval_path,
            f"{evaluated} and data.eval_share={d.eval_share:g} both say what validates",
            "give one of them",
        ),
        (
            (d.template or d.learn != "assistant") and d.kind in ("text", "indexed", "mock", "pattern"),
            f"data.kind `{d.kind}` knows no turns, got data.{'template' if d.template else 'learn'}",
            "data.kind=chat or completion has them",
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
        (
            lora.rank and recipe.model.config.get("moe_router_bias_update_rate"),
            "model.config.moe_router_bias_update_rate moves the router's expert bias, which adapters leave alone",
            "an adapter's folder has no place for it; lora.rank=0 trains and saves it with every weight",
        ),
        (
            recipe.distill != replace(Distill(), teacher=recipe.distill.teacher) and not recipe.distill.teacher,
            "keys of `distill` are set, and distill.teacher names none",
            "distill.teacher=DIR",
        ),
        (
            recipe.distill.teacher and not recipe.distill.weight and not recipe.distill.hidden_weight,
            "distill.weight 0 leaves nothing to learn from the teacher",
            "distill.weight=0.5",
        ),
        (
            not recipe.distill.hidden_weight
            and (recipe.distill.hidden_layers or recipe.distill.hidden_loss != Distill().hidden_loss),
            "how hidden states are compared is said, and distill.hidden_weight is 0",
            "distill.hidden_weight=1",
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
