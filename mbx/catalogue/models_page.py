"""Which architectures are covered and how far that is proved: the rows of docs/models.md and of `mbx models list`.

Every figure comes from `mappings/measured.json`, which `tests/gpu/run_forward.py --record` writes; everything else
from the tables. `python -m mbx.catalogue.models_page docs/models.md` writes the page again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import mappings
from converters.rows.table import Table
from mappings import table_names
from mbx.tables import shipped
from mbx.untrusted.small_files import read_json

MEASURED: Final = Path(mappings.__file__).parent / "measured.json"
NOT_MEASURED: Final = "–"
#: Runs of `tests/gpu/run_forward.py` by device, as JSON holds them.
Runs: TypeAlias = Mapping[str, Any]
_INTRO = """\
# Models

<!-- Written by `make docs` from the tables and from mappings/measured.json; edits here are lost. -->

One row a mapping table. What was measured was measured on a tiny checkpoint of the family with random weights, in the
names, dtypes and layouts of its hub repository.

- **cover**: every tensor and every config key of the checkpoint is accounted for, exactly once.
- **weights**: every byte of the Megatron Core checkpoint is what the table says, read back from disk.
- **forward**: largest difference of two fp32 logits between Transformers and Megatron Core, which loads the checkpoint
  itself at its default strictness, on the same device; at every position of the prompts, far positions included where
  rotary embeddings are scaled. The limit is {limit:g}, or what Transformers differs from itself by between CPU and GPU
  where that is more. Each run has a negative control that must be seen: two rows of one fused weight exchanged. Models
  that see are shown drawn pictures, through Transformers' tower on both sides.
- {missing} stands for what was not measured, and is no pass.
"""


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One table. `forward_cpu` and `forward_gpu`: a difference, `failed`, `not run`, several of these, or nothing.

    `reasons` say why something was not run or failed; `notes` hold them too, behind what the table covers.
    """

    table: str
    model_types: tuple[str, ...]
    cover: str
    weights: str
    forward_cpu: str
    forward_gpu: str
    notes: str
    reasons: tuple[str, ...] = ()

    def cells(self) -> tuple[str, ...]:
        """Every column as text, in the order of `HEADINGS`."""
        types = ", ".join(self.model_types)
        return self.table, types, self.cover, self.weights, self.forward_cpu, self.forward_gpu, self.notes


HEADINGS: Final = ("table", "model types", "cover", "weights", "forward CPU", "forward GPU", "notes")


def rows(measured: Path = MEASURED) -> tuple[ModelRow, ...]:
    """A row for every shipped table; without the measured figures, as in an installed package, nothing is claimed.

    Raises StorageError where the figures are there and cannot be read.
    """
    runs = read_runs(measured)
    return tuple(_row(shipped(name), runs) for name in table_names())


def read_runs(measured: Path = MEASURED) -> Runs:
    """The recorded runs by device (`cpu`, `cuda`); empty where there is no file."""
    return read_json(measured) if measured.is_file() else {}


def page(measured: Path = MEASURED) -> str:
    """docs/models.md."""
    runs = read_runs(measured)
    limits = {
        found[key]["limit"] for run in runs.values() for _, found in _all(run) for key in found if _is_figures(key)
    }
    lines = [_INTRO.format(limit=max(limits, default=float("nan")), missing=NOT_MEASURED)]
    lines += _table(HEADINGS, [row.cells() for row in rows(measured)])
    if precise := list(_low_precision(runs)):
        lines += ["", "## bf16 and FP8 on a GPU, against the fp32 reference", ""]
        heads = ("family", "precision", "max abs Δ logit", "KL in nats, mean over positions", "top-1 agreement")
        lines += _table(heads, precise)
    lines += ["", "## Measured with", ""]
    for run in runs.values():
        lines.append(f"- {run['device']}, {run['date']}: {_numbered(run['versions'])}")
        others: dict[tuple[str, str], list[str]] = {}
        for name, found in _all(run):
            if "versions" in found:
                others.setdefault((found["date"], _numbered(found["versions"])), []).append(name)
        for (date, versions), names in others.items():
            lines.append(f"- {run['device']}, {date}, {', '.join(names)}: {versions}, the rest the same")
    return "\n".join(lines) + "\n"


