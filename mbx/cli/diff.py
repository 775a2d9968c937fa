"""`mbx diff`: what changed between two checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mbx.cli.groups import grouped
from mbx.cli.imports import import_numpy
from mbx.cli.options import AllowUnusedKey, HfConfig, Html, Mapping, Output, Resources, epilog
from mbx.cli.output import out
from mbx.text import aligned, plural

if TYPE_CHECKING:
    from mbx.proof.diff import Change, Diff

EPILOG = epilog(
    "mbx diff ./base ./tuned",
    "mbx diff meta-llama/Llama-3.2-1B ckpt --top 40",
    "mbx diff ./base ./tuned --html changes.html",
    "mbx diff ./base ./tuned --json | jq '.changes[0]'",
)


@grouped
def diff(
    left: Annotated[str, typer.Argument(metavar="A", help="A folder, hub model org/name[@revision] or checkpoint.")],
    right: Annotated[str, typer.Argument(metavar="B", help="The later one, in any format or layout.")],
    top: Annotated[int, typer.Option(metavar="N", min=0, help="Changed tensors to show.")] = 20,
    html: Html = None,
    mapping: Mapping = None,
    hf_config: HfConfig = None,
    allow_unused_key: AllowUnusedKey = None,
    *,
    resources: Resources,
    output: Output,
) -> None:
    """Show what changed from checkpoint A to checkpoint B.

    Lists tensors added and removed, changed dtypes, shapes and settings, and for each changed tensor the norm of the
    change relative to A's, largest first. Exit code 1 where anything differs.
    """
    output.configure()
    import_numpy()
    from mbx.cli.progress import Meter
    from mbx.cli.source import fetch
    from mbx.proof.diff import diff as compare

    sides = [fetch(side).path for side in (left, right)]
    beside = None if hf_config is None else fetch(hf_config, weights=False).path
    with Meter("comparing", None) as meter:
        found = compare(
            *sides,
            mapping=mapping,
            reading=resources.reading(meter),
            hf_config=beside,
            allowed_keys=tuple(allow_unused_key or ()),
        )
    if html is not None:
        from mbx.proof.report.diff_page import write_diff

        write_diff(found, html)
    out.result(_document(found), lambda: _lines(found, top))
    raise typer.Exit(0 if found.same else 1)


def _document(found: Diff) -> dict[str, Any]:
    return {
        "same": found.same,
        "left": found.left,
        "right": found.right,
        "removed": list(found.removed),
        "added": list(found.added),
        "unchanged": found.unchanged,
        "relative": found.relative,
        "changes": [
            {
                "name": change.name,
                "dtypes": list(change.dtypes),
                "shapes": [list(shape) for shape in change.shapes],
                "differing": change.differing,
                "compared": change.compared,
                "relative": change.relative,
                "max_abs": None if change.relative is None else change.max_abs,
            }
            for change in found.changes
        ],
        "gaps": list(found.gaps),
        "config_compared": found.has_settings,
        "config": [{"key": key, "left": old, "right": new} for key, old, new in found.config],
    }


def _lines(found: Diff, top: int) -> list[str]:
    lines = [f"- `{name}`" for name in found.removed[:top]] + _more(len(found.removed) - top, "removed")
    lines += [f"+ `{name}`" for name in found.added[:top]] + _more(len(found.added) - top, "added")
    lines += [f"! {gap}" for gap in found.gaps]
    lines += [f"~ config `{key}`: {old!r} → {new!r}" for key, old, new in found.config]
    if shown := found.changes[:top]:
        rows = [("relative", "max |Δ|", "values", "tensor"), *map(_row, shown)]
        lines += aligned(rows, right=(0, 1, 2)) + _more(len(found.changes) - top, "changed")
    if not found.has_settings:
        lines.append("settings were not compared: the two state none under the same names")
    if found.same:
        return [*lines, f"no difference in {plural(found.unchanged, 'tensor')}"]
    total = "not finite" if found.relative is None else f"{found.relative:.3g}"
    return [
        *lines,
        f"{len(found.added)} added, {len(found.removed)} removed, {len(found.changes)} changed, "
        f"{found.unchanged} unchanged; |Δ| / |A| over all: {total}",
    ]


def _more(rest: int, what: str) -> list[str]:
    return [f"  … and {rest} more {what}; --json lists all"] if rest > 0 else []


def _row(change: Change) -> tuple[str, str, str, str]:
    notes = [f"{a} → {b}" for a, b in (change.dtypes,) if a != b]
    notes += [f"{list(a)} → {list(b)}" for a, b in (change.shapes,) if a != b]
    if change.shapes[0] != change.shapes[1] and change.differing == 0:
        notes.append("equal where both have rows")
    name = f"`{change.name}`" + (f" ({', '.join(notes)})" if notes else "")
    if change.differing is None or change.compared is None:
        return "–", "–", "–", name
    share = change.differing / max(1, change.compared)
    relative = "not finite" if change.relative is None else f"{change.relative:.3g}"
    return relative, "–" if change.relative is None else f"{change.max_abs:.3g}", f"{share:.1%}", name
