"""`mbx calibrate`: what flows into a model's products, for `mbx convert mcore-to-hf --codec`."""

from __future__ import annotations

import itertools
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from converters.errors import UsageError
from mbx.cli.groups import grouped
from mbx.cli.options import Dtype, HfConfig, Mapping, Output, epilog
from mbx.cli.output import out

if TYPE_CHECKING:
    from converters.codecs.calibration import Calibration

EPILOG = epilog(
    "mbx calibrate ./llama data.jsonl -o my.cal --codec int4_group",
    "mbx calibrate ./llama chats.jsonl -o my.cal --samples 256 --device cuda",
)


class ScaledCodec(str, Enum):
    """Codecs of 4 bits, whose scales are of a part of a row."""

    int4_group = "int4_group"
    mxfp4 = "mxfp4"
    nvfp4 = "nvfp4"


def calibration_of(
    asked: str | None, source: Path, codec: str, mapping: str | None, hf_config: Path | None, *, measure: bool = True
) -> Calibration | None:
    """What `--calibrate` names: a file of `mbx calibrate`, or data on which the checkpoint `source` is measured now.

    UsageError for data where nothing shall be measured, or is measured for `codec`.
    """
    if asked is None:
        return None
    from mbx.run.calibration_file import is_calibration, read_calibration

    if is_calibration(Path(asked)):
        return read_calibration(Path(asked))
    if not measure:
        raise UsageError(
            f"‹dry-run› measures nothing, and `{asked}` is data",
            hint=f"mbx calibrate {source} {asked} -o my.cal, and ‹calibrate› my.cal",
        )
    from converters.codecs.fresh import FRESH
    from mbx.run.export_codec import check_calibrated
    from mbx.train.calibration import calibrate as measured

    check_calibrated(codec)
    scaled = codec if FRESH[codec].scaled else None
    out.detail(f"measuring {source} on {asked}")
    return measured(source, asked, codec=scaled, mapping=mapping, hf_config=hf_config)


@grouped
def calibrate(
    src: Annotated[str, typer.Argument(metavar="SRC", help="A folder, hub model org/name or Megatron checkpoint.")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="Documents, chats or completions, as for training.")],
    target: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The file to write.")] = Path(
        "calibration.safetensors"
    ),
    codec: Annotated[
        ScaledCodec | None,
        typer.Option("--codec", help="Also choose scales of channels, as AWQ does, for this one."),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", metavar="N", help="Rows of tokens to measure on.")] = 64,
    length: Annotated[int, typer.Option("--length", metavar="N", help="Tokens of a row.")] = 512,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="Where layers run: cpu or cuda.")] = "cpu",
    dtype: Annotated[Dtype, typer.Option("--dtype", help="What layers run in.")] = Dtype.fp32,
    mapping: Mapping = None,
    hf_config: HfConfig = None,
    *,
    output: Output,
) -> None:
    """Measure what flows into each product, channel by channel, for an export that quantises.

    One layer is in memory at a time. `mbx convert mcore-to-hf --calibrate` takes the file.
    """
    output.configure()
    output.hush()
    from mbx.cli.source import fetch
    from mbx.train.calibration import calibrate as measure

    count = itertools.count()
    found = measure(
        fetch(src).path,
        data,
        target,
        codec=None if codec is None else codec.value,
        samples=samples,
        length=length,
        device=device,
        dtype=dtype.in_torch,
        mapping=mapping,
        hf_config=None if hf_config is None else fetch(hf_config, weights=False).path,
        progress=lambda layers: out.detail(f"layer {next(count)} measured"),
    )
    unscaled = found.measured.get("unscaled", ())
    doc = {
        "target": str(target),
        "products": len(found.maxima),
        "scales": len(found.scales),
        "measured": dict(found.measured),
    }
    scales = f", {len(found.scales):,} scales of channels for {found.codec}" if found.codec else ""
    lines = [f"{target}: the inputs of {len(found.maxima):,} products{scales}"]
    out.result(doc, lambda: [*lines, *(unscaled if isinstance(unscaled, tuple) else ())])
