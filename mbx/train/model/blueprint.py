"""What is known of a model before it is built: its config, its table, its layout, its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from converters.errors import CoverageError, LayoutError, StorageError, UnsupportedError, UsageError, spelt
from converters.mcore.layout import Layout
from converters.mcore.layout import check as check_layout
from converters.rows.config_map import environment
from converters.rows.expr import Value, names
from converters.rows.isos.minimax import keys_chosen
from converters.rows.table import Table
from mbx.train.recipe.sections import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What is known of the model before it is built.

    `config`: flat Megatron Core config, the recipe's changes included. `hf`: the Hugging Face folder, if the recipe
    names one, and `table` its mapping table. `padded_vocab`: rows of the embedding.
    """

    config: Mapping[str, Value]
    table: Table | None
    hf: Path | None
    layout: Layout

    @property
    def vocab(self) -> int:
        """True vocabulary size."""
        return as_int(self.config, "model.vocab_size")

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding, padding included."""
        return self.layout.padded_vocab(self.vocab)


def as_int(config: Mapping[str, Value], key: str) -> int:
    """An integer of a flat config; UsageError where it is absent or not one."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(f"the model's config lacks the integer `{key}`, got {value!r}")
    return value


def blueprint(recipe: Recipe) -> Blueprint:
    """Read the model's config from its folder, or take the recipe's shape; UsageError where they do not fit."""
    from mbx.formats import hf
    from mbx.tables import of_language, table_for

    m = recipe.model
    folder = Path(m.path) if m.path else None
    table: Table | None = None
    config: dict[str, Value]
    if folder is not None:
        if not folder.is_dir():
            raise StorageError(
                f"model.path `{folder}` is no folder", hint="model.path=DIR names a Hugging Face folder"
            )
        raw = hf.read_config(folder)
        table = of_language(table_for(raw, m.mapping or None))
        table = replace(table, config=table.config.waiving(m.waived_keys))
        if unknown := table.config.unknown_keys(raw):
            raise CoverageError(
                f"config.json of `{folder}` has {len(unknown)} key(s) that the table `{table.name}` does not know: "
                + ", ".join(unknown[:10]),
                hint=f"a key that cannot change the forward pass may be waived: model.allow_unused_key={unknown[0]}",
            )
        config = table.config.to_mcore(raw)
    elif m.shape:
        config = dict(m.shape)
        if isinstance(name := config.pop("mapping", None), str):  # whose names the shape's weights have
            table = table_for({}, name)
            config = {key: None for key in _read_by(table) if key not in environment(config)} | config
    else:
        raise UsageError(f"recipe `{recipe.name}` has no model", hint="model=DIR names a Hugging Face folder")
    config.update(recipe.model.config)
    for key in ("num_layers", "hidden_size", "num_attention_heads", "model.vocab_size"):
        if as_int(config, key) < 1:
            raise UsageError(f"the model's config says {key} = {config[key]}", hint="it must be at least 1")
    layout = _layout(recipe, config)
    positions = as_int(config, "model.max_sequence_length")
    if recipe.data.length > positions:
        raise UsageError(f"data.length {recipe.data.length} exceeds the model's {positions} positions")
    if config.get("experimental_attention_variant") == "dsa":
        raise UnsupportedError(
            "the loss of tokens does not teach the indexer of sparse attention, and another model would be trained",
            hint="conversions of this family carry its weights; no training does",
        )
    if keys := keys_chosen(config):
        _check_choice(recipe, keys)
    if recipe.data.length % recipe.parallel.tp and recipe.parallel.sequence_parallel:
        raise LayoutError(
            f"data.length {recipe.data.length} does not divide by tp {recipe.parallel.tp} (sequence parallel)"
        )
    if recipe.data.length % (2 * recipe.parallel.cp) and recipe.parallel.cp > 1:
        raise LayoutError(f"data.length {recipe.data.length} is not a multiple of 2 x cp {recipe.parallel.cp}")
    return Blueprint(config, table, folder, layout)


def _check_choice(recipe: Recipe, keys: int) -> None:
    """UnsupportedError where it shows that Megatron Core has nothing to choose `keys` with, and attends to all."""
    if recipe.data.length > keys:
        raise UnsupportedError(
            f"data.length is {recipe.data.length}: this model attends to {keys} keys that it chooses, and Megatron "
            "Core to all",
            hint=f"data.length={keys} is the most that both compute alike",
        )
    if not recipe.lora.rank:
        raise UnsupportedError(
            "of this model adapters alone are trained: Megatron Core has no module that chooses keys, and a "
            "checkpoint of every weight would lack what chooses them",
            hint="lora.rank=16",
        )


def _read_by(table: Table) -> set[str]:
    """Fields that a table's expressions read: TOML has no null, so a shape leaves out those that are."""
    rows = [spec for block in table.blocks.values() for alternatives in block for spec in alternatives]
    texts = [table.experts, *table.dims.values(), *table.when.values()]
    texts += [text for site in table.sites for text in (site.n, site.when)]
    texts += [text for kind in table.kinds.values() for text in (kind.when, *kind.fields.values())]
    texts += [spec.when for spec in rows if spec.when]
    return {name for text in texts if text and isinstance(text, str) for name in names(text)} - set("LIE")


def _layout(recipe: Recipe, config: Mapping[str, Value]) -> Layout:
    """The recipe's layout; LayoutError, in a recipe's words, where the model does not take it."""
    p = recipe.parallel
    layout = Layout(p.tp, p.pp, recipe.model.vocab_divisor, vpp=p.vpp, ep=p.ep, etp=p.etp)
    try:
        check_layout(layout, config)
    except LayoutError as error:
        fact, *details = (spelt(text, "parallel.{}".format) for text in (error.fact, *error.details))
        hint = error.hint if error.hint and "‹pipeline-layout›" not in error.hint else None  # a recipe has no such key
        hint = hint and spelt(hint.replace("› ", "›="), "parallel.{}".format)
        raise LayoutError(fact, hint=hint, details=details) from error
    return layout


def load_tokenizer(plan: Blueprint) -> PreTrainedTokenizerBase:
    """The folder's tokenizer; UsageError where it has none."""
    if plan.hf is None:
        raise UsageError("this kind of data needs a tokenizer", hint="model=DIR names a folder that has one")
    from mbx.models.tokenizer import read_tokenizer

    if not has_tokenizer(plan.hf):
        raise UsageError(f"`{plan.hf}` has no tokenizer", hint="copy tokenizer.json and tokenizer_config.json there")
    return read_tokenizer(plan.hf)


def has_tokenizer(folder: Path) -> bool:
    """Whether a Hugging Face folder has a tokenizer."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))
