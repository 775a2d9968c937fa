"""Keys of adapter files: which module each tensor belongs to, and what it is of it, whoever wrote the file.

PEFT names modules as they live in memory, `base_model.model.MODULE.lora_A.weight`. A text model inside a larger one
lives under that one's names, which Transformers changed in 4.52 and again in 5; trainers that gather the state
themselves leave the adapter's name in the keys (`lora_A.default.weight`), or the names of wrappers around modules.
Source: `get_peft_model_state_dict` and `ModulesToSaveWrapper` of PEFT 0.21.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from converters.adapters.sites import spellings
from converters.errors import CoverageError, UnsupportedError
from converters.mcore.keys import EMBEDDING, HEAD
from converters.rows.expr import Env
from converters.rows.table import Table, respelt

PREFIX = "base_model.model."
NESTED = ".base_layer"

#: A factor or a magnitude of a linear, rows that replace a token's, or a whole tensor.
Part = Literal["a", "b", "m", "rows", "whole"]

_WRAPPERS = re.compile(r"(?:^module\.)+|(?:^|(?<=\.))(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_FACTOR = re.compile(r"(.+)\.lora_(A|B|magnitude_vector)(?:\.(?!weight$)([^.]+))?(?:\.weight)?")
_EMBEDDED = re.compile(r"(.+)\.lora_embedding_(A|B)(?:\.([^.]+))?")
_ROWS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta(?:\.([^.]+))?")
_WHOLE = re.compile(r"(.+?)(?:\.modules_to_save\.([^.]+)|\.token_adapter\.base_layer|\.base_layer)?\.(weight|bias)")
_PARTS: Mapping[str, Part] = {"A": "a", "B": "b", "magnitude_vector": "m"}
#: How PEFT ends the key of each factor.
_SUFFIXES: Mapping[Part, str] = {"a": ".lora_A.weight", "b": ".lora_B.weight", "m": ".lora_magnitude_vector"}
#: What a wrapped module was before training: kept by gathered states, and of no use.
_BEFORE = ".original_module."

#: How a text model's names begin where it lies in a larger one, by what they begin with in the tables: Transformers 5
#: and 4.52, hub repositories and Transformers before.
_INSIDE: tuple[Mapping[str, str], ...] = (
    {"model.": "model.language_model."},
    {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
    {"model.": "language_model."},
)
#: Tables of models that keep a causal model beside their tower: in memory it has the hub's names.
_APART = frozenset(("llama4_vl",))
#: How they begin in any model: without a head around the decoder, or inside a value model's wrapper.
_AROUND: tuple[Mapping[str, str], ...] = ({"": "pretrained_model."}, {"model.": ""})


@dataclass(frozen=True, slots=True)
class Key:
    """One tensor's key: the module as the file spells it, what the tensor is, and a whole one's leaf.

    `embeds` says that a factor is an embedding's, whose update lies turned round.
    """

    module: str
    part: Part
    leaf: str = ""
    adapter: str | None = None
    embeds: bool = False


def parse_keys(names: Iterable[str]) -> tuple[dict[str, Key], list[str]]:
    """Keys by name, and the names that are none of an adapter's.

    Raises UnsupportedError for factors that are not read, and for the tensors of several adapters in one file.
    """
    found: dict[str, Key] = {}
    other = []
    for name in names:
        if _BEFORE in name:
            continue
        if (key := parse_key(name)) is None:
            other.append(name)
        else:
            found[name] = key
    if odd := [name for name in (*other, *found) if ".lora_" in name and (name in other or found[name].leaf)]:
        raise UnsupportedError(
            f"`{odd[0]}` is no factor of a linear: such adapters are not read",
            hint="merge it with PEFT itself: `merge_and_unload`, then `save_pretrained`",
            details=odd,
        )
    if len(adapters := sorted({key.adapter for key in found.values() if key.adapter is not None})) > 1:
        raise UnsupportedError(
            f"the file holds {len(adapters)} adapters: {', '.join(adapters)}",
            hint="save one of them into a folder of its own: `save_pretrained(DIR, selected_adapters=[NAME])` of PEFT",
        )
    return found, other


def parse_key(name: str) -> Key | None:
    """What a tensor of an adapter is, by its key; None for one that is none of an adapter's."""
    bare = _WRAPPERS.sub("", name)
    while bare.startswith(PREFIX):  # twice where an adapted model was given an adapter once more
        bare = bare.removeprefix(PREFIX)
    if match := _FACTOR.fullmatch(bare):
        return Key(match[1], _PARTS[match[2]], adapter=match[3])
    if match := _EMBEDDED.fullmatch(bare):
        return Key(match[1], _PARTS[match[2]], adapter=match[3], embeds=True)
    if match := _ROWS.fullmatch(bare):
        return Key(match[1], "rows", adapter=match[2])
    if match := _WHOLE.fullmatch(bare):
        return Key(match[1], "whole", match[3], match[2])
    return None


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a file begins the names of modules: `way` says it of what the table's text begins them with.

    `rows` says the same of the rows' names where no folder is given. `name` is the way in words.
    """

    way: Mapping[str, str]
    rows: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The beginning of the decoder's names."""
        return self.way.get("model.", self.way.get("", "") + "model.") or "layers."

    def canonical(self, module: str) -> str | None:
        """A module's name as the rows have it; None where the file would not spell a module so."""
        plain = _plain(f"{module}.", self.way)  # beginnings end with a dot
        return None if plain is None else respelt(plain, self.rows).removesuffix(".")

    def said(self, module: str) -> str:
        """A module's name as the file has it."""
        return respelt(_plain(f"{module}.", self.rows) or f"{module}.", self.way).removesuffix(".")


