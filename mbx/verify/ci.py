"""`mbx verify ci`: the conversion checks of a `mbx-ci.toml`, as a matrix of checkpoints, layouts and legs.

[defaults]                      # each may be set again in a check
legs = ["cover", "config", "weights", "round-trip", "forward"]
layouts = [{}, { tp = 2, pp = 2 }]

[[check]]                       # convert at every layout, verify, convert back, verify
name = "llama"
source = "fixtures/tiny/llama"

[[check]]                       # a shipped table, on a small model that Transformers makes
source = "qwen3"

[[check]]                       # two checkpoints that somebody else made
name = "ours"
left = "meta-llama/Llama-3.2-1B"
right = "ckpt"
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TypeAlias

from converters.errors import MbxError, StorageError, UsageError
from converters.mcore.layout import Layout
from mappings import table_names
from mbx.formats.registry import sniff
from mbx.models.device import Spread
from mbx.models.prompts import DRAWN
from mbx.run.job import DEFAULT_MAX_MEMORY, Job, Options, plan_hf_to_mcore, plan_mcore_to_hf, run
from mbx.tables import shipped
from mbx.text import parse_memory
from mbx.verify.parity import Leg, ParityReport, parity

LEGS = ("cover", "config", "weights", "round-trip", "forward", "loss")
_CHECK_KEYS = frozenset(
    "name source left right legs layouts mapping dtype format tolerance prompts tokens device max_memory".split()
)
_LAYOUT_KEYS = frozenset(field.name for field in fields(Layout))
#: Says what a model's weights are: a folder as it is, a hub model downloaded.
Fetch = Callable[[str], Path]
#: One direction: what plans it, into which folder, with which options.
_Step: TypeAlias = tuple[Callable[[Path, Path, Options], Job], Path, Options]


@dataclass(frozen=True, slots=True)
class Check:
    """One entry of the file: `source` is converted at every layout, or `left` and `right` are compared as they are."""

    name: str
    legs: tuple[str, ...]
    source: str | None = None
    left: str | None = None
    right: str | None = None
    layouts: tuple[Layout, ...] = (Layout(),)
    mapping: str | None = None
    dtype: str | None = None
    format: str = "torch_dist"
    tolerance: float | None = None
    prompts: int = 1
    tokens: int = 32
    device: str = "cpu"
    max_memory: int = DEFAULT_MAX_MEMORY


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


def read_checks(path: Path) -> tuple[Check, ...]:
    """The checks of a `mbx-ci.toml`; UsageError names the check and the key, StorageError a file that is not there."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StorageError(f"there is no `{path}`", hint="docs/ci.md has one to start from") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"`{path}` cannot be read: {error}") from error
    if unknown := sorted(set(raw) - {"defaults", "check"}):
        raise UsageError(f"`{path}`: unknown section {', '.join(unknown)}", hint="there are [defaults] and [[check]]")
    defaults, entries = raw.get("defaults", {}), raw.get("check", [])
    if not isinstance(defaults, dict) or not isinstance(entries, list) or not entries:
        raise UsageError(f"`{path}` has no [[check]]: nothing would be tested")
    checks = tuple(_check(f"`{path}`, check {number}", defaults, entry) for number, entry in enumerate(entries, 1))
    names = [check.name for check in checks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"`{path}`: two checks are called {twice[0]!r}")
    return checks


def _check(where: str, defaults: Mapping[str, object], entry: object) -> Check:
    if not isinstance(entry, dict):
        raise UsageError(f"{where} is no table")
    values = {**defaults, **entry}
    if unknown := sorted(set(values) - _CHECK_KEYS):
        raise UsageError(f"{where}: unknown key {', '.join(unknown)}", hint=f"keys: {', '.join(sorted(_CHECK_KEYS))}")
    named = [key for key in ("source", "left", "right") if key in values]
    if named not in (["source"], ["left", "right"]):
        raise UsageError(f"{where}: it needs `source`, or `left` and `right`; it has {', '.join(named) or 'neither'}")
    first = str(values[named[0]])
    returns = named == ["source"] and "dtype" not in values  # a cast does not come back
    usual = LEGS[:5] if named == ["source"] else LEGS[:3]
    if named != ["source"] and (idle := sorted({"layouts", "format"} & set(entry))):
        raise UsageError(f"{where}: {', '.join(idle)} with `left` and `right`, which are compared as they are")
    legs = values.get("legs", [leg for leg in usual if returns or leg != "round-trip"])
    if not isinstance(legs, list) or not legs or not all(leg in LEGS for leg in legs):
        raise UsageError(f"{where}: legs = {legs!r}", hint=f"a list of: {', '.join(LEGS)}")
    if "round-trip" in legs and not returns:
        raise UsageError(f"{where}: a round trip needs `source`, and no `dtype`")
    check = Check(
        _text(where, values, "name") or Path(first).name,
        tuple(legs),
        _text(where, values, "source"),
        _text(where, values, "left"),
        _text(where, values, "right"),
        _layouts(where, values.get("layouts", [{}])),
        _text(where, values, "mapping"),
        _text(where, values, "dtype"),
        _text(where, values, "format") or "torch_dist",
        device=_text(where, values, "device") or "cpu",
    )
    tolerance = values.get("tolerance")
    if tolerance is not None and (
        isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance < math.inf
    ):
        raise UsageError(f"{where}: tolerance = {tolerance!r}; a finite number from 0 on was expected")
    memory = _text(where, values, "max_memory")
    return replace(
        check,
        tolerance=None if tolerance is None else float(tolerance),
        prompts=_number(where, values, "prompts", check.prompts),
        tokens=_number(where, values, "tokens", check.tokens),
        max_memory=check.max_memory if memory is None else parse_memory(memory),
    )


