"""`mbx train`: run a recipe; its commands export what a run trained, and draw what it did."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from converters.errors import UsageError
from mbx.cli import completions
from mbx.cli.data_view import SHOWN, data_lines, show_data
from mbx.cli.groups import grouped
from mbx.cli.options import Output, epilog
from mbx.cli.output import out
from mbx.cli.recipes import RecipeName, Words, named
from mbx.cli.running import warn_of_unknown_core
from mbx.cli.train_launch import Launch
from mbx.cli.train_plan import show_plan
from mbx.extras import require
from mbx.text import aligned

if TYPE_CHECKING:
    from mbx.train.lora.method import Tuned
    from mbx.train.recipe.sections import Recipe


class _OwnWords(TyperGroup):
    """A group that is a command as well: words of which the first names no command of it are its own."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        args = [
            f"{word}={SHOWN}" if word == "--show-data" and not "".join(args[at + 1 : at + 2]).isdecimal() else word
            for at, word in enumerate(args)  # its number may be left out
        ]
        ctx.allow_interspersed_args = False
        first = (self.make_parser(ctx).parse_args(list(args))[0].get("words") or ("",))[0]
        # a word like a command's name is left to the group, which says which one was meant
        ctx.meta[__name__] = "=" not in first and bool(get_close_matches(first, self.commands))
        ctx.allow_interspersed_args = not ctx.meta[__name__]
        return super().parse_args(ctx, args)

    def get_params(self, ctx: typer.Context) -> list[Any]:  # type: ignore[override]
        """Before a command of the group, its options alone."""
        return [param for param in super().get_params(ctx) if not (ctx.meta.get(__name__) and param.name == "words")]


app = typer.Typer(
    cls=_OwnWords,
    invoke_without_command=True,
    subcommand_metavar="| COMMAND [ARGS]...",
    rich_markup_mode=None,
    epilog=epilog(
        "mbx train --recipe llama32_1b_lora model=./Llama-3.2-1B data=chat.jsonl",
        "torchrun --nproc-per-node 2 -m mbx train --recipe NAME parallel.tp=2",
        "mbx train --recipe NAME --launch slurm --nodes 4 --gpus-per-node 8",
        "mbx train --recipe llama32_1b_lora model=DIR data=chat.jsonl --show-data",
        "mbx train --recipe llama32_1b_lora model=DIR data=chat.jsonl --resume",
        "mbx train export runs/llama32_1b_lora out-folder",
        "mbx train report runs/llama32_1b_lora",
        'mbx train generate runs/llama32_1b_lora --prompt "Who are you?"',
    ),
)
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.", autocompletion=completions.runs)]


@dataclass(frozen=True)
class Asked:
    """What to do with which recipe."""

    recipe: RecipeName = None
    init_from: Annotated[
        str | None, typer.Option("--init-from", metavar="DIR", help="Take the first weights from here.")
    ] = None
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in its folder, exactly.")] = False
    continue_: Annotated[
        bool, typer.Option("--continue", help="Begin, or resume where this run has a checkpoint already.")
    ] = False
    hooks: Annotated[
        Path | None,
        typer.Option("--hooks", metavar="FILE", help="Python functions of your own: loss, each step, each save."),
    ] = None
    in_process_restarts: Annotated[
        int, typer.Option(metavar="N", min=0, help="Start again in the same processes after a fault, N times at most.")
    ] = 0
    list: Annotated[bool, typer.Option("--list", help="List the shipped recipes.")] = False
    show: Annotated[bool, typer.Option("--show", help="Print the recipe with overrides applied.")] = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan; train nothing.")] = (
        False
    )
    show_data: Annotated[
        int | None,
        typer.Option("--show-data", metavar="[N]", min=1, help="Print N examples (3) with what is learned marked."),
    ] = None


