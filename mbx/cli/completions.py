"""What the shell completes: names that are known without opening a checkpoint, and folders that hold a run."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

#: Where recipes put their runs unless told otherwise.
_RUNS = Path("runs")
#: A table's section; parsing all of them would take longer than a shell waits.
_FLAVOUR = re.compile(r'^\[flavours\."?([\w.-]+?)"?\]', re.M)


def _beginning(words: Iterable[str], incomplete: str) -> list[str]:
    return [word for word in words if word.startswith(incomplete)]


def tables(incomplete: str) -> list[str]:
    """Names of shipped tables."""
    from mappings import table_names

    return _beginning(table_names(), incomplete)


def recipes(incomplete: str) -> list[str]:
    """Names of shipped recipes."""
    from mbx.train.recipe.catalogue import recipe_names

    return _beginning(recipe_names(), incomplete)


def recipe_words(incomplete: str) -> list[str]:
    """Names of shipped recipes, and keys that an override sets."""
    from mbx.train.recipe.parse import all_keys

    return recipes(incomplete) + _beginning((f"{key}=" for key in all_keys()), incomplete)


def formats(incomplete: str) -> list[str]:
    """Formats in which a Megatron checkpoint is written."""
    from mbx.formats.registry import writable

    return _beginning(writable("mcore"), incomplete)


def model_classes(incomplete: str) -> list[str]:
    """Classes of Megatron Core that load a checkpoint."""
    from mbx.run.model_class import CLASSES

    return _beginning(CLASSES, incomplete)


def flavours(incomplete: str) -> list[str]:
    """Arrangements of models with towers, over all shipped tables."""
    from converters.mcore.flavours import TEXT_ALONE, USUAL
    from mappings import table_names, table_text

    stated = {name for table in table_names() for name in _FLAVOUR.findall(table_text(table))}
    return _beginning(dict.fromkeys((USUAL, TEXT_ALONE, *sorted(stated))), incomplete)


def devices(incomplete: str) -> list[str]:
    """GPUs whose memory and speed are known."""
    from mbx.train.budget.devices import DEVICES

    return _beginning(DEVICES, incomplete)


def methods(incomplete: str) -> list[str]:
    """Ways to train a model's folder."""
    return _beginning(("lora", "dora", "sft", "pretrain"), incomplete)


def runs(incomplete: str) -> list[str]:
    """Folders that hold a training run: below the usual place, and where the word leads so far."""
    from mbx.train.run.log import METRICS

    found = {str(path.parent) for path in (*_RUNS.glob(f"*/{METRICS}"), *Path().glob(f"*/{METRICS}"))}
    if incomplete:
        found |= {str(path.parent) for path in Path().glob(f"{_escaped(incomplete)}*/{METRICS}")}
    return _beginning(sorted(found), incomplete)


def _escaped(word: str) -> str:
    """A word as a pattern that means itself; one that climbs or is absolute is left to the shell."""
    return "" if word.startswith(("/", "~", "..")) else re.sub(r"([\[\]*?])", r"[\1]", word)
