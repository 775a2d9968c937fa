"""Layers of the vocabulary that are trained whole beside adapters, as PEFT's `modules_to_save` has them.

An embedding that is the output layer as well is one weight here: it is trained as one, and saved under both names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from converters.errors import UsageError
from converters.mcore.keys import EMBEDDING, HEAD, TIED
from mbx.run.adapter_vocabulary import is_named, vocabulary
from mbx.text import near_miss
from mbx.train.model.blueprint import Blueprint
from mbx.train.recipe.sections import Lora


@dataclass(frozen=True, slots=True)
class Whole:
    """The weights that are trained whole, by Megatron Core's name, each with its names in Transformers.

    `tied`: the embedding is the output layer as well, of which a later pipeline stage has a copy under `HEAD`.
    """

    names: Mapping[str, tuple[str, ...]]
    tied: bool

    def holds(self, parameter: str) -> bool:
        """Whether a parameter of a model is trained whole."""
        return parameter in self.names or (self.tied and parameter == HEAD and EMBEDDING in self.names)


def whole_layers(lora: Lora, plan: Blueprint) -> Whole:
    """What `lora.modules_to_save` names; UsageError for what is no layer of the vocabulary."""
    tied = bool(plan.config.get(TIED))
    if not (lora.rank and lora.modules_to_save):
        return Whole({}, tied)
    known = _layers(plan)
    found: dict[str, tuple[str, ...]] = {}
    for word in lora.modules_to_save:
        module = [weight for weight, names in known.items() if any(is_named(word, name) for name in names)]
        if not module:
            leaves = sorted(
                {name.removesuffix(".weight").rpartition(".")[2] for names in known.values() for name in names}
            )
            raise UsageError(
                f"lora.modules_to_save: {word} is no layer of this model's vocabulary; those are {', '.join(leaves)}",
                hint=near_miss(word, leaves, "lora.targets adapts the decoder's linears"),
            )
        found |= {weight: known[weight] for weight in module}
    return Whole(found, tied)


def _layers(plan: Blueprint) -> dict[str, tuple[str, ...]]:
    """The layers of the vocabulary by Megatron Core's name, with their names in Transformers if a table says them."""
    if plan.table is not None:
        return vocabulary(plan.table, plan.config)
    return {weight: (weight,) for weight in ((EMBEDDING,) if plan.config.get(TIED) else (EMBEDDING, HEAD))}
