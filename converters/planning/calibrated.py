"""What a calibration adds to an export: scales of inputs beside the weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from converters.codecs.calibration import Calibration, Vector
from converters.codecs.fresh import StaticInputs
from converters.engine.plan import Draft, Entry, Plan, Unit
from converters.engine.scaling import Given
from converters.errors import UsageError

WEIGHT = ".weight"


def measured_inputs(plan: Plan, calibration: Calibration) -> dict[str, Vector]:
    """Largest magnitudes of the input channels of each module of an export's `plan` that was measured.

    Raises UsageError where a measure has another width than the module.
    """
    shapes = {draft.name: draft.shape for draft in plan.drafts}
    out = {}
    for unit in plan.units:
        names = [entry.tensor for entry in unit.entries]
        found = calibration.maxima.get(names[0].removesuffix(WEIGHT))
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


def with_given(plan: Plan, given: Mapping[str, Vector]) -> Plan:
    """`plan`, which makes fp32 tensors of `given` values too."""
    return replace(
        plan,
        drafts=(*plan.drafts, *(Draft.whole(name, "F32", values.shape) for name, values in given.items())),
        units=(*plan.units, *(Unit(name, (), (Entry(name, ()),)) for name in given)),
        updates={**plan.updates, **{(name, ()): Given(values) for name, values in given.items()}},
        ledger=replace(plan.ledger, produced=plan.ledger.produced + len(given)),
    )
