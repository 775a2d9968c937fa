"""Recipes: small TOML files whose keys are the fields of `mbx.train.sections`, and `a.b=value` overrides.

Everything a run depends on stands in one. Unknown keys are errors; the fields are the documentation.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path

from converters.errors import UsageError
from converters.rows.expr import Value
from mbx.train.sections import Data, Fp8, Lora, Model, Optim, Parallel, Run, Train


@dataclass(frozen=True, slots=True)
class Recipe:
    """One training run."""

    name: str = "custom"
    description: str = ""
    model: Model = Model()
    data: Data = Data()
    train: Train = Train()
    optim: Optim = Optim()
    parallel: Parallel = Parallel()
    lora: Lora = Lora()
    fp8: Fp8 = Fp8()
    run: Run = Run()

    @property
    def run_dir(self) -> Path:
        """Folder of this run."""
        return Path(self.run.dir.replace("{recipe}", self.name))

    def to_dict(self) -> dict[str, object]:
        """Plain values, as TOML and JSON have them."""
        return dataclasses.asdict(self)


SECTIONS: dict[str, type] = {
    "model": Model,
    "data": Data,
    "train": Train,
    "optim": Optim,
    "parallel": Parallel,
    "lora": Lora,
    "fp8": Fp8,
    "run": Run,
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "model.init": ("pretrained", "random"),
    "data.kind": ("chat", "completion", "text", "indexed", "mock", "pattern"),
    "data.too_long": ("error", "drop", "truncate"),
    "train.precision": ("bf16", "fp16", "fp32"),
    "train.recompute": ("none", "selective", "full"),
    "optim.optimizer": ("adam", "sgd"),
    "optim.schedule": ("cosine", "wsd", "linear", "constant"),
    "fp8.recipe": ("none", "delayed", "tensorwise", "blockwise", "mxfp8"),
    "fp8.format": ("hybrid", "e4m3"),
    "run.device": ("auto", "cpu", "cuda"),
    "run.kernels": ("auto", "te", "local"),
}
#: Lowest and highest value of a number; every number is finite besides.
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(
        (
            *("data.length", "train.steps", "train.micro_batch", "train.global_batch", "train.eval_steps"),
            *("model.vocab_divisor", "parallel.tp", "parallel.pp", "parallel.vpp"),
            *("parallel.cp", "parallel.ep", "parallel.etp"),
        ),
        (1, math.inf),
    ),
    **dict.fromkeys(
        (
            *("optim.lr", "optim.min_lr", "optim.weight_decay", "optim.eps", "optim.clip", "optim.decay_steps"),
            *("train.eval_every", "train.spike_factor", "data.null_vocab_size"),
            *("lora.rank", "run.keep", "run.save_every"),
        ),
        (0, math.inf),
    ),
    **dict.fromkeys(("optim.warmup_fraction", "optim.beta1", "optim.beta2", "lora.dropout"), (0, 1)),
    **dict.fromkeys(("train.seed", "data.seed"), (0, 2**31 - 1)),  # NumPy's, with what is added for each stage
    "optim.warmup_steps": (-1, math.inf),
}
#: Numbers that must be smaller than the upper end of their range.
_BELOW = ("optim.beta1", "optim.beta2", "lora.dropout")
#: Up to three shares of Megatron-LM's `--split`, the first above 0.
_SPLIT = re.compile(r"(?=[^,]*[1-9])\d*\.?\d+(,\d*\.?\d+){0,2}")
#: Kinds of data that are files of examples.
FILES = ("chat", "completion", "text")


def parse_recipe(raw: Mapping[str, object]) -> Recipe:
    """A recipe from parsed TOML: every key known, every value of its field's type and range."""
    arguments: dict[str, object] = {}
    for key, value in raw.items():
        if key in ("name", "description"):
            arguments[key] = _typed(key, str, value)
        elif key in SECTIONS:
            if not isinstance(value, Mapping):
                raise UsageError(f"`{key}` is a section, got {value!r}", hint=f"write {key}.FIELD=value")
            arguments[key] = _section(key, SECTIONS[key], value)
        else:
            raise unknown_key(key, all_keys())
    recipe = Recipe(**arguments)  # type: ignore[arg-type]
    _check(recipe)
    return recipe


