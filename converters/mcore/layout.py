"""A parallel layout: which box of each parameter a rank holds, and what does not fit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from converters.errors import LayoutError
from converters.mcore.keys import bare
from converters.mcore.pipeline import Stage, custom_stages, even_stages, nearest
from converters.mcore.releases import CURRENT
from converters.rows.expr import Value
from converters.rows.ops import Form

#: What the last pipeline stage holds beside its layers.
_LAST = ("output_layer.", *CURRENT.final_norm.values())


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of the parallel axes, by Megatron's names.

    `vocab_divisor` is make-vocab-size-divisible-by. `vpp` is the number of model chunks a pipeline rank holds.
    `etp` is the tensor-parallel size of experts, None for that of everything else. `pipeline` is a
    pipeline_model_parallel_layout such as "E|t*5|t,m,L"; `first_stage` and `last_stage` are the layers of the
    first and last pipeline rank where they differ from the others'.
    """

    tp: int = 1
    pp: int = 1
    vocab_divisor: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int | None = None
    pipeline: str | None = None
    first_stage: int | None = None
    last_stage: int | None = None

    def padded_vocab(self, vocab: int) -> int:
        """Rows of the embedding: `vocab` rounded up to a multiple of `vocab_divisor * tp`."""
        multiple = self.vocab_divisor * self.tp
        return -(-vocab // multiple) * multiple

    @property
    def expert_tp(self) -> int:
        """Ranks that an expert is cut over."""
        return self.tp if self.etp is None else self.etp

    @property
    def stage_ranks(self) -> int:
        """Ranks of the smallest pipeline stage that holds every dense and every expert shard."""
        return math.lcm(self.tp, self.ep * self.expert_tp)

    def stages(self, num_layers: int, mtp_layers: int = 0) -> tuple[Stage, ...]:
        """Model chunks in order of depth; LayoutError where the layers do not come out even."""
        if self.pipeline is not None:
            return custom_stages(self.pipeline, self.pp, num_layers, mtp_layers)
        return even_stages(self.pp, self.vpp, num_layers, mtp_layers, self.first_stage, self.last_stage)


@dataclass(frozen=True, slots=True)
class Box:
    """Rows `[row, row + rows)` and columns `[col, col + cols)` of a parameter seen as a matrix, on `rank`."""

    rank: int
    row: int
    rows: int
    col: int
    cols: int


class RankMap:
    """Which file of a torch_dist checkpoint a shard goes to: the first global rank that would save it."""

    def __init__(self, layout: Layout, config: Mapping[str, Value]) -> None:
        self.layout = layout
        layers, mtp = count_of(config, "num_layers"), count_of(config, "mtp_num_layers")
        self.num_experts = count_of(config, "num_moe_experts")
        self._stage_of: dict[int, int] = {}
        stages = layout.stages(layers, mtp) if layers else ()
        for stage in stages:
            self._stage_of.update(dict.fromkeys(range(stage.first, stage.first + stage.layers), stage.pp))
        self._mtp_stage = next((stage.pp for stage in stages if stage.mtp), 0)
        self._last = next((stage.pp for stage in stages if stage.loss), 0)

    def rank(self, key: str, layer: int | None, expert: int | None, shard: int) -> int:
        """Rank of tensor-parallel shard `shard` of a parameter; `layer` and `expert` are None where it has none."""
        if layer is not None:
            stage = self._stage_of.get(layer, 0)
        elif (own := bare(key)).startswith("mtp."):
            stage = self._mtp_stage
        else:
            stage = self._last if own.startswith(_LAST) else 0
        if expert is not None:
            shard += expert // max(1, self.num_experts // self.layout.ep) * self.layout.expert_tp
        return stage * self.layout.stage_ranks + shard


def check(layout: Layout, config: Mapping[str, Value], parts: Mapping[str, Mapping[str, Value]] | None = None) -> None:
    """Refuse a layout that the model of `config` cannot take; LayoutError gives every reason.

    `parts` are the fields of what stands beside the text model and is cut too, by name.
    """
    sizes = (
        ("tp", layout.tp),
        ("pp", layout.pp),
        ("vpp", layout.vpp),
        ("ep", layout.ep),
        ("etp", layout.expert_tp),
        ("make-vocab-size-divisible-by", layout.vocab_divisor),
    )
    reasons = [f"‹{name}› {size}: must be at least 1" for name, size in sizes if size < 1]
    if reasons:
        raise LayoutError(f"this layout does not fit the model: {reasons[0]}", details=reasons[1:])
    hint = None
    if layout.vpp > 1 and layout.pp == 1:
        reasons.append(f"‹vpp› {layout.vpp} interleaves pipeline stages, and ‹pp› is 1")
    if layout.pipeline is not None and (layout.vpp > 1 or layout.first_stage or layout.last_stage):
        reasons.append(
            "‹pipeline-layout› places every layer: it goes with neither ‹vpp› nor uneven first and last stages"
        )
    if layout.pp > 1 and config.get("num_joint_layers"):
        reasons.append(f"‹pp› {layout.pp}: FLUX has no pipeline; each rank of Megatron-Bridge has all blocks")
    if (layers := config.get("num_layers")) and isinstance(layers, int):
        try:
            layout.stages(layers, count_of(config, "mtp_num_layers"))
        except LayoutError as error:
            reasons.append(error.fact)
            hint = error.hint
    reasons += _width_reasons(layout, config)
    for part, fields in (parts or {}).items():
        for field in ("num_attention_heads", "ffn_hidden_size"):
            if (size := count_of(fields, field)) % layout.tp:
                reasons.append(
                    f"‹tp› {layout.tp} does not divide {part}.{field} = {size}{nearest(size, layout.tp, 'tp')}"
                )
    if reasons:
        raise LayoutError(f"this layout does not fit the model: {reasons[0]}", hint=hint, details=reasons[1:])


def _width_reasons(layout: Layout, config: Mapping[str, Value]) -> list[str]:
    """Widths and counts that a parallel size does not divide."""
    experts, shared = config.get("num_moe_experts"), config.get("moe_shared_expert_intermediate_size")
    layers = config.get("num_layers") or config.get("num_joint_layers") or config.get("num_single_layers")
    wanted: list[tuple[str, int, str]] = [("tp", layout.tp, "num_attention_heads")]
    if not config.get("multi_latent_attention"):
        wanted.append(("tp", layout.tp, "num_query_groups"))
    if shared:
        wanted.append(("tp", layout.tp, "moe_shared_expert_intermediate_size"))
    if not experts or config.get("moe_layer_freq") not in (None, 1):
        wanted.append(("tp", layout.tp, "ffn_hidden_size"))
    reasons = []
    if experts:
        width = "moe_ffn_hidden_size" if config.get("moe_ffn_hidden_size") else "ffn_hidden_size"
        wanted += [("ep", layout.ep, "num_moe_experts"), ("etp", layout.expert_tp, width)]
    elif layout.ep > 1 and layers:
        reasons.append(f"‹ep› {layout.ep}: this model has no experts")
    elif layout.expert_tp not in (1, layout.tp) and layers:
        reasons.append(f"‹etp› {layout.expert_tp}: this model has no experts")
    for name, asked, field in wanted:
        size = config.get(field)
        if field == "num_query_groups" and isinstance(size, int) and size > 0 and not asked % size:
            continue  # ranks share a group: they gather its rows, which are cut between them like any others
        if isinstance(size, int) and size % asked:
            others = [config.get(other) for axis, _, other in wanted if axis == name]
            common = math.gcd(*(other for other in others if isinstance(other, int)))
            reasons.append(f"‹{name}› {asked} does not divide {field} = {size}{nearest(common, asked, name)}")
    return reasons


def count_of(config: Mapping[str, Value], field: str) -> int:
    """A config's whole number; 0 where it states none."""
    value = config.get(field)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def boxes(name: str, form: Form, rows: int, cols: int, tp: int) -> Iterator[Box]:
    """Boxes in which `tp` ranks hold a parameter of `rows` (padding included) by `cols`.

    Atoms that lie side by side are cut one by one, as Megatron Core's own shards are; grouped atoms are cut
    between groups, or within them where each group is shared by as many ranks as any other (attention with fewer
    key and value heads than ranks). LayoutError where tp divides neither.
    """
    if form.cut is None or tp == 1:
        yield Box(0, 0, rows, 0, cols)
        return
    if form.cut == 1:
        for rank in range(tp):
            yield Box(rank, 0, rows, rank * _cut(name, cols, tp, "columns"), _cut(name, cols, tp, "columns"))
        return
    if form.mcore_groups > 1 and not form.columns and tp % form.mcore_groups:
        _cut(name, form.mcore_groups, tp, "groups")
    whole = form.mcore_groups > 1 or len(form.atoms) == 1
    row = 0
    for size in (rows,) if whole else (form.atoms[i] for i in form.order()):
        part = _cut(name, size, tp, "rows")
        for rank in range(tp):
            yield Box(rank, row + rank * part, part, 0, cols)
        row += size


def _cut(name: str, size: int, tp: int, what: str) -> int:
    if size % tp:
        raise LayoutError(f"‹tp› {tp} does not divide the {size} {what} of `{name}`{nearest(size, tp, 'tp')}")
    return size // tp
