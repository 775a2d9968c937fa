"""`mbx convert prune`: a smaller model of one, layers and parts of widths left out."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mbx.cli import settings
from mbx.cli.convert import app
from mbx.cli.groups import grouped
from mbx.cli.layout_options import LayoutOptions, ModelClass, ToFormat
from mbx.cli.merge import Kind
from mbx.cli.options import AllowUnusedKey, HfConfig, Mapping, Output, epilog
from mbx.cli.running import Running, carry_out

if TYPE_CHECKING:
    from converters.pruning.choosing import Pruning

__all__ = ["app", "prune"]

_RANGE = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?", re.ASCII)
_MOST_LAYERS = 100_000


def _width(flag: str, what: str) -> object:
    return typer.Option(flag, metavar="N", help=what)


@dataclass(frozen=True)
class Sizes:
    """What is left of a model."""

    layers: Annotated[
        str | None, typer.Option("--layers", metavar="A-B,C", help="The decoder layers that stay, counted from 0.")
    ] = None
    keep_layers: Annotated[int | None, _width("--keep-layers", "How many layers stay.")] = None
    hidden: Annotated[int | None, _width("--hidden", "Width of the residual stream.")] = None
    ffn: Annotated[int | None, _width("--ffn", "Width of a dense MLP.")] = None
    expert_ffn: Annotated[int | None, _width("--expert-ffn", "Width of an expert.")] = None
    shared_ffn: Annotated[int | None, _width("--shared-ffn", "Width of the shared experts together.")] = None
    heads: Annotated[int | None, _width("--heads", "Query heads.")] = None
    kv_heads: Annotated[
        int | None, _width("--kv-heads", "Key heads (default: as many as there are, where --heads allows).")
    ] = None
    experts: Annotated[int | None, _width("--experts", "Experts of a layer.")] = None
    drop_mtp: Annotated[bool, typer.Option("--drop-mtp", help="Leave multi-token-prediction layers out.")] = False

    def pruning(self) -> Pruning:
        """The same for `plan_prune`; UsageError for layers that are no ranges of numbers."""
        from converters.pruning.choosing import Pruning

        said = {name: getattr(self, name) for name in ("keep_layers", "hidden", "ffn", "expert_ffn", "shared_ffn")}
        said |= {name: getattr(self, name) for name in ("heads", "kv_heads", "experts", "drop_mtp")}
        return Pruning(layers=None if self.layers is None else _numbers(self.layers), **said)


def _numbers(text: str) -> tuple[int, ...]:
    """`0-2,5` as 0, 1, 2, 5."""
    from converters.errors import UsageError

    out: list[int] = []
    for part in text.replace(" ", "").split(","):
        found = _RANGE.fullmatch(part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, _MOST_LAYERS)
        if last >= _MOST_LAYERS or len(out) > _MOST_LAYERS:
            raise UsageError(f"‹layers› {text[:100]}: ranges such as 0-20,24-31 were expected")
        out += range(first, last + 1)
    return tuple(out)


@app.command(
    "prune",
    epilog=epilog(
        "mbx convert prune ./llama ./shallow --layers 0-20,24-31",
        "mbx convert prune ./llama ./narrow --ffn 8192 --heads 24 --by imp.json",
        "mbx convert prune ckpt ckpt-small --keep-layers 24 --by imp.json --tp 2",
        "mbx convert prune ./qwen ./small --experts 96 --by imp.json --dry-run",
    ),
)
@grouped
def prune(
    src: Annotated[str, typer.Argument(metavar="SRC", help="A folder, hub model org/name or checkpoint.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="The folder to make.")],
    by: Annotated[
        Path | None, typer.Option("--by", metavar="FILE", help="What `mbx importance` measured: which parts stay.")
    ] = None,
    to: Annotated[Kind | None, typer.Option("--to", help="What to make (default: what SRC is).")] = None,
    format: ToFormat = "torch_dist",
    model_class: ModelClass = None,
    *,
    sizes: Sizes,
    layout: LayoutOptions,
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Largest weight file of a Hugging Face folder (default: 5GB).")
    ] = None,
    mapping: Mapping = None,
    allow_unused_key: AllowUnusedKey = None,
    hf_config: HfConfig = None,
    running: Running,
    output: Output,
) -> None:
    """Leave layers and parts of widths out of a model.

    What stays is taken over as it is. The result computes what SRC does with the rest masked; train it on.
    """
    output.configure()
    from mbx.cli.source import fetch
    from mbx.run.importance_file import read_importance
    from mbx.run.prune import plan_prune

    pruning = sizes.pruning()
    options = replace(
        running.options(mapping),
        layout=layout.layout(),
        format=format,
        model_class=model_class,
        max_shard_bytes=settings.number("max_shard_size", max_shard_size),
        allow_unused_keys=tuple(allow_unused_key or ()),
    )
    importance = None if by is None else read_importance(by)
    source = fetch(src).path
    reference = None if hf_config is None else fetch(hf_config, weights=False).path
    target = to and to.value
    carry_out(
        lambda: plan_prune(source, dst, pruning, options, importance=importance, to=target, hf_config=reference),
        running.dry_run,
    )