def all_keys() -> list[str]:
    """Every key a recipe may hold, dotted."""
    return [f"{name}.{f.name}" for name, section in SECTIONS.items() for f in fields(section)]


def _section(name: str, section: type, raw: Mapping[str, object]) -> object:
    hints = typing.get_type_hints(section)
    known = {f.name for f in fields(section)}
    arguments = {}
    for key, value in raw.items():
        if key not in known:
            raise unknown_key(f"{name}.{key}", all_keys())
        arguments[key] = _typed(f"{name}.{key}", hints[key], value)
    return section(**arguments)


def _typed(key: str, kind: object, value: object) -> object:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in (str, int, float, bool):
        assert isinstance(kind, type)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise UsageError(f"`{key}` must be of type {kind.__name__}, got {value!r}")
        return value
    if kind == tuple[str, ...]:
        if isinstance(value, str):
            value = [part for part in value.split(",") if part]
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise UsageError(f"`{key}` must be a list of strings, got {value!r}")
        return tuple(value)
    if not isinstance(value, Mapping):
        raise UsageError(f"`{key}` must be a table, got {value!r}")
    return _flat(value)


def _flat(value: Mapping[str, object], prefix: str = "") -> dict[str, Value]:
    """TOML nests `model.vocab_size = 1`; a flat config keeps the dot in the name."""
    out: dict[str, Value] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            out |= _flat(inner, f"{prefix}{key}.")
        else:
            out[prefix + key] = inner  # type: ignore[assignment]
    return out


def unknown_key(key: str, known: list[str]) -> UsageError:
    leaves = {name.rpartition(".")[2]: name for name in known}
    close = get_close_matches(key, known, n=3) or [
        leaves[m] for m in get_close_matches(key.rpartition(".")[2], list(leaves), n=2)
    ]
    return UsageError(
        f"a recipe has no key `{key}`",
        hint=f"did you mean {', '.join(close)}?" if close else "`mbx train ‹recipe› NAME ‹show›` prints every key",
    )


def _check(recipe: Recipe) -> None:
    """What can be said of a recipe without reading a file."""
    values = {
        f"{name}.{f.name}": getattr(getattr(recipe, name), f.name)
        for name, section in SECTIONS.items()
        for f in fields(section)
    }
    for key, choices in _CHOICES.items():
        if values[key] not in choices:
            close = get_close_matches(values[key], choices, n=1)
            raise UsageError(
                f"`{key}` is {values[key]!r}; choices: {', '.join(choices)}",
                hint=f"did you mean {key}={close[0]}?" if close else None,
            )
    for key, value in values.items():
        if isinstance(value, int | float):
            _check_range(key, value, *_RANGES.get(key, (-math.inf, math.inf)))
    _check_optim(recipe)
    _check_data(recipe)
    if not recipe.lora.rank and (recipe.lora.adapter or recipe.lora.dora):
        asked = f"lora.adapter={recipe.lora.adapter}" if recipe.lora.adapter else "lora.dora=true"
        raise UsageError(f"{asked}, and lora.rank 0 trains every weight", hint="lora.rank=16 trains adapters")
    if recipe.lora.rank and not recipe.lora.alpha:
        raise UsageError("lora.alpha 0 multiplies every adapter by 0", hint=f"lora.alpha={2 * recipe.lora.rank}")
    if not recipe.run.dir:
        raise UsageError("`run.dir` is empty", hint="run.dir=runs/NAME")
    if recipe.parallel.vpp > 1 and recipe.parallel.pp == 1:
        raise UsageError(
            f"parallel.vpp {recipe.parallel.vpp} interleaves pipeline stages, and parallel.pp is 1",
            hint="parallel.vpp=1, or parallel.pp=2 on two GPUs",
        )


