"""Pipeline stages: which layers each pipeline rank and model chunk holds, as Megatron Core places them.

Sources: `get_num_layers_to_build`, `get_transformer_layer_offset` and `PipelineParallelLayerLayout` of
megatron-core 0.16.1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from converters.errors import LayoutError

_KINDS = "EtmL"
_MAX_LAYERS = 100_000


@dataclass(frozen=True, slots=True)
class Stage:
    """One model chunk: `layers` decoder layers from global layer `first` on, on pipeline rank `pp`, chunk `vpp`."""

    pp: int
    vpp: int
    first: int
    layers: int
    embedding: bool
    loss: bool
    mtp: int = 0


def parse_layout(text: str) -> list[str]:
    """Stages of a `pipeline_model_parallel_layout` such as "E|t*5|(tt|)*2m|L", one string of kinds each.

    E embedding, t decoder layer, m multi-token-prediction layer, L loss; commas are cosmetic. LayoutError on
    anything else.
    """
    flat = text.replace(",", "").replace(" ", "")
    for pattern in (r"\(([^()]+)\)\*(\d+)", r"([^()*\d])\*(\d+)"):
        while match := re.search(pattern, flat):
            count = int(match[2])
            if len(flat) + len(match[1]) * count > _MAX_LAYERS:
                raise LayoutError(f"‹pipeline-layout› {text!r} describes more than {_MAX_LAYERS} layers")
            flat = flat[: match.start()] + match[1] * count + flat[match.end() :]
    if wrong := sorted(set(flat) - set(_KINDS + "|")):
        raise LayoutError(
            f"‹pipeline-layout› {text!r}: {', '.join(map(repr, wrong))} is not a kind of layer",
            hint="E is the embedding, t a decoder layer, m a multi-token-prediction layer, L the loss; | ends a stage",
        )
    return flat.split("|")


def custom_stages(text: str, pp: int, num_layers: int, mtp_layers: int) -> tuple[Stage, ...]:
    """Stages of a layout string over `pp` ranks, in order of depth; LayoutError where it does not fit the model."""
    parts = parse_layout(text)
    if len(parts) % pp:
        raise LayoutError(f"‹pipeline-layout› has {len(parts)} stages; ‹pp› {pp} does not divide them")
    whole = "".join(parts)
    wanted = {"E": 1, "t": num_layers, "m": mtp_layers, "L": 1}
    wrong = [
        f"{whole.count(kind)} `{kind}`, {count} wanted" for kind, count in wanted.items() if whole.count(kind) != count
    ]
    if wrong:
        raise LayoutError(f"‹pipeline-layout› {text!r} has {wrong[0]}", details=wrong)
    if whole != "E" + "t" * num_layers + "m" * mtp_layers + "L":
        raise LayoutError(f"‹pipeline-layout› {text!r}: the order must be E, t…, m…, L")
    if len({number for number, part in enumerate(parts) if "m" in part}) > 1:
        raise LayoutError(
            f"‹pipeline-layout› {text!r}: Megatron Core keeps all multi-token-prediction layers in one stage"
        )
    stages, first = [], 0
    for number, part in enumerate(parts):
        layers = part.count("t")
        stages.append(Stage(number % pp, number // pp, first, layers, "E" in part, "L" in part, part.count("m")))
        first += layers
    return tuple(stages)


def even_stages(
    pp: int, vpp: int, num_layers: int, mtp_layers: int, first_layers: int | None, last_layers: int | None
) -> tuple[Stage, ...]:
    """Stages of equal depth, or with a first and last rank of their own depth, in order of depth.

    LayoutError names what does not divide and what would.
    """
    per_rank = _layers_per_rank(pp, num_layers, first_layers, last_layers)
    if vpp > 1 and pp == 2 and first_layers is not None and last_layers is not None:
        raise LayoutError(
            "Megatron Core cannot interleave two pipeline ranks whose layers are both given", hint="give one"
        )
    for rank, count in enumerate(per_rank):
        if count % vpp:
            raise LayoutError(
                f"‹vpp› {vpp} does not divide the {count} layers of pipeline rank {rank}{nearest(count, vpp, 'vpp')}"
            )
    stages, first = [], 0
    for chunk in range(vpp):
        for rank in range(pp):
            head, tail = (rank, chunk) == (0, 0), (rank, chunk) == (pp - 1, vpp - 1)
            layers = per_rank[rank] // vpp
            stages.append(Stage(rank, chunk, first, layers, head, tail, mtp_layers if tail else 0))
            first += layers
    return tuple(stages)


def _layers_per_rank(pp: int, num_layers: int, first: int | None, last: int | None) -> list[int]:
    if first is None and last is None:
        if num_layers % pp:
            low = -(-num_layers // pp)
            ends = _uneven_fit(pp, num_layers)
            raise LayoutError(
                f"‹pp› {pp} does not divide num_layers = {num_layers}{nearest(num_layers, pp, 'pp')}",
                hint=f"uneven stages work: {ends}"
                if ends
                else f"‹pipeline-layout› can place {low} or fewer in each stage",
            )
        return [num_layers // pp] * pp
    fixed = [count for count in (first, last) if count is not None]
    middle, rest = pp - len(fixed), num_layers - sum(fixed)
    if rest < 0 or (middle <= 0 and rest) or (middle > 0 and rest % middle):
        raise LayoutError(
            f"{' and '.join(map(str, fixed))} of {num_layers} layers at the ends: "
            + (f"that is {-rest} too many" if rest < 0 else f"{rest} are left, which {middle} stages cannot share")
        )
    inner = [rest // middle] * middle if middle > 0 else []
    return ([] if first is None else [first]) + inner + ([] if last is None else [last])


def _uneven_fit(pp: int, num_layers: int) -> str | None:
    """A last stage of its own depth with which `num_layers` divide."""
    for each in (-(-num_layers // pp), num_layers // pp):
        last = num_layers - each * (pp - 1)
        if each > 0 and last > 0:
            return f"‹decoder-last-pipeline-num-layers› {last}"
    return None


def nearest(size: int, asked: int, name: str) -> str:
    """A clause naming the divisor of `size` that is nearest to `asked`."""
    fits = [n for n in range(1, size + 1) if size % n == 0]
    if not fits:
        return ""
    return f"; the nearest that does is ‹{name}› {min(fits, key=lambda n: (abs(n - asked), n))}"