def _row(table: Table, runs: Runs) -> ModelRow:
    cpu, gpu = (_of(table, runs.get(device, {})) for device in ("cpu", "cuda"))
    families = [*cpu, *gpu]
    both = [found for _, found in families]
    reasons = [table.unsupported] if table.unsupported else []
    reasons += [reason for reason in _reasons(families) if reason not in reasons]
    notes = [*([table.notes] if table.notes else []), *reasons, *_remarks(families)]
    for device, measured in (("CPU", cpu), ("GPU", gpu)):
        if any(is_stale(found, table) for _, found in measured):
            notes.append(f"The table has changed since it was measured on a {device}.")
    notes = list(dict.fromkeys(notes))
    return ModelRow(
        table.name,
        tuple(table.model_types),
        _worst(found.get("cover", {}).get("status") for found in both),
        _worst(found.get("weights", {}).get("status") for found in both),
        _forward(cpu, "cpu"),
        _forward(gpu, "cuda"),
        " ".join(map(_sentence, notes)),
        tuple(map(_sentence, reasons)),
    )


def is_stale(found: Mapping[str, Any], table: Table) -> bool:
    """Whether what was measured of a family was measured under another table."""
    return found.get("sha256") not in (None, table.digest)


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


def _numbered(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


#: A family's name and what was found of it.
_Family: TypeAlias = tuple[str, Mapping[str, Any]]


def _of(table: Table, run: Mapping[str, Any]) -> list[_Family]:
    return [(name, found) for name, found in _all(run) if found.get("table") == table.name]


def _all(run: Mapping[str, Any]) -> list[_Family]:
    return sorted(run.get("families", {}).items())


def _reasons(families: Sequence[_Family]) -> Iterator[str]:
    """Why a family was not run or failed, with its name where the table has others."""
    reasons: dict[str, list[str]] = {}
    for name, found in families:
        if reason := found.get("reason"):
            reasons.setdefault(str(reason), []).append(name)
    names = {name for name, _ in families}
    for reason, of in reasons.items():
        yield reason if set(of) == names else f"{', '.join(dict.fromkeys(of))}: {reason}"


def _remarks(families: Sequence[_Family]) -> Iterator[str]:
    """How a family was compared, where that is not the plain way."""
    for _, found in families:
        yield from found.get("notes", [])
        if versions := found.get("versions"):
            yield f"Measured with {_numbered(versions)}"
        if found.get("lent"):
            yield "Compared under Transformers' own rotary frequencies, as Megatron Core fixes other constants"


def _worst(statuses: Iterable[str | None]) -> str:
    seen = [status for status in statuses if status is not None]
    return next((kind for kind in ("failed", "not run", "passed") if kind in seen), NOT_MEASURED)


def _forward(families: Sequence[_Family], device: str) -> str:
    """The largest difference of the families that passed, and the names of those that did not."""
    by_status = {
        status: [name for name, found in families if found["status"] == status]
        for status in ("passed", "failed", "not run")
    }
    if not families:
        return NOT_MEASURED
    others = [status for status in ("failed", "not run") if by_status[status]]
    if not by_status["passed"] and len(others) == 1:
        return others[0]
    texts = [f"{status}: {', '.join(by_status[status])}" for status in others]
    if passed := by_status["passed"]:
        values = [
            v["max_abs"]
            for name, found in families
            if name in passed
            for k, v in found.items()
            if k == f"against_transformers_on_{device}"
        ]
        texts.insert(0, f"{max(values):.1e}")
    return "; ".join(texts)


def _is_figures(key: str) -> bool:
    return key.startswith("against_transformers_on_")


def _low_precision(runs: Runs) -> Iterator[tuple[str, ...]]:
    for name, found in sorted(runs.get("cuda", {}).get("families", {}).items()):
        for kind, figures in found.get("low_precision", {}).items():
            if figures.get("max_abs") is None:
                yield name, kind, "not run", str(figures.get("reason", "not finite")), ""
                continue
            kl, top1 = f"{figures['mean_kl_nats']:.1e}", f"{figures['top1_agreement']:.1%}"
            yield name, kind, f"{figures['max_abs']:.1e}", kl, top1


def _table(heads: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *body]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in lines]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
