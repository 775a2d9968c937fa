"""`mbx importance`: how much each part of a model matters, for `mbx convert prune`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import typer

from mbx.cli.groups import grouped
from mbx.cli.options import Dtype, Mapping, Output, epilog
from mbx.cli.output import out

EPILOG = epilog(
    "mbx importance ./llama calibration.jsonl -o importance.json",
    "mbx importance ./llama chats.jsonl -o imp.json --samples 256 --device cuda",
)


@grouped
def importance(
    src: Annotated[str, typer.Argument(metavar="SRC", help="A Hugging Face folder or hub model org/name.")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="Documents, chats or completions, as for training.")],
    target: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The file to write.")] = Path(
        "importance.json"
    ),
    samples: Annotated[int, typer.Option("--samples", metavar="N", help="Rows of tokens to measure on.")] = 64,
    length: Annotated[int, typer.Option("--length", metavar="N", help="Tokens of a row.")] = 512,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="Where layers run: cpu or cuda.")] = "cpu",
    dtype: Annotated[Dtype, typer.Option("--dtype", help="What layers run in.")] = Dtype.fp32,
    mapping: Mapping = None,
    *,
    output: Output,
) -> None:
    """Measure how much each layer, head, channel and expert matters.

    By what flows through it, as Minitron does; one layer in memory at a time.
    """
    output.configure()
    output.hush()
    from mbx.cli.source import fetch
    from mbx.train.importance import importance_of

    count = itertools.count()
    found = importance_of(
        fetch(src).path,
        data,
        target,
        samples=samples,
        length=length,
        device=device,
        dtype=dtype.in_torch,
        mapping=mapping,
        progress=lambda layers: out.detail(f"layer {next(count)} measured"),
    )
    layers = [] if found.layers is None else [float(score) for score in found.layers]
    order = sorted(range(len(layers)), key=lambda layer: layers[layer])
    least = ", ".join(map(str, order[: max(1, len(order) // 4)]))
    out.result(
        {"target": str(target), "layers": layers, "widths": sorted(found.widths)},
        lambda: [f"{target}: {', '.join(sorted(found.widths))}", f"layers that turn the stream least: {least}"],
    )
