"""`mbx push`, and the option of conversions that does the same once they are done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from mbx.cli.groups import grouped
from mbx.cli.options import Output, epilog
from mbx.cli.output import out

EPILOG = epilog("mbx push ./llama my-org/llama", "mbx push ./llama my-org/llama --public")
Public = Annotated[bool, typer.Option("--public", help="Make a new repository public; it is private if not given.")]


@dataclass(frozen=True)
class Pushing:
    """Whether a result goes to the hub."""

    push: Annotated[
        str | None, typer.Option("--push", metavar="ORG/NAME", help="Upload the result to the hub, private if new.")
    ] = None
    public: Public = False

    def check(self) -> None:
        """UsageError for a name that no repository has, before anything is converted."""
        from converters.errors import UsageError
        from mbx.run.share import check_name

        if self.push is not None:
            check_name(self.push)
        elif self.public:
            raise UsageError("‹public› belongs to ‹push›", hint="name the repository: ‹push› ORG/NAME")

    def after(self, folder: Path, source: Path | None = None) -> None:
        """Upload a finished folder; held against `source`, the checkpoint that it was made from, first."""
        if self.push is not None:
            upload(folder, self.push, public=self.public, source=source)


@grouped
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A Hugging Face folder that mbx made.")],
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The hub repository.")],
    public: Public = False,
    source: Annotated[
        Path | None, typer.Option("--source", metavar="CKPT", help="What it was made from: held against it first.")
    ] = None,
    *,
    output: Output,
) -> None:
    """Upload a finished Hugging Face folder to the hub, with a model card of its manifest.

    A new repository is private unless --public. What is there already is not sent again: after an interruption the
    same command goes on.
    """
    output.configure()
    upload(folder, repo, public=public, source=source)


def upload(folder: Path, repo: str, *, public: bool, source: Path | None) -> None:
    """Prove, upload and say where it lies; StorageError where the proof fails, with nothing sent."""
    from converters.errors import StorageError
    from mbx.proof.integrity import check
    from mbx.run.share import CARD, Proof, check_name, left_out
    from mbx.run.share import push as send

    check_name(repo)
    proofs = []
    if source is not None:
        from mbx.proof.parity import parity

        report = parity(source, folder)
        if not report.passed:
            failed = next(leg for leg in report.legs if leg.status != "passed")
            raise StorageError(
                f"`{folder}` is not what `{source}` holds, and was not uploaded: {failed.name} {failed.summary}",
                hint=f"mbx verify parity {source} {folder}",
            )
        proofs = [Proof(f"`mbx verify parity`, {leg.name}", f"{leg.status}, {leg.summary}") for leg in report.legs]
        proofs += [Proof("not looked at", gap.line) for gap in report.open_gaps]
    others = left_out(folder)
    written = check(folder)
    if changes := [change for change in written.changes if change.file != CARD]:
        raise StorageError(
            f"`{folder}` is not as it was written, and was not uploaded: {changes[0].line()}",
            hint=f"mbx verify integrity {folder}",
            details=[change.line() for change in changes],
        )
    proofs.append(Proof("`mbx verify integrity`", f"passed, {written.nbytes} bytes as they were written"))
    try:
        where = send(folder, repo, private=not public, proofs=proofs)
    except StorageError as error:
        again = f"mbx push {folder} {repo}{' --public' * public}{f' --source {source}' if source else ''}"
        error.hint = f"{error.hint or 'look at the hub'}; `{again}` goes on"
        raise
    out.message(f"uploaded to {where}")
    if others:
        out.message(f"not uploaded, as mbx did not write it: {', '.join(others[:4])}{' …' * (len(others) > 4)}")
