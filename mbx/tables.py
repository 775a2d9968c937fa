"""Finds the mapping table of a checkpoint: the user's own file, or the shipped one of its architecture."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from converters.errors import StorageError, UnsupportedError, UsageError
from converters.mcore.keys import HEAD, TIED
from converters.rows.config_spelling import model_type_of, text_key
from converters.rows.expr import Value
from converters.rows.parse import parse_table
from converters.rows.table import RowSpec, Table
from mappings import table_names, table_text
from mbx.text import near_miss
from mbx.untrusted.small_files import SETTINGS, read_text


@cache
def shipped(name: str) -> Table:
    """The shipped table `name`; UsageError with near misses when there is none."""
    try:
        return parse_table(name, table_text(name))
    except KeyError:
        hint = near_miss(name, table_names(), "`mbx models list` shows all")
        raise UsageError(f"there is no table `{name}`", hint=hint) from None


def from_file(path: Path) -> Table:
    """A user's own table."""
    try:
        return parse_table(path.stem, read_text(path, SETTINGS))
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"cannot read the table `{path}`: {error}") from error


#: Model types that no table covers as yet, and what stands in the way; each has its test in `test_not_yet.py`.
NOT_YET = {
    "deepseek_v4": "no release of Megatron Core, 0.19 included, has modules for its compressed attention, "
    "hyper-connections and routing by tokens, and the names that development versions give to their parameters are "
    "to change with the model class that holds them",
}

#: Transformers' ending of a decoder's class with an output layer over the vocabulary, and those over labels: of a
#: sequence, or of each token, with a bias.
_VOCABULARY, _LABELS, _OF_TOKENS = "ForCausalLM", "ForSequenceClassification", "ForTokenClassification"


def _with_score(tables: Sequence[Table], architectures: Collection[object]) -> Table | None:
    """The table of a reward or value model: a decoder's whose output layer is `score.weight` [labels, hidden].

    Megatron trainers keep that layer whole on every rank, unpadded and never tied. None for other classes.
    """
    ending = next((e for e in (_LABELS, _OF_TOKENS) for name in architectures if str(name).endswith(e)), _LABELS)
    plain = {str(name).replace(ending, _VOCABULARY) for name in architectures if str(name).endswith(ending)}
    table = next((table for table in tables if plain & set(table.architectures)), None)
    if table is None:
        return None
    score = [(RowSpec(HEAD, "copy", ("score.weight",)),)]
    if ending == _OF_TOKENS:
        score.append((RowSpec(HEAD.replace(".weight", ".bias"), "copy", ("score.bias",)),))
    blocks = {
        block: tuple(row for rows in held for row in (score if rows[0].param == HEAD else [rows]))
        for block, held in table.blocks.items()
    }
    config = replace(
        table.config,
        rows=tuple(row for row in table.config.rows if row.mcore != TIED),
        ignore=table.config.ignore | {row.hf for row in table.config.rows if row.mcore == TIED},
        fixed={**table.config.fixed, TIED: False},
    )
    names = tuple(name.replace(_VOCABULARY, ending) for name in table.architectures)
    return replace(table, architectures=names, blocks=blocks, config=config)


def table_for(config: Mapping[str, Value], mapping: str | None = None) -> Table:
    """The table for a Hugging Face config: `mapping` (a file or a shipped name) or by `model_type`.

    A model of diffusers is known by its class, a model around a text model by its own type and class, and of several
    such by the text model's type. UnsupportedError when no table knows the architecture.
    """
    if mapping is not None:
        return from_file(Path(mapping)) if mapping.endswith(".toml") else shipped(mapping)
    text = config.get(text_key(config)) or config.get("thinker_config")
    inner = text.get("model_type") if isinstance(text, Mapping) else None
    model_type, architectures = model_type_of(config), config.get("architectures") or []
    if not isinstance(architectures, list):
        raise UsageError(f"config.json: `architectures` is {architectures!r}, a list was expected")
    fits = _of_type(model_type)
    if headed := _with_score(fits, architectures):
        return headed
    exact = [t for t in fits if set(t.architectures) & set(map(str, architectures))]
    chosen = exact or [t for t in fits if not architectures]
    if len(chosen) > 1 and inner:
        chosen = [table for table in chosen if inner in table.text_types]
    if chosen:
        return chosen[0]
    if inner and (alone := _of_type(inner)):
        raise UnsupportedError(
            f"no table for {', '.join(map(str, architectures)) or 'this class'} around a {inner!r} text model",
            hint=f"the table `{alone[0].name}` covers that text model in a repository of its own; a table of yours "
            f'whose [text] section says table = "{alone[0].name}" covers the rest: ‹mapping› FILE',
        )
    if fits:
        covered = sorted({name for table in fits for name in table.architectures})
        raise UnsupportedError(
            f"no table for {', '.join(map(str, architectures))}: of model_type {model_type!r} are covered "
            f"{', '.join(covered)} and their {_LABELS} and {_OF_TOKENS}",
            hint=f"the decoder is in the table `{fits[0].name}`, another head is not: put its rows into a copy (`mbx "
            f"models show {fits[0].name} > mine.toml`) and give that as ‹mapping› mine.toml",
        )
    if reason := NOT_YET.get(str(model_type)):
        raise UnsupportedError(
            f"{model_type} is not converted yet: {reason}",
            hint="a table of your own can name the parameters of your build: `mbx models new SRC` drafts one from the "
            "folder's names, ‹mapping› FILE uses it",
        )
    known = sorted({kind for name in table_names() for kind in shipped(name).model_types})
    close = get_close_matches(str(model_type), known, n=3)
    raise UnsupportedError(
        f"no table for model_type {model_type!r} with architectures {architectures}",
        hint=f"near: {', '.join(close)}; `mbx models new SRC` drafts a table, ‹mapping› FILE uses it"
        if close
        else "`mbx models list` shows what is covered; ‹mapping› FILE uses a table of your own",
    )


def of_language(table: Table) -> Table:
    """`table` where its models are of language, for all that goes beyond a conversion; else UnsupportedError."""
    if table.family == "dit":
        raise UnsupportedError(
            f"a model of `{table.name}` is a diffusion transformer",
            hint="those convert and are compared; all that runs, trains, adapts or prunes models is for language",
        )
    return table


def _of_type(model_type: object) -> list[Table]:
    """Shipped tables of a model type."""
    # Parsing every table would cost more than a small conversion: look for the quoted model type first.
    candidates = [shipped(name) for name in table_names() if f'"{model_type}"' in table_text(name)]
    return [table for table in candidates if model_type in table.model_types]
