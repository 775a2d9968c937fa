"""What an export stores in the parts of a codec: the choice, and what is known of the source that was quantised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from converters.codecs import quantization_of
from converters.codecs.calibration import Calibration, Vector
from converters.codecs.decode import Encoded, decoded_view, discarded
from converters.codecs.encode import encodings
from converters.codecs.fresh import FRESH
from converters.engine.plan import Plan
from converters.errors import UsageError
from converters.planning.calibrated import WEIGHT, input_scales, measured_inputs
from converters.planning.exporter import HfTensor
from converters.planning.folds import Fold, folds_in, serving
from converters.planning.fresh import choose
from converters.rows.config_map import environment
from converters.rows.expr import Value
from converters.rows.table import Table
from converters.tensors import StoredTensor
from mbx.formats import hf

PLAIN, SAME = "plain", "same"
#: `codec` values: every tensor as it stands, each as the source stored it, or quantised now.
CODECS = (PLAIN, SAME, *FRESH)


@dataclass(frozen=True, slots=True)
class Codes:
    """`encode` are tensors to store by a codec, `scales` those of the source that are at hand, by the tensor's name.

    `beside` are tensors that the source held for its codec alone, `given` those of a calibration. `quantization` is
    the source's, whatever is written; `written` is what config.json has to say of a codec that the source had not.
    """

    quantization: Mapping[str, Value] | None
    encode: Mapping[str, Encoded] = field(default_factory=dict)
    scales: Mapping[str, Mapping[str, StoredTensor]] = field(default_factory=dict)
    beside: Mapping[str, StoredTensor] = field(default_factory=dict)
    given: Mapping[str, Vector] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    written: Mapping[str, Value] | None = None


def codes_of(
    codec: str,
    config: Mapping[str, Value],
    files: tuple[hf.WeightFile, ...] | None,
    iteration: Path,
    reference: Path | None,
) -> Codes:
    """What `codec` asks for, by the source's config and the headers of its `files`.

    Raises UsageError where it is not known, or where nothing says how the source was stored.
    """
    if codec not in CODECS:
        raise UsageError(f"‹codec› {codec!r} is not known", hint=f"choices: {', '.join(CODECS)}")
    quantization = quantization_of(config)
    if codec in FRESH:
        return Codes(quantization)
    if codec == PLAIN:
        note = (
            "the weights are stored plainly, without quantization_config; ‹codec› same stores them as the source did"
        )
        return Codes(quantization, notes=() if quantization is None else (note,))
    if quantization is None:
        raise UsageError(
            "‹codec› same: the source was not quantised, its config.json has no quantization_config",
            hint="leave it out: every tensor is written as it stands",
        )
    stored = {n: StoredTensor(n, t.dtype, t.shape, ()) for file in files or () for n, t in file.tensors.items()}
    view, encoded = decoded_view(stored, quantization)
    if not encoded or reference is None:
        raise UsageError(
            "‹codec› same: nothing says which tensors the source had quantised",
            hint="name the quantised model's own folder, with its weights: ‹hf-config› DIR",
        )
    encode = encodings(encoded)
    known = hf.known_parts(iteration, reference)
    scales = {name: held for name, whole in encode.items() if (held := _held(whole, known))}
    others = [tensor.name for tensor in discarded(stored, view, encoded)]
    lost = [f"not carried: `{name}`, an activation scale" for name in others if name not in known]
    beside = {name: known[name] for name in others if name in known}
    return Codes(quantization, encode, scales, beside, notes=(*_notes(encode, scales), *lost))


def quantised_now(
    codec: str,
    codes: Codes,
    plan: Plan,
    exclude: Collection[str],
    calibration: Calibration | None = None,
    folds: Sequence[Fold] = (),
) -> Codes:
    """`codes` of an export whose tensors stand in `plan` as they would be without a codec.

    `exclude`: globs of modules that stay plain; `folds`: those whose scales in `calibration` are folded in. Raises
    UsageError where nothing is left to quantise, and for a calibration that is of another model.
    """
    fresh = FRESH[codec].of(() if plan.table is None else plan.table.model_types)
    static = None if calibration is None else fresh.inputs
    measured = None if calibration is None or static is None else measured_inputs(plan, calibration)
    found = choose(fresh, plan, exclude, measured)
    if not found.encode:
        hint = "leave it out, or fewer modules by ‹exclude›" if exclude else "leave it out"
        raise UsageError(f"‹codec› {codec}: no tensor takes it", hint=hint)
    notes = [
        f"{codec}: {len(found.encode):,} tensors are rounded to the nearest code; {len(found.plain):,} others of two "
        "dimensions or more stay as they are",
        *_left_plain(codec, "have a shape it does not hold", found.unfit),
        *_left_plain(codec, "were not measured", found.unmeasured),
    ]
    given: Mapping[str, Vector] = {}
    if calibration is not None and static is not None:
        measured = measured_inputs(plan, calibration, serving(folds, found.encode))
        given = input_scales(static, [name.removesuffix(WEIGHT) for name in found.encode], measured)
        notes.append(f"{codec}: the scales of {len(given):,} inputs are those of the calibration, and fixed")
    written = fresh.config((*found.plain, *found.tied), static=bool(given))
    return replace(codes, encode=found.encode, given=given, notes=(*notes, *found.in_vain), written=written)


def check_calibrated(codec: str) -> None:
    """UsageError for a codec for which nothing is measured."""
    usable = [name for name, one in FRESH.items() if one.inputs is not None or one.scaled]
    if codec not in usable:
        raise UsageError(f"‹codec› {codec} stores nothing that is calibrated", hint=f"these do: {', '.join(usable)}")


def folds_for(
    codec: str,
    calibration: Calibration | None,
    table: Table,
    fields: Mapping[str, Value],
    recorded: Mapping[str, HfTensor] | None,
    stored: Mapping[str, StoredTensor],
) -> list[Fold]:
    """Where the scales of channels in `calibration` belong, if an export by `codec` takes them.

    They were chosen for one codec; weights that stay plain take those too. Raises UsageError where a calibration has
    nothing for `codec`.
    """
    if calibration is None:
        return []
    if codec == calibration.codec or (codec == PLAIN and calibration.scales):
        return folds_in(table, environment(fields), recorded, stored)
    if codec in FRESH and FRESH[codec].inputs is not None:
        return []
    if codec != PLAIN:
        check_calibrated(codec)
    known = f"scales of channels for {calibration.codec}" if calibration.scales else "no scales of channels"
    raise UsageError(
        f"‹codec› {codec}: the calibration has {known}",
        hint=f"`mbx calibrate SRC DATA --codec {'int4_group' if codec == PLAIN else codec}` chooses them",
    )


def _left_plain(codec: str, why: str, modules: Sequence[str]) -> Iterator[str]:
    if modules:
        shown = ", ".join(f"`{name}`" for name in modules[:3]) + (", …" if len(modules) > 3 else "")
        yield f"{codec}: {len(modules):,} products {why}, and stay plain: {shown}"


def _held(whole: Encoded, known: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The source's scales of a tensor and parts that no value changes, by role; none unless all are as they were."""
    wanted = {role: whole.parts[role] for role in ("scale", *whole.codec.constant_parts)}
    found = {role: known[part.name] for role, part in wanted.items() if part.name in known}
    same = all((found[role].dtype, found[role].shape) == (wanted[role].dtype, wanted[role].shape) for role in found)
    return found if same and len(found) == len(wanted) else {}


def _notes(encode: Mapping[str, Encoded], scales: Mapping[str, Mapping[str, StoredTensor]]) -> Iterator[str]:
    """By codec: how many tensors, and where their scales come from."""
    tensors = Counter(whole.codec.name for whole in encode.values())
    unknown = Counter(whole.codec.name for name, whole in encode.items() if name not in scales)
    for codec, count in tensors.items():
        text = f"{codec}: {count:,} tensors are encoded as in the source; "
        if not unknown[codec]:
            yield text + "blocks that did not change keep its scales, others get new ones"
        else:
            yield text + f"the scales of {unknown[codec]:,} are made from the values"
    keepers = {whole.codec.name for name, whole in encode.items() if name not in scales and whole.codec.keeps_scales}
    for codec in sorted(keepers):
        yield f"{codec}: scales made from bf16 values are not bit for bit the source's, nor are the values under them"
