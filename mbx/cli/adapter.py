"""`mbx convert adapter-to-mcore` and `adapter-to-hf`: LoRA and DoRA adapters, without their base's weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mbx.cli.convert import app
from mbx.cli.groups import grouped
from mbx.cli.layout_options import LayoutOptions
from mbx.cli.options import AllowUnusedKey, Mapping, Output, epilog
from mbx.cli.push import Pushing
from mbx.cli.running import Running, carry_out

if TYPE_CHECKING:
    from mbx.formats.adapter_folder import Base

__all__ = ["BaseModel", "adapter_to_hf", "adapter_to_mcore", "app", "find_base"]

BaseModel = Annotated[
    str | None,
    typer.Option("--base", metavar="BASE", help="The adapter's base, any kind; what the adapter names if not given."),
]


@app.command(
    "adapter-to-mcore",
    epilog=epilog(
        "mbx convert adapter-to-mcore ./lora lora-mcore --base ./llama --tp 2",
        "mbx convert adapter-to-mcore ./lora lora-mcore --base ckpt --fused",
    ),
)
@grouped
def adapter_to_mcore(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="A PEFT folder: LoRA or DoRA.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="The checkpoint folder to make.")],
    base: BaseModel = None,
    fused: Annotated[
        bool, typer.Option("--fused", help="One A for query, key and value (gate and up), which must be equal.")
    ] = False,
    *,
    layout: LayoutOptions,
    mapping: Mapping = None,
    allow_unused_key: AllowUnusedKey = None,
    running: Running,
    output: Output,
) -> None:
    """Convert a PEFT adapter to a Megatron checkpoint of adapters, as Megatron-Bridge names them.

    Of the base only the config is read. Query, key and value keep factors of their own (CanonicalLoRA) unless --fused.
    """
    output.configure()
    from mbx.run.adapters import plan_adapter_to_mcore

    options = replace(running.options(mapping), layout=layout.layout())
    model = find_base(src, base, mapping, tuple(allow_unused_key or ()))
    carry_out(lambda: plan_adapter_to_mcore(src, dst, options, model, fused=fused), running.dry_run)


@app.command(
    "adapter-to-hf",
    epilog=epilog(
        "mbx convert adapter-to-hf lora-mcore ./lora",
        "mbx convert adapter-to-hf bridge-lora ./lora --base meta-llama/Llama-3.2-1B",
        "mbx convert adapter-to-hf runs/llama32_1b_lora ./lora --base ./Llama-3.2-1B",
    ),
)
@grouped
def adapter_to_hf(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="A Megatron checkpoint of adapters, or a training run.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="The PEFT folder to make.")],
    base: BaseModel = None,
    mapping: Mapping = None,
    allow_unused_key: AllowUnusedKey = None,
    *,
    running: Running,
    pushing: Pushing,
    output: Output,
) -> None:
    """Convert a Megatron checkpoint of adapters to a PEFT folder.

    Reads what mbx, Megatron-Bridge and `mbx train` write. What came from PEFT through mbx comes back byte for byte.
    """
    output.configure()
    from mbx.run.adapters import plan_adapter_to_hf

    options = running.options(mapping)
    pushing.check()
    model = find_base(src, base, mapping, tuple(allow_unused_key or ()))
    carry_out(lambda: plan_adapter_to_hf(src, dst, options, model), running.dry_run)
    if not running.dry_run:
        pushing.after(dst)


def find_base(src: Path, base: str | None, mapping: str | None, allowed_keys: tuple[str, ...]) -> Base:
    """The base model that is named, or that the adapter names; its config only. UsageError where neither does."""
    from converters.errors import UsageError
    from mbx.cli.source import fetch
    from mbx.formats.adapter_folder import open_base, stated_base

    named = base or stated_base(src)
    if named is None:
        raise UsageError(f"`{src}` does not say which model it adapts", hint="name it: --base DIR")
    return open_base(fetch(named, weights=False).path, mapping, allowed_keys)
