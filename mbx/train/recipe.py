"""Recipes: small TOML files whose keys are the fields of `mbx.train.sections`, and `a.b=value` overrides.

Everything a run depends on stands in one. Unknown keys are errors; the fields are the documentation.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path

from converters.errors import UsageError
from converters.expr import Value
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
_POSITIVE = (
    "data.length train.steps train.micro_batch train.global_batch model.vocab_divisor "
    "parallel.tp parallel.pp parallel.vpp parallel.cp parallel.ep parallel.etp"
).split()


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
        hint=f"did you mean {', '.join(close)}?" if close else "`mbx train --recipe NAME --show` prints every key",
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
    for key in _POSITIVE:
        if values[key] < 1:
            raise UsageError(f"`{key}` must be at least 1, got {values[key]}")
    for key in ("optim.lr", "optim.min_lr", "optim.weight_decay", "lora.rank", "run.keep", "run.save_every"):
        if values[key] < 0:
            raise UsageError(f"`{key}` must not be negative, got {values[key]}")
    if recipe.optim.warmup_steps > recipe.train.steps:
        raise UsageError(
            f"optim.warmup_steps {recipe.optim.warmup_steps} exceed train.steps {recipe.train.steps}",
            hint="optim.warmup_steps=0 trains without a warm-up, optim.warmup_fraction=0.05 warms up by share",
        )
    if not 0.0 <= recipe.optim.warmup_fraction <= 1.0:
        raise UsageError(
            f"`optim.warmup_fraction` is a share of the steps, 0 to 1, got {values['optim.warmup_fraction']}"
        )
    if recipe.parallel.vpp > 1 and recipe.parallel.pp == 1:
        raise UsageError(
            f"parallel.vpp {recipe.parallel.vpp} interleaves pipeline stages, and parallel.pp is 1",
            hint="parallel.vpp=1, or parallel.pp=2 on two GPUs",
        )


def smallest_world(recipe: Recipe) -> int:
    """Fewest processes in which every parallel axis of the recipe has its size."""
    p = recipe.parallel
    return math.lcm(p.tp * p.pp * p.cp, p.etp * p.ep * p.pp)


def check_world(recipe: Recipe, world_size: int) -> int:
    """Data-parallel size of the recipe in a world of `world_size` ranks; UsageError where it does not divide."""
    p = recipe.parallel
    model = p.tp * p.pp * p.cp
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
