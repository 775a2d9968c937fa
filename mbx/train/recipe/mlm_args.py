"""Megatron-LM's command line ↔ recipe keys, for the flags of `pretrain_gpt.py` that say what is trained and how.

Both directions come from the one list below. Where a default of Megatron-LM differs from the recipe's, an absent
flag is written out too, so that a run means the same. Source: megatron/training/arguments.py of Megatron-LM with
megatron-core 0.16.1.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from converters.errors import UsageError

Value = bool | int | float | str


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag and the recipe key it sets. `kind`: int, float, str, or on / off for a flag that takes no value.

    `absent` is what the key is when the flag is not given, None where the recipe's own default means the same.
    `words` renames values: Megatron-LM's → the recipe's.
    """

    name: str
    key: tuple[str, ...]
    kind: str
    absent: Value | None = None
    words: Mapping[str, str] | None = None


def _shape(kind: str, fields: str) -> list[Flag]:
    return [Flag("--" + f.replace("_", "-"), ("model", "shape", f), kind) for f in fields.split()]


_SHAPE = ("model", "shape")
FLAGS: tuple[Flag, ...] = (
    *_shape(
        "int",
        """num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels moe_ffn_hidden_size
        moe_router_topk moe_shared_expert_intermediate_size moe_router_num_groups moe_router_group_topk q_lora_rank
        kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim mtp_num_layers""",
    ),
    *_shape(
        "float", "init_method_std attention_dropout hidden_dropout moe_aux_loss_coeff moe_router_topk_scaling_factor"
    ),
    *_shape(
        "str", "normalization moe_router_load_balancing_type moe_router_score_function moe_router_dtype softmax_type"
    ),
    *_shape(
        "on",
        """moe_router_pre_softmax moe_router_enable_expert_bias moe_grouped_gemm multi_latent_attention qk_layernorm
        add_qkv_bias""",
    ),
    Flag("--moe-router-bias-update-rate", ("model", "config", "moe_router_bias_update_rate"), "float"),
    Flag("--num-experts", (*_SHAPE, "num_moe_experts"), "int"),
    Flag("--norm-epsilon", (*_SHAPE, "layernorm_epsilon"), "float"),
    Flag("--disable-bias-linear", (*_SHAPE, "add_bias_linear"), "off", True),
    Flag("--vocab-size", (*_SHAPE, "model.vocab_size"), "int"),
    Flag("--max-position-embeddings", (*_SHAPE, "model.max_sequence_length"), "int"),
    Flag("--position-embedding-type", (*_SHAPE, "model.position_embedding_type"), "str", "learned_absolute"),
    Flag("--rotary-base", (*_SHAPE, "model.rotary_base"), "int"),
    Flag("--rotary-percent", (*_SHAPE, "model.rotary_percent"), "float"),
    Flag("--use-rope-scaling", (*_SHAPE, "model.rope_scaling"), "on"),
    Flag("--rope-scaling-factor", (*_SHAPE, "model.rope_scaling_factor"), "float"),
    Flag("--untie-embeddings-and-output-weights", (*_SHAPE, "model.share_embeddings_and_output_weights"), "off", True),
    Flag("--make-vocab-size-divisible-by", ("model", "vocab_divisor"), "int", 128),
    Flag("--seq-length", ("data", "length"), "int"),
    Flag("--data-path", ("data", "path"), "files"),
    Flag("--split", ("data", "split"), "str", "969,30,1"),
    Flag("--train-iters", ("train", "steps"), "int"),
    Flag("--micro-batch-size", ("train", "micro_batch"), "int"),
    Flag("--global-batch-size", ("train", "global_batch"), "int"),
    Flag("--seed", ("train", "seed"), "int"),
    Flag("--deterministic-mode", ("train", "deterministic"), "on"),
    Flag("--calculate-per-token-loss", ("train", "per_token_loss"), "on", False),
    Flag("--recompute-granularity", ("train", "recompute"), "str"),
    Flag("--eval-interval", ("train", "eval_every"), "int", 1000),
    Flag("--eval-iters", ("train", "eval_steps"), "int", 100),
    Flag("--optimizer", ("optim", "optimizer"), "str"),
    Flag("--lr", ("optim", "lr"), "float"),
    Flag("--min-lr", ("optim", "min_lr"), "float", 0.0),
    Flag("--lr-decay-style", ("optim", "schedule"), "str", "linear", {"WSD": "wsd"}),
    Flag("--lr-warmup-iters", ("optim", "warmup_steps"), "int", 0),
    Flag("--lr-decay-iters", ("optim", "decay_steps"), "int"),
    Flag("--weight-decay", ("optim", "weight_decay"), "float", 0.01),
    Flag("--adam-beta1", ("optim", "beta1"), "float", 0.9),
    Flag("--adam-beta2", ("optim", "beta2"), "float", 0.999),
    Flag("--adam-eps", ("optim", "eps"), "float", 1e-8),
    Flag("--clip-grad", ("optim", "clip"), "float", 1.0),
    Flag("--tensor-model-parallel-size", ("parallel", "tp"), "int"),
    Flag("--pipeline-model-parallel-size", ("parallel", "pp"), "int"),
    Flag("--context-parallel-size", ("parallel", "cp"), "int"),
    Flag("--expert-model-parallel-size", ("parallel", "ep"), "int"),
    Flag("--expert-tensor-parallel-size", ("parallel", "etp"), "int"),
    Flag("--sequence-parallel", ("parallel", "sequence_parallel"), "on", False),
    Flag("--use-distributed-optimizer", ("parallel", "distributed_optimizer"), "on", False),
    Flag("--overlap-grad-reduce", ("parallel", "overlap_grad_reduce"), "on", False),
    Flag("--fp8-format", ("fp8", "format"), "str"),
    Flag("--fp8-recipe", ("fp8", "recipe"), "str"),
    Flag("--save", ("run", "dir"), "str"),
    Flag("--save-interval", ("run", "save_every"), "int"),
    Flag("--no-save-optim", ("run", "save_optimizer"), "off", True),
    Flag("--muon-momentum", ("optim", "muon_momentum"), "float"),
    Flag("--muon-nesterov", ("optim", "muon_nesterov"), "on"),
    Flag("--muon-num-ns-steps", ("optim", "muon_steps"), "int"),
    Flag("--muon-coefficient-type", ("optim", "muon_coefficients"), "str"),
    Flag("--muon-scale-mode", ("optim", "muon_scale"), "str"),
    Flag("--muon-extra-scale-factor", ("optim", "muon_extra_scale"), "float"),
    Flag("--muon-no-split-qkv", ("optim", "muon_split_qkv"), "off"),
    Flag("--muon-tp-mode", ("optim", "muon_tp"), "str"),
    Flag("--muon-fp32-matmul-prec", ("optim", "muon_precision"), "str"),
)
#: What Megatron-LM takes where a run with Muon does not say it, and a recipe does otherwise.
_MUON = {"--muon-momentum": 0.9, "--muon-tp-mode": "blockwise"}
#: Keys whose tables are values.
_WHOLE = tuple(flag.key for flag in FLAGS if flag.kind == "files")
_BY_NAME = {flag.name: flag for flag in FLAGS}
#: Flags that set several keys or none of their own, handled one by one below.
_SPECIAL = ("--bf16", "--fp16", "--swiglu", "--squared-relu", "--mock-data", "--group-query-attention")
#: What a recipe's `nvfp4` is there.
_NVFP4 = {"--fp4-format": "e2m1", "--fp4-recipe": "nvfp4"}
#: Keys that say "not at all" by 0, where Megatron-LM leaves the flag out.
_ZERO_IS_NONE = (("optim", "decay_steps"), ("run", "save_every"), ("train", "eval_every"))
#: What Megatron-LM moves the router's expert bias by where the model has one, and a recipe does when asked.
_BIAS, _BIAS_RATE = "--moe-router-enable-expert-bias", "--moe-router-bias-update-rate"
#: Known flags without a counterpart: launch, logging, loading and kernel choices.
SKIPPED = frozenset(
    """--use-mcore-models --transformer-impl --log-interval --distributed-backend --distributed-timeout-minutes
    --tokenizer-type --tokenizer-model --vocab-file --merge-file --num-workers --attention-backend --use-flash-attn
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion --no-rope-fusion --load
    --finetune --no-load-optim --no-load-rng --no-save-rng --exit-on-missing-checkpoint --ckpt-format --log-throughput
    --log-params-norm --log-num-zeros-in-grad --tensorboard-dir --tensorboard-queue-size --wandb-project
    --wandb-exp-name --wandb-save-dir --overlap-param-gather --manual-gc --manual-gc-interval --data-cache-path
    --moe-token-dispatcher-type --moe-permute-fusion --use-checkpoint-args --auto-detect-ckpt-format
    --no-mmap-bin-files --no-position-embedding
    --fp8-amax-history-len --fp8-amax-compute-algo --cross-entropy-loss-fusion --cross-entropy-fusion-impl
    --no-create-attention-mask-in-dataloader --accumulate-allreduce-grads-in-fp32 --attention-softmax-in-fp32
    --async-save --dist-ckpt-strictness --timing-log-level --exit-interval --exit-duration-in-mins
    --tp-comm-overlap --enable-experimental --use-rotary-position-embeddings""".split()
)


