"""`mbx calibrate`: what flows into a model's products, for `mbx convert mcore-to-hf --codec`."""

from __future__ import annotations

import itertools
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from mbx.cli.groups import grouped
from mbx.cli.options import Dtype, Mapping, Output, epilog
from mbx.cli.output import out

EPILOG = epilog(
    "mbx calibrate ./llama data.jsonl -o my.cal --codec int4_group",
    "mbx calibrate ./llama chats.jsonl -o my.cal --samples 256 --device cuda",
)


class ScaledCodec(str, Enum):
    """Codecs whose scales are of a part of a row."""

    int4_group = "int4_group"
    nvfp4 = "nvfp4"


@grouped
def calibrate(
    src: Annotated[str, typer.Argument(metavar="SRC", help="A Hugging Face folder or hub model org/name.")],
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
