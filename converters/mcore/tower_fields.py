"""How a provider of Megatron-Bridge and a config.json say the same of a model with towers, by name and path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from converters.errors import UsageError
from converters.mcore.bridge_families import Family
from converters.rows.config_spelling import GENERIC_KEYS
from converters.rows.expr import Value

Json = Mapping[str, Value]
#: What a config.json says of the whole model, and otherwise or not of its text model.
_OF_THE_WHOLE = ("architectures", "model_type")


@dataclass(frozen=True, slots=True)
class Held:
    """A field of a provider that holds an object of the class `target`.

    The object has all keys of config.json below `at`, or of the whole where that is empty; where `keys` are named,
    those alone: a field of its own → the path of a key.
    """

    target: str
    at: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)

    def node(self, whole: Json) -> dict[str, Value]:
        """The object as a node of run_config.yaml."""
        if self.keys:
            return {"_target_": self.target, **_taken(whole, self.keys)}
        found = _at(whole, self.at) if self.at else whole
        return {"_target_": self.target, **(found if isinstance(found, Mapping) else {})}

    def said(self, node: Json) -> dict[str, Value]:
        """What config.json has of a node, by path; of keys that every config of Transformers has, none."""
        if self.keys:
            return {path: node[name] for name, path in self.keys.items() if node.get(name) is not None}
        start = f"{self.at}." if self.at else ""
        return {start + name: value for name, value in _said(node).items()}


@dataclass(frozen=True, slots=True)
class Towers:
    """A family whose provider builds a model with its towers.

    `held` are its fields that hold an object, `keys` those that are a plain value of config.json (a field → the path
    of a key; one that config.json leaves out is the provider's default), `constants` those that are the same for all.
    `text` is the type of its text model, where another model of the same Hugging Face class has no provider; `turns`
    is what a config.json says, beside their sections, of positions with three axes. `within` begins the paths of the
    text model's and the towers' configs, where these are not the whole's own.
    """

    family: Family
    held: Mapping[str, Held]
    keys: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Value] = field(default_factory=dict)
    text: str = ""
    turns: Mapping[str, Value] = field(default_factory=dict)
    within: str = ""

    def fields(self, whole: Json) -> dict[str, Value]:
        """What the `model` node says of all that stands beside the text model, and of the text model for its sake."""
        held: dict[str, Value] = {name: held.node(whole) for name, held in self.held.items()}
        return {**held, **_taken(whole, self.keys), **self.constants}

    def whole(self, model: Mapping[str, object], text: Json) -> dict[str, Value]:
        """config.json of the model that a `model` node builds; `text` is what it says of the text model.

        Law: `fields` of it are those of the node. UsageError where a field that holds an object holds none.
        """
        inner = {key: value for key, value in text.items() if key not in _OF_THE_WHOLE}
        towers = {key: inner.pop(key) for key in list(inner) if key.startswith("vision_config")}
        if (sections := inner.pop("mrope_section", None)) is not None:
            scaling = inner.get("rope_scaling")
            rule = scaling if isinstance(scaling, Mapping) else {"rope_type": "default"}
            inner["rope_scaling"] = {**rule, "mrope_section": sections, **self.turns}
        if self.text:
            inner["model_type"] = self.text
        out: dict[str, Value] = {}
        for name, held in self.held.items():
            if (node := model.get(name)) is None:
                continue
            if not isinstance(node, Mapping):
                raise UsageError(f"run_config.yaml: `model.{name}` is {node!r}; an object was expected")
            _put_all(out, held.said(node))
        stated = {path: value for name, path in self.keys.items() if (value := model.get(name)) is not None}
        _put_all(out, stated)  # type: ignore[arg-type]
        inside = {**towers, **{f"text_config.{key}": value for key, value in inner.items()}}
        _put_all(out, {self.within + path: value for path, value in inside.items()})
        return {**out, **{key: text[key] for key in (*_OF_THE_WHOLE, "tie_word_embeddings") if key in text}}

    def builds(self, whole: Json) -> bool:
        """Whether it is the family of a model by its config.json."""
        return not self.text or _at(whole, "text_config.model_type") == self.text


def _at(whole: Json, path: str) -> Value:
    found: Value = whole
    for key in path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _said(node: Json) -> dict[str, Value]:
    """A config as a file has it: without what each has by Transformers' base class, and without what nothing says."""
    kept = {"model_type", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache"}
    left_out = (GENERIC_KEYS - kept) | {"_target_", "dtype"}
    said = {name: value for name, value in node.items() if name not in left_out and value is not None}
    return {name: _said(value) if isinstance(value, Mapping) else value for name, value in said.items()}


def _put_all(out: dict[str, Value], values: Mapping[str, Value]) -> None:
    """Put values into nested objects by their paths; an object joins the one that is there.

    UsageError where a path leads through what is none.
    """
    for path, value in values.items():
        *parents, key = path.split(".")
        at = out
        for parent in parents:
            inner = at.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise UsageError(f"run_config.yaml: `{parent}` is {inner!r}; an object was expected")
            at = inner
        old = at.get(key)
        at[key] = {**old, **value} if isinstance(old, Mapping) and isinstance(value, Mapping) else value


def _taken(whole: Json, keys: Mapping[str, str]) -> dict[str, Value]:
    return {name: found for name, path in keys.items() if (found := _at(whole, path)) is not None}
