"""The checks of a `mbx-ci.toml`, run as a matrix of checkpoints, layouts and legs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from converters.errors import MbxError
from converters.mcore.layout import Layout
from mappings import table_names
from mbx.formats.registry import sniff
from mbx.models.device import Spread
from mbx.models.prompts import DRAWN
from mbx.proof.ci.checks import Check, described
from mbx.proof.compare import Reading
from mbx.proof.parity import Leg, ParityReport, parity
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run
from mbx.tables import shipped

#: Says what a model's weights are: a folder as it is, a hub model downloaded.
Fetch = Callable[[str], Path]


@dataclass(frozen=True, slots=True)
class Result:
    """One leg of one check at one layout; only `passed` is a success, whatever the reason."""

    check: str
    layout: str
    leg: Leg
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether the leg ran and passed."""
        return self.leg.status == "passed"


def run_checks(
    checks: Sequence[Check], fetch: Fetch, *, workers: int = 2, done: Callable[[Result], None] = lambda _: None
) -> tuple[Result, ...]:
    """Run every check; a check that cannot be run at all is a failed leg of it, never a missing one."""
    results: list[Result] = []
    for check in checks:
        for layout in check.layouts if check.source is not None else (Layout(),):
            started = time.monotonic()
            where = described(layout) if check.source is not None else "as they are"
            try:
                legs = _legs(check, layout, fetch, workers)
            except MbxError as error:
                legs = [Leg(leg, "failed", error.fact, error.details) for leg in check.legs]
            seconds = (time.monotonic() - started) / max(1, len(legs))
            for leg in legs:
                results.append(Result(check.name, where, leg, seconds))
                done(results[-1])
    return tuple(results)


def _legs(check: Check, layout: Layout, fetch: Fetch, workers: int) -> list[Leg]:
    if check.source is None:
        assert check.left is not None and check.right is not None
        return _asked(check, _parity(check, fetch(check.left), fetch(check.right), workers))
    options = Options(
        dtype=check.dtype,
        layout=layout,
        format=check.format,
        mapping=check.mapping,
        allow_unused_keys=check.allow_unused_key,
        workers=workers,
        max_memory=check.max_memory,
        sync=False,
    )
    with tempfile.TemporaryDirectory(prefix="mbx-ci-") as work:
        source = _source(check.source, fetch, Path(work))

        def to_mcore(path: Path) -> Path:
            return run(plan_hf_to_mcore(path, Path(work) / "mcore", options)).target

        def to_hf(path: Path) -> Path:
            plain = replace(options, layout=Layout(), dtype=None)
            return run(plan_mcore_to_hf(path, Path(work) / "hf", plain)).target

        # a Megatron checkpoint goes the other way round
        there, back = (to_hf, to_mcore) if sniff(source).format.spelling == "mcore" else (to_mcore, to_hf)
        made = there(source)
        legs = _asked(check, _parity(check, source, made, workers))
        if "round-trip" in check.legs:
            legs.append(_round_trip(_parity(replace(check, legs=("weights",)), source, back(made), workers)))
    return legs


def _source(name: str, fetch: Fetch, work: Path) -> Path:
    """The checkpoint that `source` names: a small model where it is a table and no folder, else what `fetch` finds."""
    if name in table_names() and not Path(name).exists():
        from mbx.proof.ci.tiny_model import make_small

        return make_small(shipped(name), work / "small")
    return fetch(name)


def _parity(check: Check, left: Path, right: Path, workers: int) -> ParityReport:
    return parity(
        left,
        right,
        forward="forward" in check.legs,
        loss="loss" in check.legs,
        spread=Spread(device=check.device),
        prompts=replace(DRAWN, num_prompts=check.prompts, num_tokens=check.tokens),
        tolerance=check.tolerance,
        mapping=check.mapping,
        dtype=check.dtype,
        allowed_keys=check.allow_unused_key,
        reading=Reading(workers, check.max_memory),
        allow_gaps=check.allow_gaps,
    )


def _asked(check: Check, report: ParityReport) -> list[Leg]:
    """The legs that were asked for, with the likely cause of the first difference behind the weights.

    What they left out, and the check does not allow, is a leg that failed.
    """
    found = {leg.name: leg for leg in report.legs}
    legs = []
    for name in check.legs:
        if name == "round-trip":
            continue
        leg = found.get(name, Leg(name, "not run", "this leg did not run"))
        if name == "weights" and report.first is not None and report.first.cause:
            leg = replace(leg, details=(*leg.details, f"`{report.first.name}`: {report.first.cause}"))
        legs.append(leg)
    if report.open_gaps:
        what = ", ".join(dict.fromkeys(gap.kind for gap in report.open_gaps))
        lines = tuple(gap.line for gap in report.open_gaps)
        legs.append(Leg("gaps", "failed", f"the legs left something out: {what}", lines))
    return legs


def _round_trip(report: ParityReport) -> Leg:
    """Whether what came back is what was there: names, shapes, values and settings."""
    failed = [leg for leg in report.legs if leg.status != "passed"]
    details = tuple(line for leg in failed for line in (f"{leg.name} {leg.status}: {leg.summary}", *leg.details))
    summary = f"{report.compared_values} values came back" + ("" if not failed else ", not as they were")
    return Leg("round-trip", "failed" if failed else "passed", summary, details)
