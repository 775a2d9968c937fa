"""`mbx models`: which architectures the tables cover, and whether a table covers a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mbx.cli import completions
from mbx.cli.groups import grouped
from mbx.cli.options import Output, epilog
from mbx.cli.output import out, paint
from mbx.text import aligned

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from converters.rows.table import Table
    from mbx.catalogue.models_page import ModelRow

app = typer.Typer(
    help="Show and check the mapping tables, one an architecture.",
    no_args_is_help=True,
    rich_markup_mode=None,
    epilog=epilog("mbx models list", "mbx models show llama", "mbx models check --against ./llama"),
)


@app.command("list", epilog=epilog("mbx models list", "mbx models list --json"))
@grouped
def list_models(output: Output) -> None:
    """List the architectures that have a table, and how far each is proved.

    COVER and WEIGHTS are the legs of `mbx verify parity`. FORWARD is the largest difference of two fp32 logits
    between Transformers and Megatron Core, measured on a tiny checkpoint of the family; `*` marks a reason below.
    """
    output.configure()
    from mbx.catalogue.models_page import read_runs, rows
    from mbx.tables import shipped

    found = rows()
    docs = [{**_document(shipped(row.table)), **_proof(row)} for row in found]
    runs = [{k: run[k] for k in ("device", "date", "versions")} for run in read_runs().values()]
    out.result({"tables": docs, "measured_with": runs}, lambda: _list_lines(found))


@app.command("show", epilog=epilog("mbx models show llama", "mbx models show llama > mine.toml"))
@grouped
def show(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="A table that `mbx models list` names.", autocompletion=completions.tables
        ),
    ],
    output: Output,
) -> None:
    """Print a table as it is: TOML that --mapping takes back."""
    output.configure()
    from mappings import table_text
    from mbx.tables import shipped

    table = shipped(name)
    text = table_text(name)
    out.result({**_document(table), "toml": text}, lambda: text.rstrip("\n").split("\n"))


@app.command("new", epilog=epilog("mbx models new ./novel > novel.toml", "mbx models new org/name --json"))
@grouped
def new(
    source: Annotated[str, typer.Argument(metavar="HF", help="A Hugging Face folder or hub model; headers are read.")],
    output: Output,
) -> None:
    """Draft a table for a checkpoint from rows that shipped tables know.

    What no row places stands in comments at the end, and as a warning on stderr.
    """
    output.configure()
    from mbx.catalogue.draft import draft
    from mbx.cli.source import fetch
    from mbx.formats.registry import open_hf

    folder = open_hf(fetch(source).path)
    drafted = draft(folder.config, folder.tensors)
    left = {"tensors": list(drafted.unplaced_tensors), "config_keys": list(drafted.unplaced_keys)}
    if count := len(left["tensors"]) + len(left["config_keys"]):
        out.warning(f"{count} tensor pattern(s) and config key(s) are not placed; they stand in comments at the end")
    doc = {"donor": drafted.donor, "unplaced": left, "toml": drafted.text}
    out.result(doc, lambda: drafted.text.rstrip("\n").split("\n"))


@app.command(
    "check",
    epilog=epilog(
        "mbx models check",
        "mbx models check --against ./llama",
        "mbx models check ./mine.toml --against org/name",
    ),
)
@grouped
def check(
    table: Annotated[
        str | None,
        typer.Argument(
            metavar="[TABLE]",
            help="A table's name or .toml file; all shipped ones if absent.",
            autocompletion=completions.tables,
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="HF", help="Prove that it covers this folder or hub model: every tensor and config key."),
    ] = None,
    *,
    output: Output,
) -> None:
    """Check that tables are well formed, or that one covers a checkpoint exactly.

    With --against, every tensor without a row, every row without a tensor and every unknown config key is listed, and
    the exit code is 3 unless there are none. Of the weights no more is read than tells rows apart: a table is not
    proved by those that hold constants, and they are named.
    """
    output.configure()
    if against is None:
        doc = _check_tables([table] if table is not None else None)
    else:
        from mbx.cli.source import fetch

        doc = _check_cover(fetch(against).path, table)
    out.result(doc, lambda: _lines(doc))
    raise typer.Exit(0 if doc["ok"] else 3)


def _proof(row: ModelRow) -> dict[str, Any]:
    return {
        "cover": row.cover,
        "weights": row.weights,
        "forward_cpu": row.forward_cpu,
        "forward_gpu": row.forward_gpu,
        "reasons": list(row.reasons),
    }


def _list_lines(rows: Sequence[ModelRow]) -> Iterator[str]:
    """One line a table, then why something was not run or failed."""
    heads = ("TABLE", "MODEL TYPE", "COVER", "WEIGHTS", "FORWARD CPU", "FORWARD GPU")
    yield from aligned([heads, *((*row.cells()[:4], *map(_short, row.cells()[4:6])) for row in rows)])
    if any(row.reasons for row in rows):
        yield ""
    for row in rows:
        yield from (f"* {row.table}: {reason}" for reason in row.reasons)


def _short(forward: str) -> str:
    """The figure, or the one word for it; `*` where the reasons say more."""
    first, _, more = forward.partition("; ")
    return f"{first} *" if more or forward in ("failed", "not run") else first


def _check_tables(names: list[str] | None) -> dict[str, Any]:
    """Parse tables; a malformed one is a finding, an unknown name an error."""
    from converters.errors import TableError
    from converters.rows.flags import contradictions
    from mappings import table_names
    from mbx.tables import from_file, shipped

    checked: list[dict[str, Any]] = []
    for name in names or table_names():
        try:
            found = from_file(Path(name)) if name.endswith(".toml") else shipped(name)
            findings = contradictions(found)
            checked.append({"table": found.name, "against": None, "sha256": found.digest, "findings": findings})
        except TableError as error:
            checked.append({"table": name, "against": None, "sha256": None, "findings": [error.fact, *error.details]})
    return {"ok": not any(entry["findings"] for entry in checked), "checked": checked}


def _check_cover(folder: Path, table: str | None) -> dict[str, Any]:
    """Plan an import of `folder`; config and tensors are checked apart, so that one does not hide the other."""
    from converters.errors import MbxError
    from converters.mcore.flavours import in_flavour, usual_of
    from converters.mcore.layout import Layout
    from converters.planning.importer import plan_import
    from converters.rows.flags import contradictions
    from mbx.formats.registry import open_hf
    from mbx.proof.told_apart import not_told_apart
    from mbx.tables import table_for

    model = open_hf(folder)
    found = table_for(model.config, table)
    whole = in_flavour(found, usual_of(found))
    findings = contradictions(found)
    try:
        found.config.to_mcore(model.config)
    except MbxError as error:
        findings += [f"config   {line}" for line in error.details or (error.fact,)]
    untold: list[str] = []
    try:
        plan = plan_import(whole, model.config, model.tensors, Layout(), allow_unused_keys=tuple(model.config))
        with model:
            untold += [gap.what for gap in not_told_apart(plan, model.source)]
    except MbxError as error:
        lines = list(error.details or (error.fact,))
        findings += [line for line in lines if f"config   {line}" not in findings]
    entry = {"table": found.name, "against": str(folder), "sha256": found.digest, "findings": findings}
    counts = {"tensors": len(model.tensors), "not_told_apart": untold}
    return {"ok": not findings, "checked": [{**entry, **counts}]}


def _lines(doc: dict[str, Any]) -> list[str]:
    lines = []
    for entry in doc["checked"]:
        where = f" covers all {entry['tensors']:,} tensors of {entry['against']}" if entry["against"] else ""
        if entry["findings"]:
            where = f" does not cover {entry['against']}" if entry["against"] else ""
            count = len(entry["findings"])
            lines.append(f"{paint('✗', 'red')} {entry['table']}{where}: {count} finding{'s' if count > 1 else ''}")
            lines += [f"  {text}" for text in entry["findings"]]
        else:
            lines.append(f"{paint('✓', 'green')} {entry['table']}{where}")
        for what in entry.get("not_told_apart", ()):
            lines.append(f"  {paint('not told apart', 'yellow')}: {what}; these weights cannot prove the table")
    return lines


def _document(table: Table) -> dict[str, Any]:
    return {
        "name": table.name,
        "family": table.family,
        "model_types": list(table.model_types),
        "architectures": list(table.architectures),
        "notes": table.notes,
        "unsupported": table.unsupported,
        "sha256": table.digest,
    }
