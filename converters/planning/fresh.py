"""Which tensors of an export take a codec that its source did not have."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from converters.codecs.decode import Encoded
from converters.codecs.fresh import Fresh
from converters.engine.plan import FLOATS, Plan
from converters.mcore.keys import bare
from converters.rows.coverage import idle_patterns, matches

#: Rows of the products of a decoder's layers; routers, norms, embeddings, heads and towers stay as they are.
_PRODUCT = re.compile(r"^(?:decoder|mtp)\.(?:.*\.)?(?:linear_\w+|in_proj|out_proj)\.weight\d*$")
_WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class Chosen:
    """Tensors to encode, modules that stay plain, of those the ones whose shape the codec does not hold, and what
    `exclude` named in vain."""

    encode: Mapping[str, Encoded]
    plain: tuple[str, ...]
    unfit: tuple[str, ...]
    in_vain: tuple[str, ...]


def choose(fresh: Fresh, plan: Plan, exclude: Collection[str] = ()) -> Chosen:
    """What of an export's `plan`, whose tensors are plain, takes a codec. `exclude`: globs of modules that do not."""
    rows = {entry.tensor: unit.row for unit in plan.units for entry in unit.entries}
    globs = [pattern for pattern in exclude if set(pattern) & set("*?[")]
    names = frozenset(exclude).difference(globs)  # a folder's own list has thousands
    encode, plain, unfit = {}, [], []
    for draft in plan.drafts:
        name, module = draft.name, draft.name.removesuffix(_WEIGHT)
        if module == name or len(draft.shape) < 2 or draft.dtype not in FLOATS:
            continue
        spared = module in names or matches(module, globs)
        wanted = _PRODUCT.match(bare(rows.get(name, ""))) and not spared
        whole = fresh.encoded(name, draft.dtype, draft.shape) if wanted else None
        if whole is not None:
            encode[name] = whole
            continue
        plain.append(module)
        if wanted:
            unfit.append(module)
    modules = [*plain, *(name.removesuffix(_WEIGHT) for name in encode)]
    in_vain = idle_patterns("‹exclude›", [*globs, *sorted(names.difference(modules))], modules, "a module")
    return Chosen(encode, tuple(plain), tuple(unfit), tuple(in_vain))
