"""Which linears of a model are adapted, and in which parts: from a recipe's names and the rows of the model's table.

PEFT adapts modules of Transformers' model; Megatron Core has several of them in one linear. A linear is adapted in
the *parts* that PEFT would adapt apart, each with an A of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from converters.adapters.peft_keys import untied
from converters.adapters.settings import LoraSettings
from converters.adapters.sites import Adapted, is_adaptable, is_weight, spellings
from converters.errors import UnsupportedError, UsageError
from converters.mcore.keys import HEAD
from converters.rows.config_map import environment
from converters.rows.ops import OPS
from converters.rows.table import Row
from mbx.text import near_miss
from mbx.train.model.blueprint import Blueprint, as_int
from mbx.train.recipe.sections import Lora

#: Every linear of the decoder, experts included. The router and the output layer are named where they are meant: PEFT
#: leaves out the output layer as well, and adapts a router where it is one of Transformers' linears (Llama 4).
ALL = "all-linear"
_NAMED = ("router", "output_layer")
#: PEFT refuses an adapter here, beside whose weight a fused kernel would not see it.
FUSED = "mixer.out_proj"
_LINEAR = re.compile(r"linear_\w+|in_proj|out_proj|fc[12]_latent_proj|" + "|".join(_NAMED))
_EXPRESSION = re.compile(r"[*+?\[\](){}|\\^$]")
#: Parts of linears that a model without a table may have: Megatron Core's own names are all there are.
_PLAIN = {"linear_qkv": "qkv", "linear_fc1": "glu", "linear_proj": "row", "linear_fc2": "row", "out_proj": "row"}


@dataclass(frozen=True, slots=True)
class Part:
    """What PEFT adapts as one module (or parameter) of Transformers' model: name, atoms, r and alpha / r."""

    module: str
    atoms: tuple[int, ...]
    rank: int
    scale: float


@dataclass(frozen=True, slots=True)
class Linear:
    """An adapted linear: the op that lays out its weight, the sizes that the op reads, and the parts that are adapted.

    `together`: Transformers holds all atoms in one tensor.
    """

    op: str
    dims: Mapping[str, int]
    parts: tuple[Part, ...]
    together: bool


def settings_of(lora: Lora) -> LoraSettings:
    """Ranks and scales as PEFT reads them."""
    return LoraSettings(
        lora.rank, lora.alpha, lora.rslora, lora.dora, dict(lora.rank_pattern), dict(lora.alpha_pattern)
    )


def adapted(lora: Lora, plan: Blueprint, held: Mapping[str, Adapted] | None = None) -> dict[str, Linear]:
    """The adapted linears of a model by the names of their weights; UsageError for a target that nothing answers to.

    `held`: an adapter that training starts from, by weight. What it does not adapt is no target; what it adapts apart
    is apart. Of experts, which are alike, the first stands for all (`key_of`). A model without a table has none here:
    see `plain`.
    """
    if plan.table is None:
        return {}
    chooser, settings = Chooser(lora), settings_of(lora)
    env, found = environment(plan.config), dict[str, Linear]()
    rows = list(linears(plan))
    for row, modules in rows:
        there = None if held is None else held.get(row.mcore)
        if held is not None and there is None:
            continue
        together = len(modules) == 1
        if together and there is not None and len(there.form.hf) > 1:
            together, modules = False, tuple(name.removesuffix(".weight") for name in there.row.hf)
        op = row.spec.op if there is None or together else there.row.spec.op
        op = "col" if row.mcore == HEAD else op  # of as many rows as it is padded to
        members, parts = _members(op, together), []
        for n, module in enumerate(modules):
            if there is not None and there.site_of(members[n][0]) is None:
                continue
            if chooser.takes(row.mcore.rpartition(".")[0], module):
                rank = settings.rank_of(module)
                parts.append(Part(module, members[n], rank, settings.scale_of(module, rank)))
        if parts:
            found[row.mcore] = Linear(op, plan.table.dims_of(row, env), tuple(parts), together)
    chooser.check(rows)
    return found


def unloaded(found: Iterable[str]) -> str:
    """In words, on which of the adapted linears, `found` by weight, PEFT loads none; empty where it loads all."""
    names = [name for weight in found if (name := weight.rpartition(".")[0]).endswith(FUSED)]
    if not names:
        return ""
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    where = f"`{names[0]}`{others}"
    return f"PEFT loads no adapter on {where}: a merged export has what they learn (lora.exclude leaves them out)"


def key_of(weight: str) -> str:
    """The weight that stands for a weight: of an expert's, the first expert's."""
    return re.sub(r"(?<=\.weight)\d+$", "0", weight)


