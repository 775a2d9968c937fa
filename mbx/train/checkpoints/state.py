"""What a run's checkpoint says of the run beside its tensors: the recipe, and where its loop stood."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from converters.errors import StorageError, UsageError
from mbx.formats.torch_dist import TRACKER, find_iteration
from mbx.train.recipe.parse import parse_recipe
from mbx.train.recipe.sections import Recipe
from mbx.untrusted.small_files import read_json

STATE = "mbx_train.json"
RECIPE = "recipe.json"
#: Recipe keys, or whole sections, that must not change under resume: with them, step N would not be the step N of
#: the run, or its optimizer state would not be the checkpoint's.
_FIXED = (
    *("data", "lora", "distill", "model.path", "model.shape", "optim.optimizer", "run.save_optimizer"),
    *("train.tower", "train.global_batch", "train.seed", "train.per_token_loss", "train.precision"),
)
#: Among them, those that may: rows are compared by content, and validation rows train nothing.
_FREE = ("data.path", "data.eval_path")
#: Losses that are remembered.
RECENT = 32
#: Axes that say which process draws from which random stream.
_AXES = ("tp", "pp", "vpp", "cp", "ep", "etp")


@dataclass(frozen=True, slots=True)
class LoopState:
    """What the loop knows besides tensors. Rows are counted by `step`, so nothing else places the data.

    `base` is where the run's first weights came from: an adapter run reads them there again. Empty if random.
    `world_size`: processes of the run. `rows`: digest of what is trained on, empty where the recipe says it all.
    `padded_vocab`: rows of the embedding, whose padding takes part in the softmax. `rewinds`: how often the run went
    back to a checkpoint, past `skipped` batches in all; `recent`: the last losses, by which it decides to.
    """

    step: int
    mean_loss: float
    base: str
    world_size: int
    rows: str
    padded_vocab: int
    rewinds: int = 0
    skipped: int = 0
    recent: tuple[float, ...] = ()


def latest(run: Path) -> Path | None:
    """The checkpoint that a run's tracker names; None without a tracker. A damaged tracker is a StorageError."""
    if not (run / TRACKER).is_file():
        return None
    return find_iteration(run)


def finished(run: Path) -> list[Path]:
    """Checkpoints of a run that were written to their end, oldest first, whatever its tracker says."""
    found = (path.parent for path in run.glob(f"iter_*/{STATE}"))
    return sorted(path for path in found if path.suffix == "")  # a draft has one


def read_state(path: Path) -> LoopState:
    """The loop's state in the checkpoint at `path`; StorageError where it is not one of `mbx train`."""
    try:
        loop = read_json(path / STATE)
        step, mean, world = int(loop["step"]), float(loop["mean_loss"]), int(loop["world_size"])
        rewinds, skipped = int(loop.get("rewinds", 0)), int(loop.get("skipped", 0))  # an older release says neither
        recent = tuple(map(float, loop.get("recent", ())))[-RECENT:]
        facts = str(loop["base"]), world, str(loop["rows"]), int(loop["padded_vocab"])
        return LoopState(step, mean, *facts, rewinds, skipped, recent)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"`{path}` is no checkpoint of `mbx train`: {STATE}: {error}") from error


def read_recipe(path: Path) -> Recipe:
    """The recipe that the checkpoint at `path` was trained by; keys that are newer than it have their defaults."""
    try:
        return parse_recipe(read_json(path / RECIPE))
    except (OSError, ValueError, AttributeError, UsageError) as error:
        raise StorageError(f"`{path}` is no checkpoint of `mbx train`: {RECIPE}: {error}") from error


def check_continues(recipe: Recipe, path: Path) -> None:
    """UsageError where `recipe` does not continue the run whose checkpoint lies at `path`."""
    before, now = (_fixed(one) for one in (read_recipe(path), recipe))
    if changed := [key for key in now if before[key] != now[key]]:
        raise UsageError(
            f"‹resume›: the recipe changed in {', '.join(changed)}; the run would not be the same run",
            hint="repeat the run's own recipe and overrides, or start another with ‹init-from› and run.dir=NAME",
            details=[f"{key}: {before[key]!r} became {now[key]!r}" for key in changed],
        )


def check_same_rows(path: Path, rows: str) -> None:
    """UsageError where the run whose checkpoint lies at `path` was trained on other rows than those of this digest."""
    if read_state(path).rows != rows:
        raise UsageError(
            "‹resume›: the rows are not those that the run was trained on",
            hint="the file, the chat template or the tokenizer changed; run.dir=NAME starts another run",
        )


def check_vocabulary(path: Path, padded_vocab: int, tp: int) -> None:
    """UsageError where the embedding would have another number of rows than in the checkpoint at `path`."""
    before = read_state(path).padded_vocab
    if before != padded_vocab:
        way = f"model.vocab_divisor={before // tp}" if before % tp == 0 else f"a parallel.tp that divides {before}"
        raise UsageError(
            f"‹resume›: the embedding had {before} rows, now it would have {padded_vocab}; padding is in the softmax",
            hint=f"{way} keeps them",
        )


def same_processes(recipe: Recipe, path: Path, world_size: int) -> bool:
    """Whether each process stands where one of the run did whose checkpoint lies at `path`."""
    before = read_recipe(path).parallel
    axes = all(getattr(before, axis) == getattr(recipe.parallel, axis) for axis in _AXES)
    return axes and read_state(path).world_size == world_size


def _fixed(recipe: Recipe) -> dict[str, object]:
    """Values that must not change, paths spelt alike: ./x/ is x."""
    keys = (k for k in recipe.flat() if (k in _FIXED or k.partition(".")[0] in _FIXED) and k not in _FREE)
    values = {k: recipe.flat()[k] for k in keys}
    return {k: str(Path(v)) if isinstance(v, str) and v and k.endswith("path") else v for k, v in values.items()}
