"""The models of a run at its start: every chunk with its weights, what trains of it, the tower and the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mbx.train.checkpoints.state import LoopState, read_state
from mbx.train.distill.hidden import Hidden, project
from mbx.train.distill.live import LiveTeacher
from mbx.train.distill.teaching import Teaching
from mbx.train.lora.attach import attach, base_of
from mbx.train.lora.peft_folder import by_weight, load_peft, open_for
from mbx.train.lora.whole import load_whole
from mbx.train.model import build as models
from mbx.train.model.hidden import pairs_of
from mbx.train.model.sight import Seeing
from mbx.train.model.trained_whole import whole_layers
from mbx.train.model.warmup import warm_up
from mbx.train.model.weights import load_weights
from mbx.train.recipe.sections import LORA
from mbx.train.run.log import Log
from mbx.train.run.prepare import Prepared

if TYPE_CHECKING:
    from torch import nn

    from mbx.models.megatron.core.beside import Beside
    from mbx.models.megatron.core.training import DistributedDataParallel


@dataclass(frozen=True, slots=True)
class Begun:
    """A run's model, not yet wrapped. `beside` takes the losses that are not the label's, `seeing` has the tower.

    `resumed`: the loop's state in the checkpoint that is continued. `base`: where the run's first weights came from,
    absolute: an adapter run reads its base there again, from wherever it is resumed or merged.
    """

    networks: Sequence[nn.Module]
    beside: Beside
    seeing: Seeing | None
    resumed: LoopState | None
    base: str


def begin(prepared: Prepared, log: Log) -> Begun:
    """Build this rank's chunks, with its weights read straight from their storage. Collective."""
    from mbx.models.megatron.core.beside import Beside

    recipe, plan, ranks = prepared.recipe, prepared.plan, prepared.ranks
    source, how = prepared.start.path, prepared.start.how
    resumed = read_state(source) if source and how == "resume" else None
    base = resumed.base if resumed else str(source.absolute() if source else "")
    warm_up(recipe, plan, ranks)
    networks, beside = models.build(recipe, plan, ranks), Beside()
    for bare in map(models.unwrap, networks):
        beside.watch(bare)
        if source and how == "init":
            log.message(load_weights(bare, plan, source))
        if recipe.lora.rank:
            _adapt(bare, prepared, resumed, log)
        if prepared.teacher is not None:
            project(bare, pairs_of(recipe, plan, prepared.teacher), recipe.train.seed)
        models.settle_frozen(recipe, bare, ranks)
    return Begun(networks, beside, _seeing(prepared, networks, resumed, base), resumed, base)


def _adapt(bare: nn.Module, prepared: Prepared, resumed: LoopState | None, log: Log) -> None:
    """Put adapters on a chunk, with the values of the one that the run begins with."""
    recipe, plan = prepared.recipe, prepared.plan
    given = str(prepared.start.path) if resumed else recipe.lora.adapter
    known = recipe.lora.method == LORA  # another is read with the rest of the checkpoint
    adapter = open_for(plan, Path(given)) if given and plan.table and known else None
    method = prepared.hooks.method(recipe.lora.method)
    attach(bare, recipe.lora, plan, recipe.train.seed, by_weight(adapter) if adapter else None, method)
    if resumed:  # the frozen base is in no checkpoint of an adapter run
        log.message(load_weights(bare, plan, base_of(resumed.base)))
    elif adapter:
        load_peft(bare, adapter)
        load_whole(bare, plan, adapter, whole_layers(recipe.lora, plan))


def _seeing(prepared: Prepared, networks: Sequence[nn.Module], resumed: LoopState | None, base: str) -> Seeing | None:
    """The tower of a run whose rows show images."""
    recipe, plan, eyes = prepared.recipe, prepared.plan, prepared.data.eyes
    if eyes is None:
        return None
    seeing = Seeing(eyes.sight, recipe, plan, prepared.ranks.device, base)
    if (begun := recipe.lora.adapter) and not resumed:
        seeing.begin(open_for(plan, Path(begun)))
    seeing.join(models.unwrap(networks[0]))
    return seeing


def taught(prepared: Prepared, chunks: Sequence[DistributedDataParallel], log: Log) -> Teaching | None:
    """What joins the chunks of a student with its teacher; None without one. Collective."""
    if not prepared.recipe.distill.teacher:
        return None
    recipe, plan, teacher, hidden = prepared.recipe, prepared.plan, None, None
    if prepared.teacher is not None:
        teacher = LiveTeacher(prepared.teacher, prepared.ranks)
        for line in teacher.said:
            log.message(line)
        if pairs := pairs_of(recipe, plan, prepared.teacher):
            hidden = Hidden(recipe, pairs, chunks, teacher.chunks)
    return Teaching(recipe, plan, chunks, teacher, hidden)


def flops_of(prepared: Prepared) -> float:
    """Floating-point operations of a run's token, its teacher's pass included."""
    plan, length = prepared.plan, prepared.recipe.data.length
    own = models.flops_per_token(plan.config, length, plan.padded_vocab, prepared.recipe.lora.rank > 0)
    if prepared.teacher is None:
        return own
    its = prepared.teacher.plan
    return own + models.flops_per_token(its.config, length, its.padded_vocab, False) / 3  # a forward pass alone