def linears(plan: Blueprint) -> Iterator[tuple[Row, tuple[str, ...]]]:
    """Rows of the decoder's linears and of the output layer with the modules (or parameters) of Transformers that they
    hold; of experts, the first's for all."""
    assert plan.table is not None
    env = dict(untied(environment(plan.config)))
    if isinstance(plan.table.experts, str) and env.get(plan.table.experts):
        env[plan.table.experts] = 1
    for row in plan.table.expand(env, None):
        leaf = row.spec.param.rpartition(".")[0].rpartition(".")[2]
        inside = row.mcore.startswith("decoder.layers.") or row.mcore == HEAD
        if not (inside and is_weight(row) and _LINEAR.fullmatch(leaf)):
            continue
        if not is_adaptable(row):
            raise UnsupportedError(f"`{row.mcore}` (op {row.spec.op}) takes no adapter")
        stacked = next((other for other in spellings(plan.table, row) if other.spec.stacked), None)
        names = (row if stacked is None else stacked).hf
        yield row, tuple(name.removesuffix(".weight") for name in names)


def _members(op: str, together: bool) -> tuple[tuple[int, ...], ...]:
    """Atoms of each Hugging Face tensor under an op; all in one where they are held together."""
    sizes = {"heads": 2, "groups": 1, "head_dim": 1, "vocab": 2, "ssm_inner": 1, "ssm_bc": 1, "ssm_heads": 1}
    sizes |= {"gdn_k_heads": 1, "gdn_k_dim": 1, "gdn_v_heads": 1, "gdn_v_dim": 1}  # any: only the atoms are asked for
    form = OPS[op](sizes, 4)
    return (tuple(range(len(form.atoms))),) if together else tuple(members for _, members in form.hf)


def plain(name: str, lora: Lora, plan: Blueprint) -> Linear | None:
    """The adapted parts of a linear of a model without a table, by Megatron Core's name; None for no target."""
    module, leaf = name, name.rpartition(".")[2]
    if not (_LINEAR.fullmatch(leaf) and Chooser(lora).takes(module, module)):
        return None
    op = _PLAIN.get(leaf, "col")
    op = "col" if op == "glu" and not plan.config.get("gated_linear_unit") else op
    settings, together = settings_of(lora), op == "glu" and ".experts." in name
    dims: dict[str, int] = {}
    if op == "qkv":
        heads = as_int(plan.config, "num_attention_heads")
        groups = plan.config.get("num_query_groups") or heads
        head = plan.config.get("kv_channels") or as_int(plan.config, "hidden_size") // heads
        assert isinstance(groups, int) and isinstance(head, int)
        dims = {"heads": heads, "groups": groups, "head_dim": head}
    rank = settings.rank_of(module)
    parts = tuple(Part(module, atoms, rank, settings.scale_of(module, rank)) for atoms in _members(op, together))
    return Linear(op, dims, parts, together or len(parts) == 1)


class Chooser:
    """Answers whether a recipe adapts a module, by its name in Megatron Core and in Transformers.

    A target is `all-linear`, the last part of a Megatron Core module's name, the end of one of Transformers', or a
    regular expression on the whole of that, as PEFT has them.
    """

    def __init__(self, lora: Lora) -> None:
        self.targets, self.exclude = lora.targets, lora.exclude

    def takes(self, mcore: str, module: str) -> bool:
        """Whether a linear is adapted; `mcore` is its name without `.weight`."""
        return any(matches(t, mcore, module) for t in self.targets) and not any(
            matches(t, mcore, module) for t in self.exclude
        )

    def check(self, known: Iterable[tuple[Row, tuple[str, ...]]]) -> None:
        """UsageError for a name that no linear of the model answers to, with those that it has."""
        named = [(row.mcore.rpartition(".")[0], module) for row, modules in known for module in modules]
        for key, words in (("lora.targets", self.targets), ("lora.exclude", self.exclude)):
            for word in words:
                if any(matches(word, *pair) for pair in named):
                    continue
                leaves = sorted({name.rpartition(".")[2] for pair in named for name in pair})
                if key == "lora.targets" and word.rpartition(".")[2] == "embed_tokens":
                    raise UsageError(
                        f"{key}: {word} takes no adapter here", hint=f"lora.modules_to_save={word} trains it whole"
                    )
                raise UsageError(
                    f"{key}: this model has no {word}; its linears are {', '.join(leaves)}",
                    hint=near_miss(word, leaves, f"{key}={ALL} names all of them"),
                )
        if not any(self.takes(*pair) for pair in named):
            raise UsageError("lora.exclude leaves nothing of lora.targets: nothing would be trained")


def matches(target: str, mcore: str, module: str) -> bool:
    """Whether a linear answers to one target."""
    leaf = mcore.rpartition(".")[2]
    if target == ALL:
        return leaf not in _NAMED and not mcore.endswith(FUSED)
    if _EXPRESSION.search(target):
        import re2

        try:
            return re2.fullmatch(target, module) is not None
        except re2.error as error:
            raise UsageError(f"lora: {target!r} is no regular expression that is matched in linear time") from error
    return target == leaf or module == target or module.endswith(f".{target}")
