"""What mbx is measured against on a GPU: a bare Megatron Core loop, and Transformers with PEFT."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator

WARM, MEASURED = 3, 6
#: Micro-batches of a step in the throughput runs, so that the optimizer weighs as it does in training.
ACCUMULATE = 4
GIB = 2**30

Record = dict[str, object]
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False,
}
LORA_SHAPES = ((1, 2048), (4, 2048), (1, 4096))


def bare_run(layers: int, hidden: int, ffn: int, heads: int, tied: bool, length: int, micro: int, fp8: str) -> Record:
    """Megatron Core's parts called by hand on one fixed batch: the same model, kernels, gradients and optimizer."""
    import torch
    import torch.nn.functional as F
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.transformer_config import TransformerConfig

    gc.collect()
    torch.cuda.empty_cache()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1234)
    quantized = {} if fp8 == "none" else {"fp8": "hybrid", "fp8_recipe": fp8}
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=8,
        kv_channels=hidden // heads,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        apply_rope_fusion=True,
        cross_entropy_loss_fusion=True,
        cross_entropy_fusion_impl="te",
        calculate_per_token_loss=True,
        **quantized,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_with_transformer_engine_spec(),
        vocab_size=128256,
        max_sequence_length=131072,
        position_embedding_type="rope",
        rotary_base=500000.0,
        share_embeddings_and_output_weights=tied,
    ).cuda()
    model = Float16Module(config, model)
    ddp = DistributedDataParallel(
        config=config, ddp_config=DistributedDataParallelConfig(grad_reduce_in_fp32=True), module=model
    )
    settings = OptimizerConfig(optimizer="sgd", sgd_momentum=0.0, lr=1e-5, bf16=True, clip_grad=1.0, weight_decay=0.1)
    optimizer = get_megatron_optimizer(settings, [ddp])
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    tokens = torch.randint(0, 128256, (micro, length), device="cuda")
    positions = torch.arange(length, device="cuda").expand(micro, length)

    def forward(batches: Iterator[None], network: torch.nn.Module) -> tuple[torch.Tensor, object]:
        losses = network(tokens, positions, None, labels=tokens)
        count = torch.tensor(losses.numel(), dtype=torch.int, device="cuda")
        return losses, lambda out: (out.float().sum(), count, {"loss": out.detach().sum()})

    schedule = get_forward_backward_func()
    marked = [m for m in ddp.modules() if hasattr(m, "is_first_microbatch")]
    took = []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM + MEASURED):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for module in marked:
            module.is_first_microbatch = True
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        schedule(
            forward_step_func=forward,
            data_iterator=None,
            model=[ddp],
            num_microbatches=ACCUMULATE,
            seq_length=length,
            micro_batch_size=micro,
            forward_only=False,
        )
        optimizer.step()
        torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() / GIB
    del ddp, model, optimizer, schedule, marked
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    return {"tokens_per_s": ACCUMULATE * micro * length / statistics.median(took[WARM:]), "peak_gib": peak}


def peft_runs() -> Iterator[Record]:
    """Transformers + PEFT at the same shapes: rank 64 on all linears, bf16 base, fp32 adapters, AdamW, sdpa."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_default_device("cuda")
    torch.set_default_dtype(torch.bfloat16)
    base = LlamaForCausalLM(LlamaConfig(**LLAMA_8B, attn_implementation="sdpa"))
    torch.set_default_dtype(torch.float32)
    model = get_peft_model(base, LoraConfig(r=64, lora_alpha=128, target_modules="all-linear", task_type="CAUSAL_LM"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.train()
    torch.set_default_device(None)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        for micro, length in LORA_SHAPES:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            ids, took = torch.randint(0, 128256, (micro, length), device="cuda"), []
            for _ in range(WARM + MEASURED):
                torch.cuda.synchronize()
                began = time.perf_counter()
                with torch.autocast("cuda", torch.bfloat16):
                    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                torch.cuda.synchronize()
                took.append(time.perf_counter() - began)
            yield {
                "recompute": recompute,
                "micro": micro,
                "length": length,
                "tokens_per_s": micro * length / statistics.median(took[WARM:]),
                "peak_gib": torch.cuda.max_memory_allocated() / GIB,
            }