@dataclass(frozen=True, slots=True)
class Translation:
    """What a translation gives, the flags or keys it skipped, and those it does not know."""

    result: dict[str, object]
    flags: tuple[str, ...]
    skipped: tuple[str, ...]
    unknown: tuple[str, ...]


def split_flags(text: str) -> list[tuple[str, list[str]]]:
    """Flags of a shell command or script with their values; what stands before the Python script is left out."""
    try:
        words = shlex.split(text.replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise UsageError(f"the command line cannot be read: {error}") from error
    script = next((i for i, word in enumerate(words) if word.endswith(".py")), -1)
    words = words[script + 1 :]
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            found.append((name, [value] if equals else []))
        elif found:
            found[-1][1].append(word)
    return found


def to_recipe(text: str) -> Translation:
    """The recipe that a Megatron-LM command line means; UsageError for a value of the wrong kind."""
    out: dict[str, object] = {}
    skipped, unknown, seen = [], [], set()
    if not (found := split_flags(text)):
        raise UsageError("there is no flag in the command line", hint="a script or a line with `pretrain_gpt.py --…`")
    for name, values in found:
        seen.add(name)
        if name in _BY_NAME:
            flag = _BY_NAME[name]
            _put(out, flag.key, _read(flag, values))
        elif name in SKIPPED:
            skipped.append(" ".join([name, *values]))
        elif name not in _SPECIAL and [_NVFP4.get(name)] != values:
            unknown.append(" ".join([name, *values]))
    has_shape = isinstance(model := out.get("model"), dict) and "shape" in model
    for flag in FLAGS:
        if flag.name not in seen and flag.absent is not None and (flag.key[1] != "shape" or has_shape):
            _put(out, flag.key, flag.absent)
    _put(out, ("train", "precision"), "bf16" if "--bf16" in seen else "fp16" if "--fp16" in seen else "fp32")
    optim = out.get("optim")
    unsaid = {**({_BIAS_RATE: 1e-3} if _BIAS in seen else {}), **(_MUON if _steps_by_muon(optim) else {})}
    for name in unsaid.keys() - seen:
        _put(out, _BY_NAME[name].key, unsaid[name])
    if "--swiglu" in seen:
        _put(out, (*_SHAPE, "gated_linear_unit"), True)
        _put(out, (*_SHAPE, "activation_func"), "silu")
    elif "--squared-relu" in seen:
        _put(out, (*_SHAPE, "activation_func"), "squared_relu")
    if "--mock-data" in seen or "--data-path" in seen:
        _put(out, ("data", "kind"), "mock" if "--mock-data" in seen else "indexed")
    if "--fp8-format" in seen and "--fp8-recipe" not in seen:
        _put(out, ("fp8", "recipe"), "delayed")
    if "--fp4-format" in seen:
        _put(out, ("fp8", "recipe"), "nvfp4")
    if "--expert-tensor-parallel-size" not in seen and "--tensor-model-parallel-size" in seen:
        parallel = out["parallel"]
        assert isinstance(parallel, dict)
        parallel["etp"] = parallel["tp"]
    _put(out, ("model", "init"), "random")
    return Translation(out, (), tuple(skipped), tuple(unknown))


def _read(flag: Flag, values: Sequence[str]) -> object:
    if flag.kind in ("on", "off"):
        if values:
            raise UsageError(f"{flag.name} takes no value, got {' '.join(values)!r}")
        return flag.kind == "on"
    if flag.kind == "files":
        return _blend(flag.name, values)
    if len(values) != 1:
        raise UsageError(f"{flag.name} takes one value, got {len(values)}")
    try:
        if flag.kind == "int":
            return int(values[0])
        if flag.kind == "float":
            return float(values[0])
    except ValueError:
        raise UsageError(f"{flag.name} {values[0]!r} is not a number") from None
    return (flag.words or {}).get(values[0], values[0])


def _blend(name: str, values: Sequence[str]) -> object:
    """One place, several, or several behind their weights."""
    if len(values) < 2:
        return "".join(values)
    weights, places = list(values[::2]), list(values[1::2])
    try:
        numbers = [float(weight) for weight in weights]
    except ValueError:
        return list(values)
    if len(weights) != len(places) or len(set(places)) != len(places):
        raise UsageError(f"{name}: a weight stands in front of each path, each once, got {' '.join(values)!r}")
    return dict(zip(places, numbers, strict=True))


def _blended(value: object) -> list[str]:
    """`_blend`'s values."""
    if isinstance(value, Mapping):
        return [word for place, weight in value.items() for word in (f"{weight:g}", str(place))]
    return [value] if isinstance(value, str) else list(map(str, value)) if isinstance(value, Sequence) else []


def _put(out: dict[str, object], key: tuple[str, ...], value: object) -> None:
    *parents, leaf = key
    here = out
    for parent in parents:
        child = here.setdefault(parent, {})
        assert isinstance(child, dict)
        here = child
    here[leaf] = value


def from_recipe(recipe: Mapping[str, object]) -> Translation:
    """The Megatron-LM flags of a recipe's plain values (`Recipe.to_dict()`); keys without a flag are listed."""
    left = dict(_leaves(recipe, ()))
    flags: list[str] = []
    for flag in FLAGS:
        if flag.key not in left:
            continue
        value = left.pop(flag.key)
        if flag.key[-1].startswith("muon_") and not _steps_by_muon(recipe.get("optim")):
            continue
        if value is None or value == "" or (flag.key == ("train", "recompute") and value == "none"):
            continue
        if value == 0 and flag.key in _ZERO_IS_NONE:
            continue
        if flag.key[0] == "fp8" and left.get(("fp8", "recipe"), value) in ("none", "nvfp4"):
            if value == "nvfp4":
                flags += [word for pair in _NVFP4.items() for word in pair]
            continue
        if flag.kind in ("on", "off"):
            flags += [flag.name] if bool(value) is (flag.kind == "on") else []
        elif flag.kind == "files":
            flags += [flag.name, *_blended(value)]
        else:
            words = {ours: theirs for theirs, ours in (flag.words or {}).items()}
            text = str(int(str(value).removesuffix(".0"))) if flag.kind == "int" else str(value)
            flags += [flag.name, words.get(text, text).replace("{recipe}", str(recipe.get("name", "run")))]
    precision = left.pop(("train", "precision"), "fp32")
    flags += [f"--{precision}"] if precision in ("bf16", "fp16") else []
    if left.pop((*_SHAPE, "gated_linear_unit"), False) and left.get((*_SHAPE, "activation_func")) == "silu":
        left.pop((*_SHAPE, "activation_func"))
        flags.append("--swiglu")
    elif left.get((*_SHAPE, "activation_func")) == "squared_relu":
        left.pop((*_SHAPE, "activation_func"))
        flags.append("--squared-relu")
    if _BIAS in flags and _BIAS_RATE not in flags:
        flags += [_BIAS_RATE, "0.0"]
    if "--num-query-groups" in flags:
        flags.append("--group-query-attention")
    if left.get(("data", "kind")) in ("mock", "indexed"):
        flags += ["--mock-data"] if left.pop(("data", "kind")) == "mock" else []
    left.pop(("model", "init"), None)
    rest = [f"{'.'.join(key)} = {value!r}" for key, value in left.items() if value not in (None, "", (), 0, False)]
    return Translation({}, tuple(flags), tuple(rest), ())


def _steps_by_muon(optim: object) -> bool:
    return isinstance(optim, Mapping) and optim.get("optimizer") == "muon"


def _leaves(value: Mapping[str, object], path: tuple[str, ...]) -> list[tuple[tuple[str, ...], object]]:
    out: list[tuple[tuple[str, ...], object]] = []
    for key, item in value.items():
        if isinstance(item, Mapping) and (*path, key) not in _WHOLE:
            out += _leaves(item, (*path, key))
        elif key not in ("name", "description") or path:
            out.append(((*path, key), item))
    return out
