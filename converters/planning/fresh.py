"""Which tensors of an export take a codec that its source did not have."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from converters.codecs.decode import Encoded
from converters.codecs.fresh import Fresh
from converters.engine.plan import FLOATS, Plan
from converters.mcore.keys import bare
from converters.rows.config_map import environment
from converters.rows.coverage import idle_patterns, matches

#: Rows of the products of a decoder's layers; routers, norms, embeddings, heads and towers stay as they are.
_PRODUCT = re.compile(r"^(?:decoder|mtp)\.(?:.*\.)?(?:linear_\w+|in_proj|out_proj)\.weight\d*$")
_WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class Chosen:
    """Tensors to encode, modules that stay plain, of those the ones whose shape the codec does not hold and the ones
    whose inputs were not measured, and what `exclude` named in vain. `tied`: modules without a tensor of their own,
    which are as plain as the one that they repeat."""

    encode: Mapping[str, Encoded]
    plain: tuple[str, ...]
    tied: tuple[str, ...]
    unfit: tuple[str, ...]
    unmeasured: tuple[str, ...]
    in_vain: tuple[str, ...]


def is_product(row: str) -> bool:
    """Whether a row, by its Megatron Core name, is of a product that takes a codec."""
    return _PRODUCT.match(bare(row)) is not None


def choose(fresh: Fresh, plan: Plan, exclude: Collection[str] = (), measured: Collection[str] | None = None) -> Chosen:
    """What of an export's `plan`, whose tensors are plain, takes a codec. `exclude`: globs of modules that do not;
    `measured`: the only modules that can, where the codec stores scales of their inputs."""
    rows = {entry.tensor: unit.row for unit in plan.units for entry in unit.entries}
    globs = [pattern for pattern in exclude if set(pattern) & set("*?[")]
    names = frozenset(exclude).difference(globs)  # a folder's own list has thousands
    encode, coded, plain, unfit, unmeasured = {}, list[str](), list[str](), list[str](), list[str]()
    for draft in plan.drafts:
        name, module = draft.name, fresh.module(draft.name, draft.shape)
        product = draft.dtype in FLOATS and is_product(rows.get(name, ""))
        if module is None or draft.dtype not in FLOATS:
            if product and len(draft.shape) > 2:
                unfit.append(name)
            continue
        spared = module in names or matches(module, globs)
        wanted = product and not spared and len(draft.shape) > 1 + fresh.stacked
        whole = fresh.encoded(name, draft.dtype, draft.shape) if wanted else None
        known = measured is None or module in measured
        if whole is not None and known:
            encode[name] = whole
            coded.append(module)
            continue
        plain.append(module)
        if wanted:
            (unfit if whole is None else unmeasured).append(module)
    written = {draft.name for draft in plan.drafts}
    repeats = () if plan.table is None else plan.table.tied(environment(plan.config), written)
    tied = tuple(name.removesuffix(_WEIGHT) for name in repeats if name not in written)
    modules = [*plain, *tied, *coded]
    in_vain = idle_patterns("‹exclude›", [*globs, *sorted(names.difference(modules))], modules, "a module")
    return Chosen(encode, tuple(plain), tied, tuple(unfit), tuple(unmeasured), tuple(in_vain))