@app.callback()
@grouped
def train(
    ctx: typer.Context,
    words: Words = None,
    *,
    asked: Asked,
    launch: Launch,
    output: Output,
) -> None:
    """Train a model with Megatron Core, from a Hugging Face folder to one."""
    rank = int(os.environ.get("RANK", "0"))
    replace(output, quiet=output.quiet + (2 if rank else 0)).configure()  # rank 0 speaks for all
    output.hush()
    launch.check()
    if command := ctx.invoked_subcommand:
        idle = [field.name.rstrip("_").replace("_", "-") for field in fields(asked) if getattr(asked, field.name)]
        if idle := [*idle, *(["launch"] if launch.launch else [])]:
            raise UsageError(f"`mbx train {command}` takes no ‹{idle[0]}›", hint="it reads a run's folder")
    elif asked.resume and asked.continue_:
        raise UsageError("‹continue› resumes where there is a checkpoint, ‹resume› needs one: give one of them")
    elif launch.launch:
        _launch(asked, launch, words or [])
    elif asked.list:
        _list()
    else:
        _train(asked, words or [])


@app.command(
    "report",
    epilog=epilog("mbx train report runs/llama32_1b_lora", "mbx train report runs/llama32_1b_lora curves.png"),
)
@grouped
def report(
    run: Run,
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help=".html or .png (default: report.html in the run's folder).")
    ] = None,
    *,
    output: Output,
) -> None:
    """Draw a run's loss, throughput, memory and learning rate."""
    output.configure()
    from mbx.train.run.report import write_report

    path = write_report(run, file)
    out.result({"report": str(path)}, lambda: [str(path)])


@app.command(
    "export",
    epilog=epilog(
        "mbx train export runs/llama32_1b_lora ./adapter", "mbx train export runs/llama32_1b_lora ./merged --merged"
    ),
)
@grouped
def export(
    run: Run,
    dst: Annotated[Path, typer.Argument(metavar="DST", help="The folder to make.")],
    merged: Annotated[bool, typer.Option("--merged", help="Adapters merged into the base.")] = False,
    best: Annotated[bool, typer.Option("--best", help="The checkpoint of the best validation loss.")] = False,
    hooks: Annotated[
        Path | None, typer.Option("--hooks", metavar="FILE", help="Your own method of adapters, which trained it.")
    ] = None,
    *,
    output: Output,
) -> None:
    """Write what a run trained: a model's folder, or a PEFT adapter."""
    output.configure()
    output.hush()
    from mbx.train.checkpoints.export import export_run

    method = None if hooks is None else _method(hooks, run)
    path, kind = export_run(run, dst, merged=merged, best=best, method=method)
    out.result({"export": str(path), "kind": kind}, lambda: [f"{path}: {kind}"])


