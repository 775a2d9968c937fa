"""`mbx verify`: whether two checkpoints are the same model."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mbx.cli import settings
from mbx.cli.calibrate import calibration_of
from mbx.cli.groups import grouped
from mbx.cli.imports import import_numpy
from mbx.cli.options import (
    AllowUnusedKey,
    Calibrate,
    CodecChoice,
    Dtype,
    HfConfig,
    Html,
    Mapping,
    Output,
    Resources,
    Workers,
    epilog,
)
from mbx.cli.output import flag, in_flags, out, paint
from mbx.cli.running import warn_of_unknown_core
from mbx.extras import require
from mbx.text import human_bytes

if TYPE_CHECKING:
    from mbx.models.device import Spread


class Device(str, Enum):
    """Where the forward leg runs."""

    cpu = "cpu"
    cuda = "cuda"


app = typer.Typer(
    help="Prove that a conversion lost nothing, and that a training learns what it should.",
    no_args_is_help=True,
    rich_markup_mode=None,
    epilog=epilog(
        "mbx verify parity HF CKPT --forward",
        "mbx verify training --recipe NAME model=DIR data=FILE",
        "mbx verify integrity DIR",
        "mbx verify ci",
    ),
)


@app.command(
    "parity",
    epilog=epilog(
        "mbx verify parity ./llama ckpt",
        "mbx verify parity meta-llama/Llama-3.2-1B ckpt --forward",
        "mbx verify parity ckpt-tp1 ckpt-tp8 --html report.html",
        "mbx verify parity ./llama ckpt --json | jq .first.cause",
        "torchrun --nproc-per-node 2 -m mbx verify parity ./llama ckpt --forward",
    ),
)
@grouped
def parity(
    first: Annotated[str, typer.Argument(metavar="A", help="A folder, hub model org/name[@revision] or checkpoint.")],
    second: Annotated[str, typer.Argument(metavar="B", help="What should be the same model, whatever its layout.")],
    forward: Annotated[
        bool, typer.Option("--forward", help="Also run both models, a layer in memory at a time, and compare logits.")
    ] = False,
    device: Annotated[
        Device, typer.Option(help="Where the models run; cuda takes Transformer Engine, a GPU a process.")
    ] = Device.cpu,
    tp: Annotated[
        int | None, typer.Option(min=1, help="Under torchrun: tensor-parallel size (default: all processes).")
    ] = None,
    pp: Annotated[int, typer.Option(min=1, help="Under torchrun: pipeline stages.")] = 1,
    ep: Annotated[int, typer.Option(min=1, help="Under torchrun: expert-parallel size.")] = 1,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompt of --forward; token ids are drawn if not given.")
    ] = None,
    loss: Annotated[bool, typer.Option("--loss", help="Also compare the loss of a fixed batch.")] = False,
    dtype: Annotated[Dtype | None, typer.Option(help="The --dtype that A was converted with.")] = None,
    codec: Annotated[
        CodecChoice,
        typer.Option(metavar="KIND", help="The --codec that the folder was exported from the checkpoint with."),
    ] = CodecChoice.plain,
    calibrate: Calibrate = None,
    html: Html = None,
    allow_gap: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Do without what was not compared, reached or told apart, by its line."),
    ] = None,
    mapping: Mapping = None,
    hf_config: HfConfig = None,
    allow_unused_key: AllowUnusedKey = None,
    *,
    resources: Resources,
    output: Output,
) -> None:
    """Compare two checkpoints that should hold the same model.

    Either may be a Hugging Face folder or a Megatron checkpoint of any layout. Legs are reported apart: cover (every
    tensor has its counterpart), config (settings agree), weights (every byte agrees, and a likely cause where it does
    not), forward (the logits agree; the first layer that diverges where they do not) and loss. What no leg looked at
    is named. Exit code 1 unless every leg that was asked for ran and passed, and --allow-gap names all that is left.
    """
    output.configure()
    import_numpy()
    from mbx.cli.parity_view import document, lines
    from mbx.cli.progress import Meter
    from mbx.cli.source import fetch
    from mbx.formats.registry import sniff
    from mbx.models.prompts import Prompts
    from mbx.proof.parity import parity as compare

    sides = [fetch(side).path for side in (first, second)]
    beside = None if hf_config is None else fetch(hf_config, weights=False).path
    if forward or loss:
        require("verify", "a forward pass")
        output.hush()
        warn_of_unknown_core()
    checkpoint = next((side for side in sides if sniff(side).format.spelling == "mcore"), sides[0])
    calibration = calibration_of(calibrate, checkpoint, codec.value, mapping, beside)
    with Meter("comparing", None) as meter:
        report = compare(
            *sides,
            forward=forward,
            loss=loss,
            dtype=None if dtype is None else dtype.value,
            codec=codec.value,
            calibration=calibration,
            spread=_spread(device, tp, pp, ep),
            prompts=Prompts(text_file=text),
            mapping=mapping,
            reading=resources.reading(meter),
            hf_config=beside,
            allow_gaps=allow_gap or (),
            allowed_keys=tuple(allow_unused_key or ()),
        )
    if not report.is_whole:  # this process took part in rank 0's
        raise typer.Exit(0)
    if html is not None:
        from mbx.proof.report.html import write

        write(report, html, flag)
    doc = document(report, forward=forward)
    out.result(doc, lambda: lines(doc))
    raise typer.Exit(0 if report.proved else 1)


@app.command("ci", epilog=epilog("mbx verify ci", "mbx verify ci checks.toml --junit parity.xml --markdown parity.md"))
@grouped
def ci(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The checks.")] = Path("mbx-ci.toml"),
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write JUnit XML.")] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a summary in Markdown.")] = None,
    workers: Workers = None,
    *,
    output: Output,
) -> None:
    """Run the conversion checks that a TOML file lists, as a matrix of models, layouts and legs.

    Each model is converted at every layout, verified, converted back and verified again. Exit code 1 unless every leg
    that was asked for ran and passed.
    """
    output.configure()
    import_numpy()
    from mbx.cli.source import fetch
    from mbx.proof.ci import report as ci_report
    from mbx.proof.ci.checks import read_checks
    from mbx.proof.ci.matrix import run_checks

    output.hush()
    results = run_checks(
        read_checks(file),
        lambda source: fetch(source).path,
        workers=settings.number("workers", workers),
        done=lambda result: out.detail(f"{result.check} {result.layout} {result.leg.name}: {result.leg.status}"),
    )
    for path, text in ((junit, ci_report.junit), (markdown, ci_report.markdown)):
        if path is not None:
            path.write_text(in_flags(text(results)), encoding="utf-8")
    passed = all(result.passed for result in results)
    doc = {"passed": passed, "results": [ci_report.entry(result) for result in results]}
    out.result(doc, lambda: ci_report.lines(results))
    raise typer.Exit(0 if passed else 1)


@app.command(
    "integrity", epilog=epilog("mbx verify integrity ckpt", "mbx verify integrity ./llama --json | jq .changes")
)
@grouped
def integrity(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint that mbx wrote, of either kind.")],
    workers: Workers = None,
    *,
    output: Output,
) -> None:
    """Re-read a checkpoint and compare every byte with its manifest's checksums.

    Names each tensor, file and byte range that changed since mbx wrote it; then the exit code is 1.
    """
    output.configure()
    from mbx.cli.progress import Meter
    from mbx.proof.integrity import check

    with Meter("checking", None) as meter:
        report = check(
            folder, workers=settings.number("workers", workers), progress=meter.advance, expect=meter.expect
        )
    doc = {
        "passed": report.passed,
        "tensors": report.num_tensors,
        "files": report.num_files,
        "bytes": report.nbytes,
        "changes": [asdict(change) for change in report.changes],
        "unlisted": list(report.unlisted),
    }
    lines = [f"{paint('changed', 'red')} {change.line()}" for change in report.changes]
    lines += [f"{paint('not listed', 'yellow')} `{name}`" for name in report.unlisted]
    what = f"{report.num_tensors} tensors, {report.num_files} files, {human_bytes(report.nbytes)}"
    verdict = paint("unchanged", "green") if report.passed else paint(f"{len(report.changes)} changed", "red")
    out.result(doc, lambda: [*lines, f"{what}: {verdict}"])
    raise typer.Exit(0 if report.passed else 1)


def _spread(device: Device, tp: int | None, pp: int, ep: int) -> Spread:
    """Where the forward leg runs; under torchrun all processes are one tensor-parallel group unless told otherwise."""
    from mbx.models.device import Spread, world_of

    return Spread(tp or max(1, world_of()[1] // pp if ep == 1 else 1), pp, ep, device.value)