def _text(where: str, values: Mapping[str, object], key: str) -> str | None:
    value = values.get(key)
    if value is not None and not isinstance(value, str):
        raise UsageError(f"{where}: {key} = {value!r}; a string was expected")
    return value


def _number(where: str, values: Mapping[str, object], key: str, otherwise: int) -> int:
    value = values.get(key, otherwise)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{where}: {key} = {value!r}; a whole number from 1 on was expected")
    return value


def _layouts(where: str, value: object) -> tuple[Layout, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(entry, dict) for entry in value):
        raise UsageError(f"{where}: layouts = {value!r}; a list like [{{}}, {{ tp = 2, pp = 2 }}] was expected")
    for entry in value:
        if unknown := sorted(set(entry) - _LAYOUT_KEYS):
            raise UsageError(f"{where}: a layout has no {unknown[0]!r}", hint=f"it has {', '.join(_LAYOUT_KEYS)}")
        for key, size in entry.items():
            if type(size) is not (str if key == "pipeline" else int):
                wanted = "a string" if key == "pipeline" else "a whole number"
                raise UsageError(f"{where}: layout {key} = {size!r}; {wanted} was expected")
    return tuple(Layout(**entry) for entry in value)


def described(layout: Layout) -> str:
    """A layout by what is not its default: `tp2 pp2`, or `tp1`."""
    parts = [
        f"{field.name}{getattr(layout, field.name)}"
        for field in fields(Layout)
        if getattr(layout, field.name) != field.default
    ]
    return " ".join(parts) or "tp1"


def run_checks(
    checks: Sequence[Check], fetch: Fetch, *, workers: int = 2, done: Callable[[Result], None] = lambda _: None
) -> tuple[Result, ...]:
    """Run every check; a check that cannot be run at all is a failed leg of it, never a missing one."""
    results: list[Result] = []

    def add(check: Check, layout: str, legs: Sequence[Leg], started: float) -> None:
        seconds = (time.monotonic() - started) / max(1, len(legs))
        for leg in legs:
            results.append(Result(check.name, layout, leg, seconds))
            done(results[-1])

    for check in checks:
        for layout in check.layouts if check.source is not None else (Layout(),):
            started = time.monotonic()
            where = described(layout) if check.source is not None else "as they are"
            try:
                legs = _legs(check, layout, fetch, workers)
            except MbxError as error:
                legs = [Leg(leg, "failed", error.fact, error.details) for leg in check.legs]
            add(check, where, legs, started)
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
        workers=workers,
        max_memory=check.max_memory,
        sync=False,
    )
    with tempfile.TemporaryDirectory(prefix="mbx-ci-") as work:
        source = _source(check.source, fetch, Path(work))
        there: _Step = (plan_hf_to_mcore, Path(work) / "mcore", options)
        back: _Step = (plan_mcore_to_hf, Path(work) / "hf", replace(options, layout=Layout(), dtype=None))
        if sniff(source).format.spelling == "mcore":  # a Megatron checkpoint goes the other way round
            there, back = back, there
        made = _converted(source, there)
        legs = _asked(check, _parity(check, source, made, workers))
        if "round-trip" in check.legs:
            again = _converted(made, back)
            legs.append(_round_trip(_parity(replace(check, legs=("weights",)), source, again, workers)))
    return legs


def _converted(source: Path, step: _Step) -> Path:
    """Carry out one direction; returns its target."""
    plan, target, options = step
    run(plan(source, target, options))
    return target


def _source(name: str, fetch: Fetch, work: Path) -> Path:
    """The checkpoint that `source` names: a small model where it is a table and no folder, else what `fetch` finds."""
    if name in table_names() and not Path(name).exists():
        from mbx.verify.tiny_model import make_small

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
        workers=workers,
        max_memory=check.max_memory,
    )


def _asked(check: Check, report: ParityReport) -> list[Leg]:
    """The legs that were asked for, with the likely cause of the first difference behind the weights."""
    found = {leg.name: leg for leg in report.legs}
    legs = []
    for name in check.legs:
        if name == "round-trip":
            continue
        leg = found.get(name, Leg(name, "not run", "this leg did not run"))
        if name == "weights" and report.first is not None and report.first.cause:
            leg = replace(leg, details=(*leg.details, f"`{report.first.name}`: {report.first.cause}"))
        legs.append(leg)
    return legs


def _round_trip(report: ParityReport) -> Leg:
    """Whether what came back is what was there: names, shapes, values and settings."""
    failed = [leg for leg in report.legs if leg.status != "passed"]
    details = tuple(line for leg in failed for line in (f"{leg.name} {leg.status}: {leg.summary}", *leg.details))
    summary = f"{report.compared_values} values came back" + ("" if not failed else ", not as they were")
    return Leg("round-trip", "failed" if failed else "passed", summary, details)
