"""What `mbx train --dry-run` says of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from converters.errors import UnsupportedError
from mbx.cli.data_view import data_document, data_lines
from mbx.cli.output import out
from mbx.text import human_count

if TYPE_CHECKING:
    from mbx.train.run.prepare import Prepared


def show_plan(prepared: Prepared) -> None:
    """Print where the run starts, its data, processes and memory, and what would lower that."""
    from mbx.train.budget.predict import lines, predict, suggestions
    from mbx.train.model.graphs import why_not

    recipe, ranks, plan = prepared.recipe, prepared.ranks, prepared.plan
    p, t = recipe.parallel, recipe.train
    axes = ", ".join(f"{axis} {getattr(p, axis)}" for axis in ("tp", "pp", "vpp", "cp", "ep", "etp"))
    said = [
        prepared.start.why,
        f"{t.steps} steps of {t.global_batch} x {recipe.data.length} tokens in {t.precision}"
        + (
            ""
            if recipe.fp8.recipe == "none"
            else f", {'FP4' if recipe.fp8.recipe == 'nvfp4' else 'FP8'} {recipe.fp8.recipe}"
        ),
        *data_lines(prepared),
        f"{ranks.world_size} process(es) on {ranks.device}: {axes}, dp {ranks.dp}",
    ]
    ungraphed = why_not(recipe, plan.config, ranks)
    if ranks.device == "cuda":
        said.append(f"CUDA graph: {'on' if ungraphed is None else f'off: {ungraphed}'}")
        said += _word_on_fp8(prepared)
    memory: dict[str, object]
    looks = prepared.looks
    if looks is not None:
        said.append(f"images: a tower of {human_count(looks.parameters)} weights, {t.tower}, on the first stage")
    if recipe.distill.teacher:
        said.append(f"teacher: {_word_on_teacher(prepared)}")
    try:
        budget = predict(recipe, plan, ranks.dp, looks)
    except UnsupportedError as error:
        memory = {"memory_unknown": error.fact}
        said.append(error.fact)
    else:
        c = budget.counts
        memory = {
            "parameters": c.base,
            "adapters": c.adapters,
            "trained_whole": c.whole,
            "memory_bytes": dict(budget.parts),
            "memory_total_bytes": budget.total,
            "tower_parameters": 0 if looks is None else looks.parameters,
        }
        adapters = f", {human_count(c.adapters)} of adapters" if c.adapters else ""
        adapters += f", {human_count(c.whole)} of the weights trained whole" if c.whole else ""
        said.append(f"{human_count(c.base)} weights a rank{adapters}")
        said += lines(budget, suggestions(recipe, plan, ranks.dp, looks))
    place = {"start": prepared.start.why, "world_size": ranks.world_size, "dp": ranks.dp, "device": ranks.device}
    place["cuda_graph"] = ungraphed is None
    out.result({**place, "data": data_document(prepared), **memory, "recipe": recipe.to_dict()}, lambda: said)


def _word_on_teacher(prepared: Prepared) -> str:
    """Who teaches, and what is learned of it."""
    d, logits = prepared.recipe.distill, prepared.logits
    where = ", frozen, on these ranks" if logits is None else f", words of {logits.facts.teacher} on disk"
    kept = d.top_k if logits is None else logits.facts.top_k
    heard = f"its {kept} likeliest tokens and the rest as one" if kept else "its whole distribution"
    heard += f", at temperature {d.temperature:g}, weighs {d.weight:g}"
    own = f", the data's own loss {1 - d.weight:g}" if d.weight < 1 else ""
    return f"{d.teacher}{where}; {heard}{own}{_word_on_hidden(prepared)}"


def _word_on_hidden(prepared: Prepared) -> str:
    """Whose hidden states are compared, the student's layer in front of the teacher's."""
    from mbx.train.model.hidden import pairs_of

    teacher, d = prepared.teacher, prepared.recipe.distill
    if teacher is None or not (pairs := pairs_of(prepared.recipe, prepared.plan, teacher)):
        return ""
    which = ", ".join(f"{pair.student}:{pair.teacher}" for pair in pairs)
    own, its = pairs[0].widths
    learned = f", by learned projections from {own} to {its}" if own != its else ""
    return f"; hidden states ({d.hidden_loss}) of layers {which} weigh {d.hidden_weight:g}{learned}"


def _word_on_fp8(prepared: Prepared) -> list[str]:
    """A warning where FP8 is estimated to cost time on this GPU."""
    import torch

    from mbx.train.budget.devices import seen_as
    from mbx.train.budget.speed import fp8_does_not_pay

    device = seen_as(torch.cuda.get_device_name(prepared.ranks.local_rank))
    if device is None or prepared.recipe.fp8.recipe == "none":
        return []
    try:
        word = fp8_does_not_pay(prepared.recipe, prepared.plan, device, prepared.ranks.dp)
    except UnsupportedError:  # a model that the budget does not cover, which is said in its place
        return []
    return [word] if word else []
