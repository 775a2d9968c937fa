"""Which runs a matrix has: the baselines, the recipe as it is, and the recipe with one thing changed each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

from mbx.train.recipe.sections import Recipe
from mbx.train.recipe.world import smallest_world

Side: TypeAlias = Literal["recipe", "transformers", "peft"]
#: Keys by the words of a matrix, in the order of its cells.
KEYS: Mapping[str, str] = {
    "length": "data.length",
    "micro_batch": "train.micro_batch",
    "recompute": "train.recompute",
    "fp8": "fp8.recipe",
    "tp": "parallel.tp",
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One run: on which `side`, with which overrides on top of the recipe's, in how many processes.

    `variable` is what differs from the recipe, empty for the recipe itself and for baselines.
    """

    name: str
    side: Side
    overrides: tuple[str, ...]
    world_size: int
    variable: str = ""

    def digest(self, recipe: str, overrides: Sequence[str], steps: int) -> str:
        """What tells this run from another: a result of the same digest needs no second run."""
        text = json.dumps([asdict(self), recipe, list(overrides), steps])
        return hashlib.sha256(text.encode()).hexdigest()


def cells(recipe: Recipe, values: Mapping[str, Sequence[str]], *, has_folder: bool) -> list[Cell]:
    """The cells of a recipe; `values` are those of each word of `KEYS`, the recipe's own left out.

    Baselines need a model's folder, and one process; PEFT's needs adapters.
    """
    world = smallest_world(recipe)
    found = [Cell("recipe", "recipe", (), world)]
    if has_folder:
        found.insert(0, Cell("transformers", "transformers", (), 1))
        if recipe.lora.rank:
            found.insert(1, Cell("peft", "peft", (), 1))
    return [*found, *_changes(recipe, values, world)]


def _changes(recipe: Recipe, values: Mapping[str, Sequence[str]], world: int) -> Iterator[Cell]:
    flat = recipe.flat()
    for word, key in KEYS.items():
        for value in values.get(word, ()):
            if value == str(flat[key]):
                continue
            overrides = [f"{key}={value}"]
            size = world
            if word == "tp":
                size = world // recipe.parallel.tp * int(value)
            if word == "micro_batch" and recipe.train.global_batch % int(value):
                overrides.append(f"train.global_batch={value}")
            yield Cell(f"{word}={value}", "recipe", tuple(overrides), size, word)


def default_values(recipe: Recipe, gpus: int, casts: Sequence[str]) -> dict[str, list[str]]:
    """What is tried unless asked otherwise: half the length, twice the batch, recomputation, FP8, tp over the GPUs."""
    values = {
        "length": [str(recipe.data.length // 2)] if recipe.data.length > 1 else [],
        "micro_batch": [str(2 * recipe.train.micro_batch)],
        "recompute": ["none", "selective", "full"],
        "fp8": ["none", *casts[:1]],
        "tp": [str(n) for n in (1, 2, 4, 8) if n <= gpus],
    }
    return {word: found for word, found in values.items() if found}
