"""Flags of Megatron-LM's `pretrain_gpt.py` and the recipe keys that they set.

Source: megatron/training/arguments.py of Megatron-LM core_v0.16.1, Muon's of core_v0.18.0 and core_v0.19.0, which
agree. Up to core_v0.17.1 Nesterov's momentum has another name there, and 0.16.1 has no `--muon-coefficient-type`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Value = bool | int | float | str


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag and the recipe key it sets. `kind`: int, float, str, or on / off for a flag that takes no value.

    `absent` is what the key is when the flag is not given, None where the recipe's own default means the same.
    `words` renames values: Megatron-LM's → the recipe's. `lacks`: values of the recipe that the flag does not take.
    """

    name: str
    key: tuple[str, ...]
    kind: str
    absent: Value | None = None
    words: Mapping[str, str] | None = None
    lacks: tuple[Value, ...] = ()


def _shape(kind: str, fields: str) -> list[Flag]:
    return [Flag("--" + f.replace("_", "-"), ("model", "shape", f), kind) for f in fields.split()]


SHAPE = ("model", "shape")
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
    Flag("--num-experts", (*SHAPE, "num_moe_experts"), "int"),
    Flag("--norm-epsilon", (*SHAPE, "layernorm_epsilon"), "float"),
    Flag("--disable-bias-linear", (*SHAPE, "add_bias_linear"), "off", True),
    Flag("--vocab-size", (*SHAPE, "model.vocab_size"), "int"),
    Flag("--max-position-embeddings", (*SHAPE, "model.max_sequence_length"), "int"),
    Flag("--position-embedding-type", (*SHAPE, "model.position_embedding_type"), "str", "learned_absolute"),
    Flag("--rotary-base", (*SHAPE, "model.rotary_base"), "int"),
    Flag("--rotary-percent", (*SHAPE, "model.rotary_percent"), "float"),
    Flag("--use-rope-scaling", (*SHAPE, "model.rope_scaling"), "on"),
    Flag("--rope-scaling-factor", (*SHAPE, "model.rope_scaling_factor"), "float"),
    Flag("--untie-embeddings-and-output-weights", (*SHAPE, "model.share_embeddings_and_output_weights"), "off", True),
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
    Flag("--muon-fp32-matmul-prec", ("optim", "muon_precision"), "str", lacks=("highest",)),
)
#: What Megatron-LM (core_v0.16.1 to core_v0.19.0 alike) takes where a run with Muon does not say it, and a recipe does
#: otherwise.
MUON_DEFAULTS = {"--muon-momentum": 0.9, "--muon-tp-mode": "blockwise"}
#: Keys whose tables are values.
WHOLE = tuple(flag.key for flag in FLAGS if flag.kind == "files")
BY_NAME = {flag.name: flag for flag in FLAGS}
#: A name up to core_v0.17.1 is read as well.
BY_NAME["--muon-use-nesterov"] = BY_NAME["--muon-nesterov"]
#: Flags that set several keys or none of their own, handled one by one.
SPECIAL = ("--bf16", "--fp16", "--swiglu", "--squared-relu", "--mock-data", "--group-query-attention")
#: What a recipe's `nvfp4` is there.
NVFP4 = {"--fp4-format": "e2m1", "--fp4-recipe": "nvfp4"}
#: Keys that say "not at all" by 0, where Megatron-LM leaves the flag out.
ZERO_IS_NONE = (("optim", "decay_steps"), ("run", "save_every"), ("train", "eval_every"))
#: What Megatron-LM moves the router's expert bias by where the model has one, and a recipe does when asked.
BIAS, BIAS_RATE = "--moe-router-enable-expert-bias", "--moe-router-bias-update-rate"
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
