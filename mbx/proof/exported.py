"""A folder that an export stored by a codec again, held against the checkpoint that it was made from."""

from __future__ import annotations

from dataclasses import replace
from glob import escape

from converters.codecs import quantization_of
from converters.codecs.calibration import Calibration
from converters.codecs.fresh import declared_plain
from converters.errors import UsageError
from mbx.formats.architecture import architecture_of
from mbx.proof.comparison import Pair
from mbx.run.job import Options, export_plan


def exported_pair(pair: Pair, codec: str, mapping: str | None, calibration: Calibration | None = None) -> Pair:
    """`pair`, of a folder and a Megatron checkpoint, the other way round: what the export declared by `codec` writes.

    `calibration` is the one that it was given.

    A code stands for a rounded value, so the checkpoint's own values are not the folder's; its codes and scales are.
    Raises what the export would, and UsageError for two sides of one kind.
    """
    if pair.left.spelling == pair.right.spelling:
        raise UsageError(
            f"‹codec› {codec} declares an export of a Megatron checkpoint to a folder; both sides are of one kind",
            hint="leave it out: quantised folders are decoded",
        )
    folder, checkpoint = pair.left, pair.right
    # names, whatever stands in them: a folder's config is no place for patterns
    plain = tuple(map(escape, declared_plain(quantization_of(folder.config or {}))))
    options = Options(
        codec=codec,
        exclude=plain,
        calibration=calibration,
        mapping=mapping,
        allow_unused_keys=checkpoint.allowed_keys,
    )
    plan, _, _ = export_plan(checkpoint, architecture_of(checkpoint, mapping), options)
    wanted = {draft.name for draft in plan.drafts}
    return replace(
        pair,
        left=checkpoint,
        right=folder,
        plan=plan,
        actual=folder.tensors,
        left_only=tuple(draft.name for draft in plan.drafts if draft.name not in folder.tensors),
        right_only=tuple(name for name in folder.tensors if name not in wanted),
        repeated=(),
        limits={},
        equal=(),
        swapped=not pair.swapped,
    )
