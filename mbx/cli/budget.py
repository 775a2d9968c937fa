"""`mbx budget`: the memory a recipe needs on each rank, before anything runs, and whether a GPU has it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from converters.errors import UsageError
from mbx.cli import completions
from mbx.cli.groups import grouped
from mbx.cli.options import Html, Output, epilog
from mbx.cli.output import out
from mbx.cli.recipes import RecipeName, named
from mbx.cli.source import fetch
from mbx.text import aligned

if TYPE_CHECKING:
    from mbx.train.budget.devices import Device
    from mbx.train.budget.fit import Fit
    from mbx.train.recipe.sections import Recipe

EPILOG = epilog(
    "mbx budget llama3_8b_lora",
    "mbx budget llama3_8b_sft --world-size 8 parallel.tp=2",
    'mbx budget qwen3_8b_lora --device "24 GB"',
    "mbx budget ./Llama-3.2-1B --method sft --device gb10",
    "mbx budget qwen3_14b_lora --device h100 --world-size 2 --fit",
)
#: How many of the settings that fit are shown.
_SHOWN = 8
#: A hub model: `org/name`, perhaps `@revision`; a recipe's file ends in .toml.
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?<!\.toml)(@[\w./-]+)?")


@dataclass(frozen=True)
class Asked:
    """What to plan for."""

    recipe: RecipeName = None
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="NAME",
            help="How a folder's model is trained: lora, dora, sft, pretrain.",
            autocompletion=completions.methods,
        ),
    ] = "lora"
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="GPU",
            help="Does it fit? h100, rtx4090, gb10, …, or 24 GB.",
            autocompletion=completions.devices,
        ),
    ] = None
    fit: Annotated[
        bool, typer.Option("--fit", help="Search the fastest settings that fit the device, by an estimate.")
    ] = False
    world_size: Annotated[
        int | None, typer.Option("--world-size", metavar="N", help="Number of GPUs (default: the fewest possible).")
    ] = None


@grouped
def budget(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE|HF] [KEY=VALUE]...",
            help="A recipe, a model's folder or its hub id; overrides.",
            autocompletion=completions.recipe_words,
        ),
    ] = None,
    *,
    asked: Asked,
    html: Html = None,
    output: Output,
) -> None:
    """Predict the peak memory of a rank, by part, whether a GPU has it, and what would lower it."""
    output.configure()
    from mbx.train.budget.devices import device_of
    from mbx.train.budget.fit import fit, search, variants
    from mbx.train.budget.host import host_memory, total
    from mbx.train.budget.predict import CONTEXT, GIB, lines, predict, stages, suggestions
    from mbx.train.model.blueprint import blueprint
    from mbx.train.recipe.world import check_world, smallest_world

    chosen = _recipe(asked, words or [])
    if asked.fit and asked.device is None:
        raise UsageError("‹fit› needs a device to fit", hint="‹device› names one, such as h100")
    world = smallest_world(chosen) if asked.world_size is None else asked.world_size
    dp, plan = check_world(chosen, world), blueprint(chosen)
    found, tips = predict(chosen, plan, dp), suggestions(chosen, plan, dp)
    host = host_memory(chosen, found)
    ranks = stages(chosen, plan, dp)
    document: dict[str, object] = {
        "recipe": chosen.name,
        "stage": found.stage,
        "parameters": found.counts.base,
        "adapters": found.counts.adapters,
        "bytes": dict(found.parts),
        "total_bytes": found.total,
        "stages_bytes": [rank.total for rank in ranks],
        "context_bytes": CONTEXT,
        "host_bytes": host,
        "suggestions": [{"override": name, "saves_bytes": saved} for name, saved in tips],
    }
    said = [f"{chosen.name}: {_setting(chosen, world)}", *lines(found, [] if asked.device else tips)]
    if len(ranks) > 1:
        said.append("by stage: " + ", ".join(f"{rank.total / GIB:.2f}" for rank in ranks) + " GiB")
    said.append(f"{'host':<20}{total(host) / GIB:8.2f} GiB a process")
    if asked.device is not None:
        device = device_of(asked.device)
        here = fit(chosen, plan, device, dp)
        changed = variants(chosen, device, world)
        document["device"] = {"name": device.name, "memory_bytes": device.memory, "unified": device.unified}
        document |= {"fits": here.verdict, "needed_bytes": here.needed, "gpus": world}
        document["variants"] = [_record(one) for one in changed]
        said += _answer(here, device, world, changed)
        if asked.fit:
            fast = search(chosen, device, world)
            document["fastest"] = [_record(one) for one in fast[:_SHOWN]]
            said += _fastest(fast, world, device)
    if html is not None:
        from mbx.page import write
        from mbx.train.budget.page import budget_page

        write(html, budget_page(_setting(chosen, world), document))
    out.result(document, lambda: said)


def _recipe(asked: Asked, words: list[str]) -> Recipe:
    from mbx.train.recipe.catalogue import load_recipe, recipe_of_folder

    name, overrides = named(asked.recipe, words)
    if Path(name).is_dir() or _HUB_ID.fullmatch(name):
        return recipe_of_folder(str(fetch(name, weights=False).path), asked.method, overrides)
    return load_recipe(name, overrides)


def _setting(recipe: Recipe, world: int) -> str:
    t = recipe.train
    gpus = f"{world} GPU{'s' if world > 1 else ''}"
    return f"{gpus}, {t.micro_batch} x {recipe.data.length} tokens at once, {t.global_batch} rows a step"


def _answer(here: Fit, device: Device, world: int, changed: list[Fit]) -> list[str]:
    from mbx.train.budget.fit import MARGIN
    from mbx.train.budget.predict import GIB

    fits = {"yes": "yes", "barely": f"barely: nothing is left for an error of {MARGIN:.0%}", "no": "no"}[here.verdict]
    shared = "; the processor's share of the same memory counted" if device.unified else ""
    room = f"{here.needed / GIB:.1f} of {device.memory / GIB:.1f} GiB a GPU{shared}"
    said = ["", f"fits {world} x {device.name}: {fits} ({room})"]
    rows = [("what to change", "GiB", "saves", "fits", "speed", "GPUs")]
    for one in changed:
        saved, ratio = here.needed - one.needed, one.tokens_per_s / here.tokens_per_s if here.tokens_per_s else 0
        rows.append(
            (
                " ".join(one.changes),
                f"{one.needed / GIB:.1f}",
                f"{saved / GIB:.1f}",
                one.verdict,
                f"{ratio:.2f}x" if ratio else "?",
                str(_gpus(one, world)),
            )
        )
    return said + (aligned(rows, right=(1, 2, 4, 5)) if changed else ["nothing simple would lower it"])


def _gpus(one: Fit, world: int) -> int:
    from mbx.train.recipe.world import smallest_world

    need = smallest_world(one.recipe)
    return -(-world // need) * need


def _fastest(found: list[Fit], world: int, device: Device) -> list[str]:
    from mbx.train.budget.predict import GIB

    if not found:
        return ["", f"no setting of micro-batch, recomputation, tp and FP8 fits {world} x {device.name}"]
    rows = [("fastest that fit, by an estimate", "GiB", "tokens/s")]
    rows += [(" ".join(one.changes), f"{one.needed / GIB:.1f}", f"{one.tokens_per_s:,.0f}") for one in found[:_SHOWN]]
    return ["", *aligned(rows, right=(1, 2))]


def _record(one: Fit) -> dict[str, object]:
    return {
        "overrides": list(one.changes),
        "needed_bytes": one.needed,
        "fits": one.verdict,
        "tokens_per_s_estimate": round(one.tokens_per_s),
    }
