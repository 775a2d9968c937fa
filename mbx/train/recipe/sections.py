"""A recipe and its sections: dataclasses whose fields are the keys, whose types say what a key takes, and whose
docstrings explain them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from converters.rows.expr import Value


@dataclass(frozen=True, slots=True)
class Range:
    """Lowest and highest value of a number; one that is `below` its highest does not reach it."""

    low: float = -math.inf
    high: float = math.inf
    below: bool = False


Size: TypeAlias = Annotated[int, Range(1)]
Number: TypeAlias = Annotated[int, Range(0)]
Seed: TypeAlias = Annotated[int, Range(0, 2**31 - 1)]  # NumPy's, with what is added for each stage
Amount: TypeAlias = Annotated[float, Range(0)]
Share: TypeAlias = Annotated[float, Range(0, 1)]
ShareBelowOne: TypeAlias = Annotated[float, Range(0, 1, below=True)]
#: Places of records, read one behind the other.
Places: TypeAlias = str | tuple[str, ...]
#: Places, or each with its weight.
Mixed: TypeAlias = Places | Mapping[str, Amount]


@dataclass(frozen=True, slots=True)
class Model:
    """What is trained.

    `path`: a Hugging Face folder; its `config.json` and tokenizer count. `init`: `pretrained` reads its weights,
    `random` draws new ones. `shape`: flat Megatron Core config used where no path is given, `mapping` in it the table
    by which its weights have names. `allow_unused_key`: keys of its config.json that no table knows and that change
    nothing. `config`: flat config keys set on top of either (kernels, MoE dispatch, dropout). `vocab_divisor`: the
    embedding is padded to a multiple of this times `parallel.tp`.
    """

    path: str = ""
    init: Literal["pretrained", "random"] = "pretrained"
    mapping: str = ""
    allow_unused_key: Places = ""
    vocab_divisor: Size = 1
    shape: Mapping[str, Value] = field(default_factory=dict)
    config: Mapping[str, Value] = field(default_factory=dict)

    @property
    def waived_keys(self) -> tuple[str, ...]:
        """What `allow_unused_key` names."""
        return places_of(self.allow_unused_key)


def places_of(path: Mixed) -> tuple[str, ...]:
    """What a path names, in its order."""
    return ((path,) if path else ()) if isinstance(path, str) else tuple(path)


@dataclass(frozen=True, slots=True)
class Data:
    """Where samples come from.

    `path`: a file, folder, pattern or data set, several of them, or several with weights: the shares of the rows.
    `kind`: `chat` (`messages`, ShareGPT's `conversations`, Alpaca), `completion` (`prompt` and `completion`), `text`
    (`text`, or plain .txt), `auto` (one of these, by the first record), `indexed` (Megatron `.bin`/`.idx`, path
    without suffix), `mock` (Megatron Core's mock documents), `pattern` (a sequence any model learns). `template`: a
    chat template in place of the tokenizer's own: a name, a Jinja file, or a folder that has one. `learn`: every turn
    of the assistant, its `last` one, or `all` tokens. `length`: tokens of a row. `pack`: several examples a row.
    `eval_share`: the share of the examples that is held out for validation. `too_long`: an example longer than a row
    is an `error`, or is `drop`ped or `truncate`d. `null_vocab_size`: for `mock`, the vocabulary without its
    end-of-document token, as Megatron-LM's NullTokenizer counts.
    """

    kind: Literal["auto", "chat", "completion", "text", "indexed", "mock", "pattern"] = "auto"
    path: Mixed = ""
    template: str = ""
    learn: Literal["assistant", "last", "all"] = "assistant"
    eval_path: Places = ""
    eval_share: ShareBelowOne = 0.0
    length: Size = 2048
    pack: bool = True
    too_long: Literal["error", "drop", "truncate"] = "error"
    shuffle: bool = True
    seed: Seed = 1234
    split: str = "969,30,1"
    null_vocab_size: Number = 0

    @property
    def places(self) -> tuple[str, ...]:
        """What `path` names, in its order."""
        return places_of(self.path)

    @property
    def weights(self) -> tuple[float, ...]:
        """The share of the rows that each of `places` has, which sum to 1; none where `path` gives no weights."""
        if not isinstance(self.path, Mapping):
            return ()
        return tuple(weight / sum(self.path.values()) for weight in self.path.values())

    @property
    def packs(self) -> bool:
        """Whether rows hold several examples, whose attention is kept apart."""
        return self.pack and self.kind in ("auto", "chat", "completion")


@dataclass(frozen=True, slots=True)
class Train:
    """How long and how large. `epochs`: passes over the data, fractions too, that count the steps in place of `steps`,
    which is 0 then. `global_batch` and `micro_batch` are in rows of `data.length` tokens.

    `cuda_graph`: record a micro-batch's passes and replay them, where the run allows it.
    `tower`: what becomes of the tower and projector of a model that sees, where rows show images.

    `per_token_loss`: every token of a global batch weighs the same; otherwise every micro-batch does, as in
    Megatron-LM. `patience`: stop behind so many evaluations without a better loss; 0 never stops. `spike_factor`:
    stop when the loss exceeds this times its running mean; 0 never stops.

    `rewind`: go back to the last checkpoint, at most so often, and past the batches since, when the loss of
    `rewind_steps` steps in a row is not finite or exceeds `rewind_factor` times the median of the last 32 others.
    """

    steps: Number = 100
    epochs: Amount = 0.0
    micro_batch: Size = 1
    global_batch: Size = 8
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    recompute: Literal["none", "selective", "full"] = "none"
    cuda_graph: Literal["auto", "off"] = "auto"
    tower: Literal["frozen", "trained"] = "frozen"
    seed: Seed = 1234
    deterministic: bool = False
    per_token_loss: bool = True
    eval_every: Number = 0
    eval_steps: Size = 8
    patience: Number = 0
    spike_factor: Amount = 0.0
    rewind: Number = 0
    rewind_factor: Annotated[float, Range(1)] = 2.0
    rewind_steps: Size = 3


@dataclass(frozen=True, slots=True)
class Optim:
    """Adam with decoupled weight decay (or plain SGD, or Muon), and the learning rate over steps.

    Warm-up takes `warmup_fraction` of the run's steps, so that a shortened run still fits; `warmup_steps` from 0 on
    counts them instead. Keys that begin with `muon_` are of Muon, which steps matrices; Adam steps all else.
    """

    optimizer: Literal["adam", "sgd", "muon"] = "adam"
    lr: Amount = 1e-5
    min_lr: Amount = 0.0
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_fraction: Share = 0.0
    warmup_steps: Annotated[int, Range(-1)] = -1
    decay_steps: Number = 0
    weight_decay: Amount = 0.01
    beta1: ShareBelowOne = 0.9
    beta2: ShareBelowOne = 0.95
    eps: Amount = 1e-8
    clip: Amount = 1.0
    muon_momentum: ShareBelowOne = 0.95
    muon_nesterov: bool = False
    muon_steps: Size = 5
    muon_coefficients: Literal["quintic", "simple", "polar_express", "cans", "aol", "deepseekv4"] = "quintic"
    muon_scale: Literal["spectral", "shape_scaling", "unit_rms_norm"] = "spectral"
    muon_extra_scale: Amount = 1.0
    muon_split_qkv: bool = True
    muon_tp: Literal["duplicated", "distributed", "blockwise"] = "duplicated"
    muon_precision: Literal["medium", "high", "highest"] = "medium"


@dataclass(frozen=True, slots=True)
class Parallel:
    """Sizes of the parallel axes; data parallelism is what remains of the world.

    `vpp`: model chunks of a pipeline rank, whose stages are then interleaved.
    """

    tp: Size = 1
    pp: Size = 1
    vpp: Size = 1
    cp: Size = 1
    ep: Size = 1
    etp: Size = 1
    sequence_parallel: bool = True
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = True


#: The method of adapters that the house has.
LORA = "lora"


@dataclass(frozen=True, slots=True)
class Lora:
    """Low-rank adapters on a frozen base; rank 0 trains every weight. The update is `alpha / rank · B A`.

    `method`: another one than these, by the name that a class of the user's own file has.

    `targets`, and `exclude` of them, name linears as Megatron Core does (`linear_qkv`) or Transformers (`q_proj`),
    by a regular expression on Transformers' whole name, or all of them (`all-linear`). `rslora`: alpha / √rank.
    `rank_pattern` and `alpha_pattern` give modules of Transformers their own, as in PEFT. `modules_to_save`:
    `embed_tokens`, `lm_head`, trained whole beside the adapters. `tower_targets`: linears of a tower and its projector
    that are adapted as well, by Transformers' names, a regular expression, or all.
    """

    rank: Number = 0
    alpha: float = 32.0
    rslora: bool = False
    dropout: ShareBelowOne = 0.0
    dora: bool = False
    method: str = LORA
    targets: tuple[str, ...] = ("all-linear",)
    exclude: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    tower_targets: tuple[str, ...] = ()
    rank_pattern: Mapping[str, Size] = field(default_factory=dict)
    alpha_pattern: Mapping[str, Amount] = field(default_factory=dict)
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Distill:
    """A frozen teacher, of whose distribution over the next token a student learns the KL divergence.

    `teacher`: a Hugging Face folder or a Megatron Core checkpoint, which computes beside the student. `weight`: the
    divergence's share of the loss; the data's own has the rest. `temperature`: logits of both are divided by it, and
    the divergence counts its square. `top_k`: the teacher's so many likeliest tokens, and all others as one; 0 all.

    `hidden_weight`: what the distance between hidden states adds to that loss, its mean over pairs of layers; 0 hears
    logits alone. `hidden_loss`: the distance. `hidden_layers`: the teacher's layer by the student's, both from 1;
    every layer of the student hears the one as deep where it is empty.
    """

    teacher: str = ""
    weight: Share = 0.5
    temperature: Annotated[float, Range(0.01, 100.0)] = 1.0
    top_k: Number = 0
    hidden_weight: Amount = 0.0
    hidden_loss: Literal["mse", "cosine"] = "mse"
    hidden_layers: Mapping[str, Size] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Fp8:
    """Transformer Engine's FP8: `none`, `delayed`, `tensorwise` (current scaling), `blockwise`, `mxfp8`; its FP4:
    `nvfp4`."""

    recipe: Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8", "nvfp4"] = "none"
    format: Literal["hybrid", "e4m3"] = "hybrid"


@dataclass(frozen=True, slots=True)
class Run:
    """Where a run lives and what it leaves behind.

    `save`: whether it leaves checkpoints at all. `save_every` 0 saves at the end only; `keep` 0 keeps all.
    `keep_best`: the checkpoint of the best validation loss stays as well. `export_every`: the checkpoint of every so
    many steps, and the last, is also written as a Hugging Face folder or a PEFT adapter, in `export/` of the run.
    `save_async`: a process beside the training writes them; the tracker moves when it is done. `profile`: so many
    steps, behind the first five, are traced to `profile/` of the run. `stragglers`: a report every so many steps on
    ranks that are slow at their own work. `timeout_s`: how long a rank waits for another before the run ends.
    """

    dir: str = "runs/{recipe}"
    save: bool = True
    save_every: Number = 0
    save_async: bool = False
    keep: Number = 2
    keep_best: bool = False
    export_every: Number = 0
    save_optimizer: bool = True
    tensorboard: bool = False
    profile: Number = 0
    stragglers: Number = 0
    wandb: str = ""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    kernels: Literal["auto", "te", "local"] = "auto"
    timeout_s: Size = 1800


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
    distill: Distill = Distill()
    fp8: Fp8 = Fp8()
    run: Run = Run()

    @property
    def run_dir(self) -> Path:
        """Folder of this run."""
        return Path(self.run.dir.replace("{recipe}", self.name))

    def flat(self) -> dict[str, object]:
        """Every value by its dotted key."""
        sections = {f.name: section for f in fields(self) if is_dataclass(section := getattr(self, f.name))}
        return {f"{name}.{f.name}": getattr(s, f.name) for name, s in sections.items() for f in fields(s)}

    def to_dict(self) -> dict[str, object]:
        """Plain values, as TOML and JSON have them."""
        return asdict(self)