def _method(hooks: Path, run: Path) -> type[Tuned] | None:
    """The method of a file that trained a run."""
    from mbx.train.checkpoints.state import latest, read_recipe
    from mbx.train.run.hooks import load_hooks

    found = latest(run)
    return None if found is None else load_hooks(hooks).methods.get(read_recipe(found).lora.method)


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen."""

    max_tokens: Annotated[int, typer.Option("--max-tokens", metavar="N", min=1, help="Tokens of an answer.")] = 128
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="T", min=0.0, help="0 takes the likeliest token, always.")
    ] = 0.0
    top_p: Annotated[
        float, typer.Option("--top-p", metavar="P", min=0.0, max=1.0, help="Draw from the likeliest of this share.")
    ] = 1.0
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Random stream of what is drawn.")] = 0
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without a chat template.")] = False


@app.command(
    "generate",
    epilog=epilog(
        'mbx train generate runs/llama32_1b_lora --prompt "Who are you?"',
        'mbx train generate ./adapter --base ./Llama-3.2-1B --prompt "Hello"',
    ),
)
@grouped
def generate(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="A run, a PEFT adapter or a model's folder.", autocompletion=completions.runs
        ),
    ],
    prompt: Annotated[list[str], typer.Option("--prompt", metavar="TEXT", help="What to answer; may be repeated.")],
    base: Annotated[
        Path | None, typer.Option("--base", metavar="DIR", help="The adapter's base (default: what it names).")
    ] = None,
    best: Annotated[bool, typer.Option("--best", help="A run's checkpoint of the best validation loss.")] = False,
    *,
    choice: Choice,
    output: Output,
) -> None:
    """Answer prompts with what a run trained, through Transformers."""
    output.configure()
    output.hush()
    from mbx.train.checkpoints.generate import Sampling, generate

    sampling = Sampling(choice.max_tokens, choice.temperature, choice.top_p, choice.seed, choice.raw)
    answers = generate(source, prompt, sampling, base=base, best=best)
    pairs = [{"prompt": asked, "answer": answer} for asked, answer in zip(prompt, answers, strict=True)]
    out.result({"answers": pairs}, lambda: answers)


def _list() -> None:
    from mbx.train.recipe.catalogue import load_recipe, recipe_names

    rows = [(name, load_recipe(name).description) for name in recipe_names()]
    out.result({"recipes": [{"name": n, "description": d} for n, d in rows]}, lambda: aligned(rows))


def _launch(asked: Asked, launch: Launch, words: list[str]) -> None:
    from mbx.cli.train_launch import show_launch
    from mbx.train.recipe.catalogue import load_recipe

    for word in ("list", "show", "dry-run", "show-data"):
        if getattr(asked, word.replace("-", "_")):
            raise UsageError(f"‹launch› prints how to start a run, and ‹{word}› looks at it: give one of them")
    name, overrides = named(asked.recipe, words)
    begins = ["--init-from", asked.init_from] if asked.init_from else []
    begins += ["--hooks", str(asked.hooks)] if asked.hooks else []
    begins += ["--in-process-restarts", str(asked.in_process_restarts)] if asked.in_process_restarts else []
    begins += ["--resume" if asked.resume else "--continue"]
    show_launch(load_recipe(name, overrides), launch, ["--recipe", str(name), *overrides, *begins])


def _train(asked: Asked, words: list[str]) -> None:
    from mbx.train.recipe.catalogue import load_recipe

    if asked.in_process_restarts:  # torch would report each second that a rank waits for a fault
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    recipe = load_recipe(*named(asked.recipe, words))
    if asked.show:
        from mbx.train.recipe.toml import dump_toml

        out.result(recipe.to_dict(), lambda: dump_toml(recipe.to_dict()).splitlines())
        return
    require("train", "`mbx train`")
    from mbx.train.run.hooks import NO_HOOKS, load_hooks
    from mbx.train.run.loop import Outcome, train
    from mbx.train.run.prepare import prepare
    from mbx.train.run.restarts import check_restarts, restarted

    warn_of_unknown_core()
    recipe = fetched(recipe)
    dry, restarts = asked.dry_run or asked.show_data is not None, asked.in_process_restarts
    check_restarts(0 if dry else restarts)
    hooks = load_hooks(asked.hooks) if asked.hooks else NO_HOOKS
    prepared = prepare(recipe, asked.init_from, asked.resume, anew=asked.continue_, hooks=hooks, dry=dry)
    if asked.show_data is not None:
        show_data(prepared, asked.show_data)
        return
    if asked.dry_run:
        show_plan(prepared)
        return
    for line in data_lines(prepared):
        out.message(line)

    def once(start: int) -> Outcome:
        again = prepare(recipe, asked.init_from, anew=True, hooks=hooks) if start else prepared
        return train(again, live=out.shows_progress, messages=out.verbosity > -1)

    done = restarted(recipe, restarts, once) if restarts else once(0)
    last = done.losses[-1] if done.losses else None
    out.result(
        {"run": str(done.run_dir), "stopped": done.stopped, "steps": done.first_step + len(done.losses), "loss": last},
        lambda: [f"{done.run_dir}: {done.stopped}" + ("" if last is None else f", loss {last:.4f}")],
    )


def fetched(recipe: Recipe) -> Recipe:
    """The recipe with the ids of hub models, its own and a teacher's, replaced by their folders in the cache."""
    return replace(
        recipe,
        model=replace(recipe.model, path=_local(recipe.model.path)),
        distill=replace(recipe.distill, teacher=_local(recipe.distill.teacher)),
    )


def _local(path: str) -> str:
    if not path or Path(path).is_dir():
        return path
    from mbx.cli.source import fetch

    return str(fetch(path).path)
