"""The ledger: every tensor on both sides is accounted for exactly once, or the run does not start."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from converters.errors import CoverageError

_NEAR_MISS_LIMIT = 50
#: A name up to its first number, and that number: the layer of every checkpoint that numbers its layers.
_LAYER = re.compile(r"([^0-9]*)\.(\d+)\.")
#: What quantisers call the parts of a weight that are none of its codes.
_PART = re.compile(
    r"(weight|proj)_(scale|scale_inv|scale_2|scales|blocks|packed|shape|zero_point|global_scale|g_idx)$"
    r"|\.(input_scale|qweight|qzeros|scales|biases|g_idx|absmax|quant_map|nested_\w+|quant_state\.\w+|SCB)$"
)


@dataclass(frozen=True, slots=True)
class Waivers:
    """Shell-style patterns of tensors a user accepts to lack or to leave unused."""

    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def idle(self, ledger: Ledger) -> tuple[str, ...]:
        """In words, the patterns that matched nothing that `ledger` lacks or leaves over."""
        unused = (*ledger.waived_unused, *ledger.beside)
        return (
            *idle_patterns("‹allow-missing›", self.missing, ledger.waived_missing, "missing"),
            *idle_patterns("‹allow-unused›", self.unused, unused, "left over"),
        )

    def unused_by(self, name: str) -> bool:
        """Whether the user accepts to leave `name` unused."""
        return matches(name, self.unused)


#: Nothing may lack and nothing may be left over.
NO_WAIVERS = Waivers()


@dataclass(frozen=True, slots=True)
class Ledger:
    """What a plan consumes and produces.

    `waived_missing` are produced as zeros; `waived_unused` are not read. `dropped` are buffers Transformers
    recomputes; `repeated` are copies of another tensor, compared with it on import and written again on export.
    `beside` are tensors of a model around this one, such as a vision tower: they travel along as they are.
    """

    consumed: int
    produced: int
    waived_missing: tuple[str, ...] = ()
    waived_unused: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


def settle(
    table: str, side: str, present: Collection[str], wanted: Iterable[str], waivers: Waivers
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names waived as missing and as unused; CoverageError when anything else is left over or claimed twice.

    `present` are the tensors of the source, `wanted` those the table's rows read (stacked ones may repeat).
    """
    want = set(wanted)
    missing = sorted(want - set(present))
    unused = sorted(set(present) - want)
    waived_missing = tuple(name for name in missing if matches(name, waivers.missing))
    waived_unused = tuple(name for name in unused if matches(name, waivers.unused))
    missing = [name for name in missing if not matches(name, waivers.missing)]
    unused = [name for name in unused if not matches(name, waivers.unused)]
    if missing or unused:
        parts = []
        if missing:
            parts.append(f"{len(missing)} tensor(s) the table `{table}` needs are missing")
        if unused:
            parts.append(f"{len(unused)} tensor(s) of the source have no row")
        raise CoverageError(
            f"{side}: {' and '.join(parts)}, first `{(missing or unused)[0]}`",
            hint=_layer_counts(present, want, [*missing, *unused])
            or _parts_of_codes(unused)
            or "`mbx models check TABLE ‹against› SRC` lists them by row; waive by name with "
            "‹allow-missing› GLOB (written as zeros) or ‹allow-unused› GLOB",
            # A fit that is tried with every table fails with most of them, and nobody reads why.
            details=lambda: (
                [f"missing  {line}" for line in _with_near(missing, unused)]
                + [f"unmapped {line}" for line in _with_near(unused, missing)]
            ),
        )
    return waived_missing, waived_unused


def reject_twice(table: str, side: str, claims: Sequence[tuple[str, str]]) -> None:
    """CoverageError when two rows claim one tensor; `claims` are (tensor with its entry, row)."""
    first: dict[str, str] = {}
    twice = []
    for tensor, row in claims:
        if tensor in first:
            twice.append(f"`{tensor}` by `{first[tensor]}` and by `{row}`")
        first.setdefault(tensor, row)
    if twice:
        raise CoverageError(f"table `{table}`: {side} tensor claimed twice: {twice[0]}", details=twice)


def _layer_counts(present: Collection[str], want: Collection[str], odd: Sequence[str]) -> str | None:
    """Where whole layers at the end explain every odd name: how many there are, and how many were expected."""
    stems = {match[1] for name in odd if (match := _LAYER.match(name))}
    if len(stems) != 1 or not all(map(_LAYER.match, odd)):
        return None
    (stem,) = stems
    have, asked = (_layers(names, stem) for names in (present, want))
    if not have or not asked or max(have) == max(asked) or _layers(odd, stem) != have ^ asked:
        return None
    return (
        f"`{stem}` goes from 0 to {max(have)} in the source, and by the config to {max(asked)}: "
        "does config.json belong to these weights, and are all of them here?"
    )


def _parts_of_codes(unused: Sequence[str]) -> str | None:
    """A hint where tensors that are left over look like parts of quantised weights: nobody can do without those."""
    if not any(map(_PART.search, unused)):
        return None
    return (
        "these are parts of quantised weights, and `quantization_config` in config.json does not say how to read "
        "them: restore the config that they were published with, or dequantise them with the library that wrote them"
    )


def _layers(names: Iterable[str], stem: str) -> frozenset[int]:
    return frozenset(int(m[2]) for name in names if (m := _LAYER.match(name)) and m[1] == stem)


def idle_patterns(option: str, patterns: Iterable[str], names: Sequence[str], what: str) -> list[str]:
    """Patterns that match none of `names`."""
    idle = (pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names))
    return [f"{option} {pattern!r} had no effect: it matches nothing that is {what}" for pattern in idle]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the globs `patterns` fits a name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _with_near(names: Sequence[str], others: Sequence[str]) -> list[str]:
    if len(names) > _NEAR_MISS_LIMIT or len(others) > _NEAR_MISS_LIMIT * 10:
        return [f"`{name}`" for name in names]
    lines = []
    for name in names:
        close = get_close_matches(name, others, n=1, cutoff=0.85)
        lines.append(f"`{name}`" + (f" (near `{close[0]}`)" if close else ""))
    return lines
