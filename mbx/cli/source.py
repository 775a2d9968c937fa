"""A command's source: a folder, or a hub model that is downloaded first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import typer

from mbx.cli.output import out
from mbx.cli.progress import Meter
from mbx.text import aligned, human_bytes, plural


@dataclass(frozen=True, slots=True)
class Source:
    """Where the files of a source lie, and what a manifest says of where they came from."""

    path: Path
    origin: Mapping[str, str | None]


def fetch(source: str, *, weights: bool = True) -> Source:
    """The folder of `source`; a hub model is downloaded, or found in the cache. Raises as `hub.resolve` does."""
    from mbx.formats.hub import resolve

    if Path(source).expanduser().exists():  # no bar for what is here already
        return Source(resolve(source, weights=weights).path, {})
    with Meter(f"downloading {source}", None) as meter:
        model = resolve(source, weights=weights, progress=meter.reach)
    if model.repo_id is None:
        return Source(model.path, {})
    out.detail(f"{model.repo_id} at {model.revision_sha} lies in {model.path}")
    return Source(model.path, {"repo_id": model.repo_id, "revision_sha": model.revision_sha})


def stop_before_download(source: str) -> None:
    """For a dry run: where a hub model is not in the cache, say what would be downloaded, and end the command."""
    from mbx.formats.hub import plan_download

    plan = plan_download(source)
    if not plan.download_bytes:
        return
    missing = [file for file in plan.files if not file.cached]
    document = {
        "dry_run": True,
        "plan": None,
        "download": {
            "repo_id": plan.repo_id,
            "revision_sha": plan.revision_sha,
            "bytes": plan.download_bytes,
            "files": [{"path": file.path, "bytes": file.nbytes} for file in missing],
        },
    }

    def lines() -> list[str]:
        head = f"dry run: {plan.repo_id} at {plan.revision_sha} is not in the cache; a run would download"
        rows = [(f"  {file.path}", human_bytes(file.nbytes)) for file in missing]
        foot = f"{plural(len(missing), 'file')}, {human_bytes(plan.download_bytes)}; the plan needs their headers"
        return [head, *aligned(rows, right=(1,)), foot]

    out.result(document, lines)
    raise typer.Exit(0)
