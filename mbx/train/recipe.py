"""Recipes: small TOML files whose keys are the fields of the dataclasses below, and `a.b=value` overrides.

Everything a run depends on stands here. Unknown keys are errors; the fields are the documentation.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path

from converters.errors import UsageError
from converters.expr import Value


@dataclass(frozen=True, slots=True)
class Model:
    """What is trained.

    `path`: a Hugging Face folder; its `config.json` and tokenizer count. `init`: `pretrained` reads its weights,
    `random` draws new ones. `shape`: flat Megatron Core config used where no path is given. `config`: flat config
    keys set on top of either (kernels, MoE dispatch, dropout). `vocab_divisor`: the embedding is padded to a
    multiple of this times `parallel.tp`.
    """

    path: str = ""
    init: str = "pretrained"
    mapping: str = ""
    vocab_divisor: int = 1
    shape: Mapping[str, Value] = field(default_factory=dict)
    config: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Data:
    """Where samples come from.

    `kind`: `chat` (JSONL with `messages`), `completion` (JSONL with `prompt` and `completion`), `text` (JSONL with
    `text`, or plain .txt), `indexed` (Megatron `.bin`/`.idx`, path without suffix), `mock` (Megatron Core's mock
    documents), `pattern` (a sequence any model learns). `length`: tokens of a row. `pack`: several examples a row.
    `too_long`: an example longer than a row is an `error`, or is `drop`ped or `truncate`d. `null_vocab_size`: for
    `mock`, the vocabulary without its end-of-document token, as Megatron-LM's NullTokenizer counts.
    """

    kind: str = "chat"
    path: str = ""
    eval_path: str = ""
    length: int = 2048
    pack: bool = True
    too_long: str = "error"
    shuffle: bool = True
    seed: int = 1234
    split: str = "969,30,1"
    null_vocab_size: int = 0


@dataclass(frozen=True, slots=True)
class Train:
    """How long and how large. `global_batch` and `micro_batch` are in rows of `data.length` tokens.

    `per_token_loss`: every token of a global batch weighs the same; otherwise every micro-batch does, as in
    Megatron-LM. `spike_factor`: stop when the loss exceeds this times its running mean; 0 never stops.
    """

    steps: int = 100
    micro_batch: int = 1
    global_batch: int = 8
    precision: str = "bf16"
    recompute: str = "none"
    seed: int = 1234
    deterministic: bool = False
    per_token_loss: bool = True
    eval_every: int = 0
    eval_steps: int = 8
    spike_factor: float = 0.0


@dataclass(frozen=True, slots=True)
class Optim:
    """Adam with decoupled weight decay (or plain SGD), and the learning rate over steps."""

    optimizer: str = "adam"
    lr: float = 1e-5
    min_lr: float = 0.0
    schedule: str = "cosine"
    warmup_steps: int = 0
    decay_steps: int = 0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0


@dataclass(frozen=True, slots=True)
class Parallel:
    """Sizes of the parallel axes; data parallelism is what remains of the world."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    sequence_parallel: bool = True
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = True


@dataclass(frozen=True, slots=True)
class Lora:
    """Low-rank adapters on a frozen base; rank 0 trains every weight. The update is `alpha / rank · B A`."""

    rank: int = 0
    alpha: float = 32.0
    dropout: float = 0.0
    dora: bool = False
    targets: tuple[str, ...] = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Fp8:
    """Transformer Engine's FP8: `none`, `delayed`, `tensorwise` (current scaling), `blockwise`, `mxfp8`."""

    recipe: str = "none"
    format: str = "hybrid"


@dataclass(frozen=True, slots=True)
class Run:
    """Where a run lives and what it leaves behind.

    `save`: whether it leaves checkpoints at all. `save_every` 0 saves at the end only; `keep` 0 keeps all.
    """

    dir: str = "runs/{recipe}"
    save: bool = True
    save_every: int = 0
    keep: int = 2
    save_optimizer: bool = True
    tensorboard: bool = False
    wandb: str = ""
    device: str = "auto"
    kernels: str = "auto"


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
    "parallel.tp parallel.pp parallel.cp parallel.ep parallel.etp"
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
            hint="optim.warmup_steps=0 trains without a warm-up",
        )


def check_world(recipe: Recipe, world_size: int) -> int:
    """Data-parallel size of the recipe in a world of `world_size` ranks; UsageError where it does not divide."""
    p = recipe.parallel
    model = p.tp * p.pp * p.cp
    if world_size % model:
        raise UsageError(
            f"tp {p.tp} x pp {p.pp} x cp {p.cp} = {model} does not divide the world of {world_size} process(es)",
            hint=f"torchrun --nproc-per-node {model} -m mbx train …",
        )
    if world_size % (p.etp * p.ep * p.pp):
        raise UsageError(f"etp {p.etp} x ep {p.ep} x pp {p.pp} does not divide the world of {world_size} process(es)")
    dp = world_size // model
    if recipe.train.global_batch % (recipe.train.micro_batch * dp):
        raise UsageError(
            f"train.global_batch {recipe.train.global_batch} is not a multiple of train.micro_batch "
            f"{recipe.train.micro_batch} x dp {dp}"
        )
    return dp
