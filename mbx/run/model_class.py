"""Which class of Megatron Core's a new checkpoint is for: GPTModel, or HybridModel with a layer for each half."""

from __future__ import annotations

from dataclasses import replace

from converters.engine.plan import Plan
from converters.errors import UnsupportedError, UsageError
from converters.mcore.hybrid_form import hybrid_args
from converters.mcore.keys import inner_prefix
from converters.mcore.releases import CURRENT
from converters.planning.hybrid import as_hybrid
from mbx.formats.sidecars import Sidecars
from mbx.torchfile.torch_values import Namespace

CLASSES = ("gpt", "hybrid")


def in_form(plan: Plan, asked: str | None, default: str, format: str) -> Plan:
    """`plan` for the class that is `asked` for, or the `default`; a model that is hybrid by nature stays as it is.

    UsageError for a class that is none, UnsupportedError where the model or the format has no such form.
    """
    if asked is not None and asked not in CLASSES:
        raise UsageError(f"‹model-class› {asked!r} is not known", hint=f"choices: {', '.join(CLASSES)}")
    if plan.table is not None and plan.table.family == "dit":
        if asked is not None:
            raise UnsupportedError(f"‹model-class› {asked}: a diffusion transformer is of neither class")
        return plan
    if CURRENT.kind_of({draft.name for draft in plan.drafts}) == "hybrid":
        if asked == "gpt":
            raise UnsupportedError("‹model-class› gpt: this model is a HybridModel, and no GPTModel computes the same")
        return plan
    inside = any(map(inner_prefix, (draft.name for draft in plan.drafts)))
    if asked == "hybrid" and inside:
        raise UnsupportedError("‹model-class› hybrid: a text model inside a larger one is written as a GPTModel only")
    if inside or (asked or default) == "gpt":
        return plan
    if format != "torch_dist":
        raise UnsupportedError(f"‹model-class› hybrid is written as ‹format› torch_dist only, got {format}")
    return as_hybrid(plan)


def form_said(sidecars: Sidecars, plan: Plan) -> Sidecars:
    """`sidecars` of a plan that `in_form` changed, whose args say the other class.

    Megatron-Bridge's go: its providers of these families build the GPTModel.
    """
    args = {**sidecars.args, **hybrid_args(plan.config)}
    return replace(sidecars, args=args, common={**sidecars.common, "args": Namespace(args)}, texts={})
