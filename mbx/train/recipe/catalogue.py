"""The shipped recipes and the user's own files, and `a.b=value` overrides on top."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Literal, get_origin

from converters.errors import StorageError, UsageError
from mbx.text import near_miss
from mbx.train.recipe.parse import SECTIONS, field_types, is_table, parse_recipe, unknown_key
from mbx.train.recipe.sections import Recipe
from mbx.untrusted.small_files import SETTINGS, read_text
from mbx.untrusted.toml_files import parse_toml

FOLDER = Path(__file__).parents[1] / "recipes"
#: `model=…` and `data=…` on a command line mean these keys.
_SHORT = {"model": "model.path", "data": "data.path", "steps": "train.steps", "lr": "optim.lr", "lora": "lora.rank"}
#: Keys of which one takes the other's place.
_EITHER = {"train.steps": "train.epochs", "train.epochs": "train.steps"}


def recipe_names() -> list[str]:
    """Names of the shipped recipes: whole files, and every MODEL_METHOD of `model.MODEL` and `method.METHOD`.

    A model's file may have a table `methods` of those that fit, each with what it changes for it; without, all fit.
    """
    stems = [path.name.removesuffix(".toml") for path in FOLDER.glob("*.toml")]
    whole = [stem for stem in stems if "." not in stem]
    models = [stem.removeprefix("model.") for stem in stems if stem.startswith("model.")]
    methods = [stem.removeprefix("method.") for stem in stems if stem.startswith("method.")]
    return sorted(whole + [f"{model}_{method}" for model in models for method in _methods(model, methods)])


def _methods(model: str, known: list[str]) -> list[str]:
    fitting = _toml(FOLDER / f"model.{model}.toml").get("methods", known)
    assert isinstance(fitting, list | dict)
    return list(fitting)


def load_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe `name` (shipped, or a `.toml` file) with `a.b=value` overrides; UsageError for what is wrong."""
    raw = _raw(name)
    told: list[str] = []
    for override in overrides:
        _apply(raw, override, told)
    raw.setdefault("name", Path(name).stem if name.endswith(".toml") else name)
    return parse_recipe(raw)


def recipe_of_folder(folder: str, method: str, overrides: Iterable[str] = ()) -> Recipe:
    """A shipped method on a Hugging Face folder's model, with overrides; UsageError for a method that is none."""
    methods = sorted(path.name.split(".")[1] for path in FOLDER.glob("method.*.toml"))
    if method not in methods:
        raise UsageError(f"there is no method `{method}`", hint=f"known: {', '.join(methods)}")
    raw = _toml(FOLDER / f"method.{method}.toml")
    raw.pop("title")
    told: list[str] = []
    for override in (f"model={folder}", *overrides):
        _apply(raw, override, told)
    raw.setdefault("name", f"{Path(folder).resolve().name}_{method}")
    return parse_recipe(raw)


def _raw(name: str) -> dict[str, object]:
    if name.endswith(".toml"):
        return _toml(Path(name))
    if (FOLDER / f"{name}.toml").is_file() and "." not in name:
        return _toml(FOLDER / f"{name}.toml")
    if name not in recipe_names():
        hint = near_miss(name, recipe_names(), "`mbx train ‹list›` shows all")
        raise UsageError(f"there is no recipe `{name}`", hint=hint)
    model, _, method = name.rpartition("_")
    how, what = _toml(FOLDER / f"method.{method}.toml"), _toml(FOLDER / f"model.{model}.toml")
    methods = what.pop("methods", {})
    assert isinstance(methods, dict)
    own = methods.get(method, {})
    merged: dict[str, object] = {"description": f"{what.pop('title')}: {how.pop('title')}"}
    for key in (*how, *what, *own):  # the model's file has the last word, field by field
        merged[key] = {**_section(how, key), **_section(what, key), **_section(own, key)}
    return merged


def _section(raw: Mapping[str, object], key: str) -> dict[str, object]:
    section = raw.get(key, {})
    assert isinstance(section, dict)
    return section


def _toml(path: Path) -> dict[str, object]:
    try:
        return parse_toml(read_text(path, SETTINGS))
    except OSError as error:
        raise StorageError(f"cannot read the recipe `{path}`: {error}") from error
    except ValueError as error:
        raise UsageError(f"recipe `{path}`: {error}") from error


def _apply(raw: dict[str, object], override: str, told: list[str]) -> None:
    """Set a key; `told` collects those that were."""
    key, separator, text = override.partition("=")
    if not separator:
        raise UsageError(f"`{override}` is no override", hint="overrides read section.key=value")
    key = _SHORT.get(key, key)
    section, dot, rest = key.partition(".")
    if not dot:
        if key not in ("name", "description"):
            raise unknown_key(key)
        raw[key] = text
        return
    if section not in SECTIONS:
        raise unknown_key(key)
    table = raw.setdefault(section, {})
    if not isinstance(table, dict):
        raise UsageError(f"`{section}` is a section, got {table!r}", hint=f"write {section}.FIELD=value")
    kinds, (field, dot, inner) = field_types(section), rest.partition(".")
    kind = kinds.get(rest)
    if dot and is_table(kinds.get(field)):
        if isinstance(kinds[field], UnionType) and not isinstance(table.get(field), dict):
            table[field] = {}  # in place of what the recipe names without a table
        table, kind, rest = table.setdefault(field, {}), None, inner
        if not isinstance(table, dict):
            raise UsageError(f"`{section}.{field}` must be a table, got {table!r}")
    if (other := _EITHER.get(f"{section}.{rest}")) and other not in told:
        table.pop(other.partition(".")[2], None)  # what the recipe says of it, not what the command line does
    told.append(f"{section}.{rest}")
    if isinstance(kind, UnionType):
        table[rest] = _several(text)
    else:
        table[rest] = text if kind is str or get_origin(kind) is Literal else _value(text)


def _several(text: str) -> object:
    """One name, several between commas, or a list or table of TOML."""
    if text[:1] in ("[", "{") and not isinstance(found := _value(text), str):
        return found
    return text.split(",") if "," in text else text


def _value(text: str) -> object:
    """A TOML value where it parses as one, else the text itself."""
    try:
        return parse_toml(f"v = {text}")["v"]
    except ValueError:
        return text