def live_spelling(table: Table, present: Collection[str] | None = None) -> Spelling:
    """How Transformers spells modules in memory, as PEFT has them: by the last of the ways in which a table says that
    the names of a text model inside a larger one begin. `present`: of the names of a folder that holds these."""
    live = table.wrapped[0 if table.name in _APART else -1] if table.wrapped else {}
    return Spelling(live, table.beginnings(present))


def _plain(name: str, way: Mapping[str, str]) -> str | None:
    """A name as the table's text has it; None where `way` would not begin a name so."""
    for own, said in way.items():
        if name.startswith(said):
            return own + name[len(said) :]
    return None if any(name.startswith(own) for own in way) else name


def spelling_of(table: Table, env: Env, modules: Collection[str], present: Collection[str] = ()) -> Spelling:
    """The spelling under which every one of `modules` is the model's.

    `present` are the base folder's tensors: modules beside the text model, of which no row speaks, are told by them.
    Raises CoverageError, with the modules that are none, where no spelling that is known explains them all.
    """
    known = frozenset(known_modules(table, env))
    best: list[str] = list(modules)
    for way in _ways(table):
        spelling = Spelling(way, table.beginnings(None))
        named = {module: _bare(spelling.canonical(module)) for module in modules}
        odd = [
            module
            for module, name in named.items()
            if name not in known and (name is None or weight_beside(table, name, present) is None)
        ]
        if not odd:
            return spelling
        best = min(best, odd, key=len)
    outside = [name for name in best if name.startswith(table.beside) or re.search(r"(^|\.)(vision|visual)", name)]
    hint = f"the base's table is `{table.name}`: is it the model that the adapter was trained on?"
    if len(outside) == len(best):
        hint = (
            "they belong to the model around the text model, whose adapters only `mbx convert merge` takes, from a "
            "Hugging Face folder into one: is this the base, whole?"
        )
    raise CoverageError(
        f"adapter: {len(best)} of {len(modules)} adapted modules are not in the base model, first `{best[0]}`",
        hint=hint,
        details=[f"`{name}`" for name in best],
    )


def _ways(table: Table) -> Iterator[Mapping[str, str]]:
    """From the longest on: names of a wrapped model would also do as their own."""
    yield from (*table.wrapped, *_INSIDE, {}, *_AROUND)


def _bare(module: str | None) -> str | None:
    while module is not None and module.endswith(NESTED):
        module = module.removesuffix(NESTED)
    return module


def known_modules(table: Table, env: Env) -> Iterator[str]:
    """Every module of the model, in each of the table's spellings; of parameters that hold all experts their owner."""
    for row in table.expand(untied(env), None):
        for spelt in spellings(table, row):
            for name in spelt.hf:
                owner, _, leaf = name.rpartition(".")
                yield owner if spelt.spec.stacked or leaf in ("weight", "bias") else name


def untied(env: Env) -> Env:
    """`env` with an output layer of its own: an adapter may have one where the base has not."""
    return {**env, "share_embeddings_and_output_weights": False}


def head_name(table: Table, env: Env) -> str | None:
    """The output layer's name as the rows have it, None where the table has none."""
    rows = (row for row in table.expand(untied(env), None) if row.spec.param == HEAD)
    return next((row.hf[0] for row in rows), None)


def embedding_name(table: Table, env: Env) -> str | None:
    """The embedding's name as the rows have it."""
    rows = (row for row in table.expand(env, None) if row.spec.param == EMBEDDING)
    return next((row.hf[0] for row in rows), None)


def name_in_base(table: Table, name: str, present: Collection[str]) -> str:
    """A tensor's name in a folder that holds `present`, by the name that the rows would have for it."""
    plain = _plain(name, table.beginnings(None))
    return respelt(name if plain is None else plain, table.beginnings(present))


def weight_beside(table: Table, module: str, present: Collection[str]) -> str | None:
    """The base's weight of a module beside the text model, named as the rows would; None where it holds none."""
    name = name_in_base(table, f"{module}.weight", present)
    return name if name in present and name.startswith(table.beside) else None


def recorded_keys(table: Table, env: Env, names: Collection[str]) -> tuple[Spelling, dict[str, str]]:
    """How a PEFT file of tensors `names` spells modules, and its keys by what PEFT and the table's rows make them."""
    keys = {name: key for name, key in parse_keys(names)[0].items() if key.part in _SUFFIXES}
    spelling = spelling_of(table, env, sorted({key.module for key in keys.values()}))
    return spelling, {
        f"{PREFIX}{spelling.canonical(key.module)}{_SUFFIXES[key.part]}": name for name, key in keys.items()
    }


def names_in_base(table: Table, env: Env, present: Collection[str]) -> dict[str, str]:
    """The base's own name of each tensor that the rows know, by every name that a table's row has for it."""
    own_way, beginnings = table.beginnings(None), table.beginnings(present)
    found: dict[str, str] = {}
    for row in table.expand(untied(env), None):
        if row.expert is not None:
            continue
        alike = [spelt for spelt in spellings(table, row) if len(spelt.hf) == len(row.hf)]
        for number in range(len(row.hf)):
            names = [spelt.hf[number] for spelt in alike]
            here = [respelt(_plain(name, own_way) or name, beginnings) for name in names]
            own = next((name for name in here if name in present), here[0])
            found.update(dict.fromkeys(names, own))
    return found