def _check_range(key: str, value: float, low: float, high: float) -> None:
    if not math.isfinite(value):
        raise UsageError(f"`{key}` must be a finite number, got {value}")
    if key in _BELOW and not low <= value < high:
        raise UsageError(f"`{key}` must be at least {low} and below {high}, got {value}")
    if high < math.inf and not low <= value <= high:
        raise UsageError(f"`{key}` must be {low} to {high}, got {value}")
    if value < low:
        raise UsageError(f"`{key}` must {'not be negative' if low == 0 else f'be at least {low}'}, got {value}")


def _check_optim(recipe: Recipe) -> None:
    o = recipe.optim
    if o.warmup_steps > recipe.train.steps:
        raise UsageError(
            f"optim.warmup_steps {o.warmup_steps} exceed train.steps {recipe.train.steps}",
            hint="optim.warmup_steps=0 trains without a warm-up, optim.warmup_fraction=0.05 warms up by share",
        )
    if o.min_lr > o.lr and o.schedule != "constant":
        raise UsageError(f"optim.min_lr {o.min_lr:g} is above optim.lr {o.lr:g}", hint=f"optim.min_lr={o.lr / 10:g}")


def _check_data(recipe: Recipe) -> None:
    """Refuse what this kind of data would leave unread."""
    d, every = recipe.data, recipe.train.eval_every
    if d.path and d.kind in ("mock", "pattern"):
        raise UsageError(
            f"data.kind `{d.kind}` reads no file, got data.path={d.path}",
            hint="data.kind=chat, completion, text or indexed reads one",
        )
    if d.eval_path and d.kind not in FILES:
        hint = "data.split sets its share for validation" if d.kind == "indexed" else None
        raise UsageError(f"data.kind `{d.kind}` takes no data.eval_path, got {d.eval_path}", hint=hint)
    if d.eval_path and not every:
        raise UsageError(
            f"data.eval_path={d.eval_path} is never read: train.eval_every is 0", hint="train.eval_every=100"
        )
    if d.kind == "indexed" and not _SPLIT.fullmatch(d.split):
        raise UsageError(
            f"`data.split` is shares of training, validation and test, got {d.split!r}", hint="data.split=969,30,1"
        )


def smallest_world(recipe: Recipe) -> int:
    """Fewest processes in which every parallel axis of the recipe has its size."""
    p = recipe.parallel
    return math.lcm(p.tp * p.pp * p.cp, p.etp * p.ep * p.pp)


def check_world(recipe: Recipe, world_size: int) -> int:
    """Data-parallel size of the recipe in a world of `world_size` ranks; UsageError where it does not divide."""
    p = recipe.parallel
    model = p.tp * p.pp * p.cp
    if world_size < 1:
        raise UsageError(f"a world has at least one process, got {world_size}")
    if world_size % model:
        raise UsageError(
            f"tp {p.tp} x pp {p.pp} x cp {p.cp} = {model} does not divide the world of {world_size} process(es)",
            hint=f"torchrun --nproc-per-node {smallest_world(recipe)} -m mbx train …",
        )
    if world_size % (p.etp * p.ep * p.pp):
        raise UsageError(
            f"etp {p.etp} x ep {p.ep} x pp {p.pp} does not divide the world of {world_size} process(es)",
            hint=f"torchrun --nproc-per-node {smallest_world(recipe)} -m mbx train …",
        )
    dp = world_size // model
    rows = recipe.train.micro_batch * dp
    if recipe.train.global_batch % rows:
        raise UsageError(
            f"train.global_batch {recipe.train.global_batch} is not a multiple of train.micro_batch "
            f"{recipe.train.micro_batch} x dp {dp}",
            hint=f"train.global_batch={-(-recipe.train.global_batch // rows) * rows}",
        )
    rounds = recipe.train.global_batch // rows
    if p.vpp > 1 and (rounds < p.pp or rounds % p.pp):
        raise UsageError(
            f"interleaved stages need a multiple of parallel.pp {p.pp} micro-batches a step, the recipe has {rounds}",
            hint=f"train.global_batch={rows * p.pp * max(1, -(-rounds // p.pp))}",
        )
    return dp
