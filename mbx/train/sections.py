"""The sections of a recipe: one dataclass each, whose fields are the keys and whose docstrings explain them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from converters.rows.expr import Value


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
    """Adam with decoupled weight decay (or plain SGD), and the learning rate over steps.

    Warm-up takes `warmup_fraction` of the run's steps, so that a shortened run still fits; `warmup_steps` from 0 on
    counts them instead.
    """

    optimizer: str = "adam"
    lr: float = 1e-5
    min_lr: float = 0.0
    schedule: str = "cosine"
    warmup_fraction: float = 0.0
    warmup_steps: int = -1
    decay_steps: int = 0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0


@dataclass(frozen=True, slots=True)
class Parallel:
    """Sizes of the parallel axes; data parallelism is what remains of the world.

    `vpp`: model chunks of a pipeline rank, whose stages are then interleaved.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
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
    `save_async`: a process beside the training writes them; the tracker moves when it is done.
    """

    dir: str = "runs/{recipe}"
    save: bool = True
    save_every: int = 0
    save_async: bool = False
    keep: int = 2
    save_optimizer: bool = True
    tensorboard: bool = False
    wandb: str = ""
    device: str = "auto"
    kernels: str = "auto"
