"""What a calibration adds to an export: scales of inputs beside the weights, and scales of channels within them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from converters.codecs.calibration import Calibration, Vector
from converters.codecs.fresh import StaticInputs
from converters.engine.plan import Draft, Entry, Plan, Unit
from converters.engine.scaling import Given, Scaled, Update
from converters.errors import UsageError
from converters.planning.folds import Fold
from converters.tensors import Shape

WEIGHT = ".weight"


def measured_inputs(plan: Plan, calibration: Calibration, folds: Sequence[Fold] = ()) -> dict[str, Vector]:
    """Largest magnitudes of the input channels of each module of an export's `plan` that was measured.

    `folds` are those whose scales divide what flows into their users. Raises UsageError where a measure has another
    width than the module.
    """
    shapes = {draft.name: draft.shape for draft in plan.drafts}
    maxima = dict(calibration.maxima)
    for fold in folds:
        for name in (user.hf[0].removesuffix(WEIGHT) for user in fold.users):
            if fold.name in calibration.scales and name in maxima:
                maxima[name] = maxima[name] / fold.spread(calibration.scales[fold.name], len(maxima[name]))
    out = {}
    for unit in plan.units:
        names = [entry.tensor for entry in unit.entries]
        found = maxima.get(names[0].removesuffix(WEIGHT))
        if found is None:
            continue
        for name in names:
            if shapes.get(name, ())[1:] != found.shape:
                raise UsageError(
                    f"the calibration measured {len(found)} inputs of `{names[0]}`; `{name}` has shape "
                    f"{list(shapes.get(name, ()))}",
                    hint="it is of another model: `mbx calibrate SRC DATA` measures this one",
                )
            out[name.removesuffix(WEIGHT)] = found
    return out


def input_scales(inputs: StaticInputs, modules: Collection[str], measured: Mapping[str, Vector]) -> dict[str, Vector]:
    """The tensors that hold the scales of the inputs of `modules`, by name."""
    return {module + inputs.suffix: inputs.scale(float(measured[module].max())) for module in modules}


def calibrated(plan: Plan, scaled: Mapping[str, Scaled], given: Mapping[str, Vector]) -> Plan:
    """`plan`, which makes tensors `scaled`, and fp32 tensors of `given` values too."""
    changes: dict[tuple[str, Shape], Update] = {(name, ()): change for name, change in scaled.items()}
    changes |= {(name, ()): Given(values) for name, values in given.items()}
    return replace(
        plan,
        drafts=(*plan.drafts, *(Draft.whole(name, "F32", values.shape) for name, values in given.items())),
        units=(*plan.units, *(Unit(name, (), (Entry(name, ()),)) for name in given)),
        updates={**plan.updates, **changes},
        ledger=replace(plan.ledger, produced=plan.ledger.produced + len(given)),
    )
