"""Options that several commands share, spelt the same everywhere, and the foot of every help text."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mbx.cli import completions, settings
from mbx.cli.output import out

if TYPE_CHECKING:
    from mbx.cli.progress import Meter
    from mbx.proof.compare import Reading

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, errors included.")]
Quiet = Annotated[
    int, typer.Option("--quiet", "-q", count=True, show_default=False, help="No progress or messages; -qq: no result.")
]
Verbose = Annotated[
    int, typer.Option("--verbose", "-v", count=True, show_default=False, help="Say each step; no progress bar.")
]


Mapping = Annotated[
    str | None,
    typer.Option(
        "--mapping",
        metavar="TABLE",
        help="A table's name or .toml file; found by the config if not given.",
        autocompletion=completions.tables,
    ),
]
AllowUnusedKey = Annotated[
    list[str] | None,
    typer.Option("--allow-unused-key", metavar="NAME", help="Accept this unknown config.json key; repeatable."),
]
HfConfig = Annotated[
    str | None,
    typer.Option("--hf-config", metavar="DIR", help="config.json for a Megatron checkpoint that carries none."),
]
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Also write a report in one HTML file.")]
Workers = Annotated[
    str | None, typer.Option("--workers", metavar="N", help="Threads that read and write (default: cores, at most 8).")
]
MaxMemory = Annotated[
    str | None,
    typer.Option("--max-memory", metavar="SIZE", help="Memory for data in flight: 512MiB, 1GiB, 2G (default: 1GiB)."),
]


@dataclass(frozen=True)
class Output:
    """How a command speaks."""

    json: Json = False
    quiet: Quiet = 0
    verbose: Verbose = 0

    def configure(self) -> None:
        """Speak so from here on."""
        out.configure(json=self.json, quiet=self.quiet, verbose=self.verbose)

    def hush(self) -> None:
        """Keep the notices and bars of Megatron Core and Transformers off the screen; -v lets them through."""
        if not self.verbose:
            os.environ.setdefault("TQDM_DISABLE", "1")
            warnings.simplefilter("ignore")


@dataclass(frozen=True)
class Resources:
    """What a command that reads weights may use."""

    workers: Workers = None
    max_memory: MaxMemory = None

    @property
    def num_workers(self) -> int:
        """`workers`, settings and environment included; UsageError where it is no number."""
        return settings.number("workers", self.workers)

    @property
    def max_bytes(self) -> int:
        """`max_memory` likewise."""
        return settings.number("max_memory", self.max_memory)

    def reading(self, meter: Meter) -> Reading:
        """How a comparison reads both sides, `meter` being told of it."""
        from mbx.proof.compare import Reading

        return Reading(self.num_workers, self.max_bytes, meter.advance, meter.expect)


EXIT_CODES = (
    "0 ok, 1 checked and found a difference, 2 usage or config,",
    "3 unsupported architecture or incomplete table, 4 file or hub,",
    "5 memory, disk space or device, 70 internal, 130 interrupted",
)


class CodecChoice(str, Enum):
    """How an export stores products: as they are, as a quantised source had them, or quantised now."""

    plain = "plain"
    same = "same"
    fp8_block = "fp8_block"
    fp8_channel = "fp8_channel"
    fp8_tensor = "fp8_tensor"
    mxfp8 = "mxfp8"
    int8_channel = "int8_channel"
    int4_group = "int4_group"
    mxfp4 = "mxfp4"
    nvfp4 = "nvfp4"


#: The same in a help text.
CODEC_KINDS = f"plain; same, as a quantised source; quantised now: {', '.join([c.value for c in CodecChoice][2:])}"


Calibrate = Annotated[
    str | None,
    typer.Option(
        "--calibrate", metavar="FILE", help="What `mbx calibrate` measured for a new --codec, or data for it."
    ),
]


class Dtype(str, Enum):
    """What floating-point tensors are cast to."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"

    @property
    def in_torch(self) -> str:
        """The dtype's name in torch."""
        return {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[self.value]


def epilog(*examples: str) -> str:
    """The foot of a help text: examples to paste, and the exit codes. `\\b` keeps lines as they are."""
    lines = ["\b", "Examples:", *(f"  {line}" for line in examples), "", "\b", "Exit codes:"]
    return "\n".join([*lines, *(f"  {line}" for line in EXIT_CODES)])
