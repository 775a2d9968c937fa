"""`mbx verify`: whether two checkpoints are the same model."""

from __future__ import annotations

import os
import textwrap
import warnings
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mbx import settings
from mbx.cli.options import Json, Mapping, MaxMemory, Quiet, Verbose, Workers, epilog
from mbx.output import SCREEN_WIDTH, out, paint

if TYPE_CHECKING:
    from mbx.verify import ParityReport


class Device(str, Enum):
    """Where the forward leg runs."""

    cpu = "cpu"
    cuda = "cuda"


app = typer.Typer(
    help="Prove that a conversion lost nothing.",
    no_args_is_help=True,
    rich_markup_mode=None,
    epilog=epilog("mbx verify parity HF MCORE", "mbx verify parity HF MCORE --forward"),
)
_SHOWN_FINDINGS = 10
_INDENT = 20
_COLOURS = {"passed": "green", "failed": "red", "not run": "yellow"}


@app.callback()
def _group() -> None:
    """Keeps `parity` a command of its own while it is the only one."""


@app.command(
    "parity",
    epilog=epilog(
        "mbx verify parity ./llama ckpt",
        "mbx verify parity meta-llama/Llama-3.2-1B ckpt --forward",
        "mbx verify parity ./llama ckpt --json | jq .legs",
    ),
)
def parity(
    hf: Annotated[str, typer.Argument(metavar="HF", help="A Hugging Face folder or hub model org/name[@revision].")],
    mcore: Annotated[Path, typer.Argument(metavar="MCORE", help="A Megatron Core checkpoint (torch_dist).")],
    forward: Annotated[
        bool, typer.Option("--forward", help="Also compare logits of Transformers and Megatron Core, fp32 on the CPU.")
    ] = False,
    device: Annotated[
        Device, typer.Option(help="Where --forward runs; cuda takes one GPU with Transformer Engine.")
    ] = (Device.cpu),
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompt of --forward; token ids are drawn if not given.")
    ] = None,
    mapping: Mapping = None,
    workers: Workers = None,
    max_memory: MaxMemory = None,
    json: Json = False,
    quiet: Quiet = 0,
    verbose: Verbose = 0,
) -> None:
    """Compare a Hugging Face model with a Megatron Core checkpoint.

    Legs are reported apart: cover (every tensor has its counterpart), config (settings agree), weights (every byte
    agrees) and forward (the logits agree). Exit code 1 unless every leg that was asked for ran and passed.
    """
    out.configure(json=json, quiet=quiet, verbose=verbose)
    from mbx import verify
    from mbx.cli.progress import Meter
    from mbx.cli.source import fetch
    from mbx.mcore.prompts import Prompts

    source = fetch(hf)
    if forward and not verbose:
        _hush()
    with Meter("comparing", None) as meter:
        report = verify.parity(
            source.path,
            mcore,
            forward=forward,
            device=device.value,
            prompts=Prompts(text_file=text),
            mapping=mapping,
            workers=settings.number("workers", workers),
            max_memory=settings.number("max_memory", max_memory),
            progress=meter.advance,
        )
    doc = _document(report, forward)
    out.result(doc, lambda: _lines(doc))
    raise typer.Exit(0 if report.passed else 1)


def _hush() -> None:
    """Keep the notices and bars of Megatron Core and Transformers off the screen; -v lets them through."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.simplefilter("ignore")


def _document(report: ParityReport, forward: bool) -> dict[str, Any]:
    legs = {
        leg.name: {"status": leg.status, "summary": leg.summary, "details": list(leg.details)} for leg in report.legs
    }
    if not forward:
        legs["forward"] = {"status": "not run", "summary": "not asked for; add --forward", "details": []}
    return {
        "passed": report.passed,
        "hf": report.left,
        "mcore": report.right,
        "table": report.table,
        "asked": [leg.name for leg in report.legs],
        "legs": legs,
    }


def _lines(doc: dict[str, Any]) -> list[str]:
    lines = []
    for name, leg in doc["legs"].items():
        status = leg["status"]
        summary = textwrap.wrap(leg["summary"], SCREEN_WIDTH - _INDENT, break_on_hyphens=False)
        head = "  " + name.ljust(9) + paint(status, _COLOURS[status]) + " " * (9 - len(status))
        lines += [head + summary[0], *(" " * _INDENT + text for text in summary[1:])]
        found = leg["details"]
        lines += [f"    {text}" for text in found[:_SHOWN_FINDINGS]]
        if (rest := len(found) - _SHOWN_FINDINGS) > 0:
            lines.append(f"    … and {rest} more; --json lists all")
    if doc["passed"]:
        return [*lines, paint(f"parity holds in {', '.join(doc['asked'])}", "green")]
    open_legs = [f"{name} {doc['legs'][name]['status']}" for name in doc["asked"]]
    open_legs = [text for text in open_legs if not text.endswith("passed")]
    return [*lines, paint(f"parity is not proved: {', '.join(open_legs)}", "red")]
