"""`mbx convert`: between Hugging Face and Megatron Core, either way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mbx.cli import settings
from mbx.cli.calibrate import calibration_of
from mbx.cli.groups import grouped
from mbx.cli.imports import import_numpy
from mbx.cli.layout_options import Flavour, LayoutOptions, ModelClass, ToFormat
from mbx.cli.options import (
    CODEC_KINDS,
    AllowUnusedKey,
    Calibrate,
    CodecChoice,
    Dtype,
    Mapping,
    Output,
    epilog,
)
from mbx.cli.push import Pushing
from mbx.cli.running import Running, carry_out

if TYPE_CHECKING:
    from mbx.run.job import Options

app = typer.Typer(
    help="Convert checkpoints, as a stream and all or nothing.",
    no_args_is_help=True,
    rich_markup_mode=None,
    epilog=epilog("mbx convert hf-to-mcore SRC DST --tp 2", "mbx convert mcore-to-hf SRC DST --dry-run"),
)


ToDtype = Annotated[
    Dtype | None, typer.Option("--dtype", help="Cast floats to this; each tensor keeps its own if not given.")
]
AllowMissing = Annotated[
    list[str] | None,
    typer.Option("--allow-missing", metavar="GLOB", help="Accept that these tensors are absent; repeatable."),
]
AllowUnused = Annotated[
    list[str] | None,
    typer.Option("--allow-unused", metavar="GLOB", help="Leave these source tensors out; repeatable."),
]


@dataclass(frozen=True)
class Coverage:
    """The table that covers a model, and what it may leave open."""

    mapping: Mapping = None
    allow_missing: AllowMissing = None
    allow_unused: AllowUnused = None
    allow_unused_key: AllowUnusedKey = None

    def options(self, running: Running) -> Options:
        """The options of a conversion that runs as `running` says."""
        from converters.rows.coverage import Waivers

        return replace(
            running.options(self.mapping),
            waivers=Waivers(tuple(self.allow_missing or ()), tuple(self.allow_unused or ())),
            allow_unused_keys=tuple(self.allow_unused_key or ()),
        )


@app.command(
    "hf-to-mcore",
    epilog=epilog(
        "mbx convert hf-to-mcore meta-llama/Llama-3.2-1B ckpt",
        "mbx convert hf-to-mcore ./llama ckpt --tp 2 --pp 4 --dry-run",
        "mbx convert hf-to-mcore ./mine ckpt --mapping ./mine.toml --json",
    ),
)
@grouped
def hf_to_mcore(
    src: Annotated[str, typer.Argument(metavar="SRC", help="A Hugging Face folder or hub model org/name[@revision].")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="The checkpoint folder to make.")],
    format: ToFormat = "torch_dist",
    model_class: ModelClass = None,
    flavour: Flavour = None,
    *,
    layout: LayoutOptions,
    dtype: ToDtype = None,
    make_vocab_size_divisible_by: Annotated[
        int, typer.Option(metavar="N", help="Pad the vocabulary with zero rows to a multiple of N x TP.")
    ] = 1,
    coverage: Coverage,
    running: Running,
    output: Output,
) -> None:
    """Convert a Hugging Face model to a Megatron Core checkpoint.

    Any parallel layout can load torch_dist; the sizes choose how its files are cut. `torch` loads at its own only.
    """
    output.configure()
    import_numpy()
    from mbx.cli.source import fetch, stop_before_download
    from mbx.run.job import plan_hf_to_mcore

    options = replace(
        coverage.options(running),
        dtype=dtype and dtype.value,
        layout=layout.layout(make_vocab_size_divisible_by),
        format=format,
        model_class=model_class,
        flavour=flavour,
    )
    _check_target(options)
    if running.dry_run:
        stop_before_download(src)
    source = fetch(src)
    carry_out(lambda: plan_hf_to_mcore(source.path, dst, options, source.origin), running.dry_run)


@app.command(
    "mcore-to-hf",
    epilog=epilog(
        "mbx convert mcore-to-hf ckpt ./llama",
        "mbx convert mcore-to-hf ckpt/iter_0001000 ./llama --hf-config ./original",
        "mbx convert mcore-to-hf ckpt ./llama --dtype bf16 --dry-run",
        "mbx convert mcore-to-hf ckpt ./deepseek --codec same",
        "mbx convert mcore-to-hf ckpt ./llama-fp8 --codec fp8_block",
        "mbx convert mcore-to-hf ckpt ./w8a8 --codec fp8_tensor --calibrate my.cal",
    ),
)
@grouped
def mcore_to_hf(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="A Megatron checkpoint, or one iter_* folder of it.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="The Hugging Face folder to make.")],
    hf_config: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Take config.json and tokenizer from here, not from the checkpoint's hf/."),
    ] = None,
    dtype: ToDtype = None,
    codec: Annotated[
        CodecChoice,
        typer.Option("--codec", metavar="KIND", help=f"How products are stored: {CODEC_KINDS}."),
    ] = CodecChoice.plain,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Modules that a --codec chosen now leaves alone: '*.layers.0.*'."),
    ] = None,
    calibrate: Calibrate = None,
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Largest weight file, where none is recorded (default: 5GB).")
    ] = None,
    *,
    coverage: Coverage,
    running: Running,
    pushing: Pushing,
    output: Output,
) -> None:
    """Convert a Megatron Core checkpoint, torch_dist or legacy, to a Hugging Face model.

    A checkpoint that mbx made carries the config, the tokenizer and the original file layout in its hf/ folder.
    """
    output.configure()
    import_numpy()
    from mbx.cli.source import fetch
    from mbx.run.commit import check_target
    from mbx.run.job import plan_mcore_to_hf

    options = replace(
        coverage.options(running),
        dtype=dtype and dtype.value,
        codec=codec.value,
        exclude=tuple(exclude or ()),
        max_shard_bytes=settings.number("max_shard_size", max_shard_size),
    )
    pushing.check()
    reference = fetch(hf_config, weights=False).path if hf_config is not None else None
    if calibrate is not None:
        check_target(dst, [src, reference], overwrite=options.overwrite)  # before minutes of measuring
        measured = calibration_of(
            calibrate, src, options.codec, options.mapping, reference, measure=not running.dry_run
        )
        options = replace(options, calibration=measured)
    carry_out(lambda: plan_mcore_to_hf(src, dst, options, reference), running.dry_run)
    if not running.dry_run:
        pushing.after(dst, src if dtype is None and codec is CodecChoice.plain and hf_config is None else None)


def _check_target(options: Options) -> None:
    """Refuse impossible choices before a hub model is downloaded; what the model cannot take is the plan's matter."""
    from converters.mcore.layout import check
    from mbx.formats.registry import format_named

    check(options.layout, {})
    format_named(options.format, "mcore")
