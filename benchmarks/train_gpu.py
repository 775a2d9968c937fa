"""Training on GPUs, measured: throughput beside a bare Megatron Core loop, LoRA beside PEFT, the budget, FP8.

    python benchmarks/train_gpu.py                  every part, on one GPU or two
    python benchmarks/train_gpu.py throughput lora  some parts
    python benchmarks/train_gpu.py --list

Prints one JSON record a measurement as it comes, and tables at the end. Weights are random: speed and memory do not
depend on them. Each group of measurements is a process of its own; with two GPUs, two groups run side by side.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARK = "RECORD "
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


def emit(**record: object) -> None:
    """Print a record for the parent process to collect."""
    print(MARK + json.dumps(record), flush=True)


# --- mbx ---


def mbx_run(name: str, overrides: list[str], folder: Path, steps: int = WARM + MEASURED) -> Record:
    """Median tokens/s behind the warm-up, peak memory, losses, and the budget's prediction, of one short run."""
    import torch

    from mbx.train.budget import predict
    from mbx.train.catalogue import load_recipe
    from mbx.train.loop import train
    from mbx.train.prepare import prepare

    if "MASTER_PORT" in os.environ:  # a rendezvous of its own for each run
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated() / GIB
    common = [
        "model.init=random",
        "run.save=false",
        f"run.dir={folder / str(time.monotonic_ns())}",
        f"train.steps={steps}",
    ]
    recipe = load_recipe(name, [*common, *overrides])
    prepared = prepare(recipe)
    seen = []
    outcome = train(prepared, live=False, on_step=seen.append)
    budget = predict(recipe, prepared.plan, prepared.ranks.dp)
    return {
        "tokens_per_s": statistics.median(step.tokens_per_s for step in seen[WARM:] or seen),
        "tflops": statistics.median(step.tflops for step in seen[WARM:] or seen),
        "peak_gib": seen[-1].memory_gib,
        "left_before_gib": before,
        "predicted_gib": budget.total / GIB,
        "parts_gib": {part: value / GIB for part, value in budget.parts.items()},
        "losses": [round(loss, 5) for loss in outcome.losses],
    }


def full_overrides(length: int, micro: int) -> list[str]:
    """A full-parameter run with SGD, whose state leaves room for 8B weights on one GPU."""
    return [
        "data.kind=pattern",
        f"data.length={length}",
        f"train.micro_batch={micro}",
        f"train.global_batch={micro * ACCUMULATE}",
        "train.eval_every=0",
        "optim.optimizer=sgd",
        "optim.warmup_steps=0",
    ]


# --- a bare loop ---


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


# --- PEFT ---


def peft_runs() -> None:
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
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        for micro, length in LORA_SHAPES:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            ids, took = torch.randint(0, 128256, (micro, length)), []
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
            emit(
                part="lora",
                side="peft",
                recompute=recompute,
                micro=micro,
                length=length,
                tokens_per_s=micro * length / statistics.median(took[WARM:]),
                peak_gib=torch.cuda.max_memory_allocated() / GIB,
            )


# --- the groups ---


def throughput(folder: Path) -> None:
    """mbx beside the bare loop, in turns, in one process: Llama 1B and 8B shapes, bf16 and FP8.

    The 8B shape has 24 of its 32 layers: with fp32 gradients, weights and momentum (Transformer Engine's SGD allocates
    it always) and the FP8 copies, all 32 would come within 4 GiB of the GPU's memory.
    """
    shapes = (
        ("llama32_1b_pretrain", dict(layers=16, hidden=2048, ffn=8192, heads=32, tied=True, length=4096, micro=2)),
        ("llama3_8b_pretrain", dict(layers=24, hidden=4096, ffn=14336, heads=32, tied=False, length=4096, micro=1)),
    )
    for name, shape in shapes:
        for fp8 in ("none", "tensorwise"):
            overrides = full_overrides(int(shape["length"]), int(shape["micro"]))
            overrides.append(f"model.shape.num_layers={shape['layers']}")
            found = mbx_run(name, [*overrides, f"fp8.recipe={fp8}"], folder)
            emit(part="throughput", side="mbx", model=name, fp8=fp8, **found)
            emit(part="throughput", side="bare", model=name, fp8=fp8, **bare_run(**shape, fp8=fp8))
    for fp8 in ("delayed", "blockwise"):
        name, shape = shapes[1]
        found = mbx_run(name, [*full_overrides(4096, 1), "model.shape.num_layers=24", f"fp8.recipe={fp8}"], folder)
        emit(part="throughput", side="mbx", model=name, fp8=fp8, **found)


def lora(folder: Path) -> None:
    """mbx at PEFT's shapes."""
    tp = int(os.environ["WORLD_SIZE"])
    for recompute in ("none", "full"):
        for micro, length in LORA_SHAPES:
            overrides = [
                "data.kind=pattern",
                f"data.length={length}",
                f"train.micro_batch={micro}",
                f"train.global_batch={micro}",
                "optim.warmup_steps=0",
                "lora.rank=64",
                "lora.alpha=128",
                f"parallel.tp={tp}",
                f"train.recompute={recompute}",
            ]
            found = mbx_run("llama3_8b_lora", overrides, folder)
            emit(part="lora", side="mbx", tp=tp, recompute=recompute == "full", micro=micro, length=length, **found)


def budget(folder: Path) -> None:
    """Predicted beside measured memory: full and LoRA, bf16 and FP8, recompute on and off, two lengths, at this tp."""
    tp = int(os.environ["WORLD_SIZE"])
    for method in ("pretrain", "lora"):
        for fp8 in ("none", "tensorwise"):
            for recompute in ("none", "full"):
                for length in (2048, 8192):
                    overrides = [
                        "data.kind=pattern",
                        f"data.length={length}",
                        "train.micro_batch=1",
                        "train.global_batch=1",
                        "train.eval_every=0",
                        "optim.warmup_steps=0",
                        f"parallel.tp={tp}",
                        f"train.recompute={recompute}",
                        f"fp8.recipe={fp8}",
                    ]
                    found = mbx_run(f"llama32_1b_{method}", overrides, folder, steps=4)
                    emit(part="budget", method=method, tp=tp, fp8=fp8, recompute=recompute, length=length, **found)


def vanilla(folder: Path) -> None:
    """Ten losses of `vanilla_gpt`, setting (a) on one GPU and (b) on two, with and without Megatron-LM's dropout."""
    tp = int(os.environ["WORLD_SIZE"])
    setting = []
    if tp == 2:
        setting = [
            "parallel.tp=2",
            "model.shape.num_layers=4",
            "model.shape.model.vocab_size=1025",
            "model.shape.model.max_sequence_length=1024",
            "data.length=1024",
            "train.micro_batch=2",
            "train.global_batch=16",
            "optim.lr=1e-4",
            "optim.min_lr=0.0",
        ]
    for dropout in (0.1, 0.0):
        more = [f"model.config.hidden_dropout={dropout}", f"model.config.attention_dropout={dropout}"]
        emit(part="vanilla", tp=tp, dropout=dropout, **mbx_run("vanilla_gpt", [*setting, *more], folder, steps=10))


def updates(folder: Path) -> None:
    """Losses on a learnable sequence in bf16 and under each FP8 recipe: they must fall alike."""
    for fp8 in ("none", "tensorwise", "delayed", "blockwise"):
        overrides = [
            "data.kind=pattern",
            "data.length=1024",
            "train.micro_batch=4",
            "train.global_batch=8",
            "train.eval_every=0",
            "optim.warmup_steps=2",
            "model.shape.num_layers=2",
            f"fp8.recipe={fp8}",
        ]
        emit(part="updates", fp8=fp8, **mbx_run("llama32_1b_pretrain", overrides, folder, steps=30))


GROUPS = {
    "throughput": throughput,
    "lora": lora,
    "peft": lambda folder: peft_runs(),
    "budget": budget,
    "vanilla": vanilla,
    "updates": updates,
}
#: What runs on one GPU, in the order of weight; and what runs on both with tensor parallelism.
ONE, BOTH = ("lora", "throughput", "peft", "budget", "vanilla", "updates"), ("lora", "budget", "vanilla")


# --- the parent ---


def spawn(groups: list[str], gpus: list[int], port: int, folder: Path) -> list[subprocess.Popen[str]]:
    """Processes, one a GPU, that run `groups` one after the other."""
    started = []
    for rank in range(len(gpus)):
        env = os.environ | {
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(len(gpus)),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "PYTHONWARNINGS": "ignore",
            "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        }
        if len(gpus) > 1:
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        log = (folder / f"{'-'.join(groups)}-{len(gpus)}.{rank}.err").open("w")
        arguments = [sys.executable, __file__, "--group", ",".join(groups), "--folder", str(folder)]
        started.append(subprocess.Popen(arguments, env=env, stdout=subprocess.PIPE, stderr=log, text=True))
    return started


def collect(worlds: list[list[subprocess.Popen[str]]], records: list[Record], deadline: float) -> None:
    """Wait for every process; rank 0's records are printed and kept. A failed process ends its world."""
    import threading

    def read(process: subprocess.Popen[str], keep: bool) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(MARK) and keep:
                records.append(json.loads(line[len(MARK) :]))
                print(line[len(MARK) :].rstrip(), flush=True)

    threads = [
        threading.Thread(target=read, args=(process, rank == 0), daemon=True)
        for world in worlds
        for rank, process in enumerate(world)
    ]
    for thread in threads:
        thread.start()
    while any(process.poll() is None for world in worlds for process in world):
        for world in worlds:
            if any(process.poll() for process in world) or time.monotonic() > deadline:
                for process in world:
                    process.kill()
        time.sleep(0.5)
    for thread in threads:
        thread.join()


def tables(records: list[Record]) -> None:
    """The figures side by side."""

    def of(part: str, **match: object) -> list[Record]:
        return [r for r in records if r["part"] == part and all(r.get(k) == v for k, v in match.items())]

    print("\nthroughput, tokens/s (peak GiB)")
    for r in of("throughput", side="mbx"):
        bare = of("throughput", side="bare", model=r["model"], fp8=r["fp8"])
        beside = f"bare {bare[0]['tokens_per_s']:,.0f} ({bare[0]['peak_gib']:.1f})" if bare else ""
        ratio = f"ratio {r['tokens_per_s'] / bare[0]['tokens_per_s']:.3f}" if bare else ""
        print(
            f"  {r['model']:<20} {r['fp8']:<11} mbx {r['tokens_per_s']:,.0f} ({r['peak_gib']:.1f})  {beside}  {ratio}"
        )
    print("\nLoRA at the 8B shape, rank 64")
    for r in of("lora", side="mbx"):
        other = of("lora", side="peft", micro=r["micro"], length=r["length"], recompute=r["recompute"])
        beside = f"PEFT {other[0]['peak_gib']:.1f} GiB {other[0]['tokens_per_s']:,.0f} tok/s" if other else ""
        print(
            f"  {r['micro']} x {r['length']} recompute {str(r['recompute']):<5} tp {r['tp']}: {r['peak_gib']:.1f} GiB "
            f"(predicted {r['predicted_gib']:.1f}) {r['tokens_per_s']:,.0f} tok/s  {beside}"
        )
    print("\nbudget, GiB")
    for r in of("budget"):
        error = r["predicted_gib"] / r["peak_gib"] - 1
        print(
            f"  {r['method']:<8} tp {r['tp']} fp8 {r['fp8']:<10} recompute {r['recompute']:<4} {r['length']:>5}: "
            f"predicted {r['predicted_gib']:.2f} measured {r['peak_gib']:.2f} ({error:+.1%})"
        )
    for part in ("vanilla", "updates"):
        print(f"\n{part}: losses")
        for r in of(part):
            label = {k: r[k] for k in ("tp", "dropout", "fp8") if k in r}
            print(f"  {label} {r['losses'] if part == 'vanilla' else r['losses'][::10]}")


def main() -> None:
    """Run the parts named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*")
    parser.add_argument("--list", action="store_true", help="list the parts")
    parser.add_argument("--out", type=Path, help="write every record here, as JSON lines")
    parser.add_argument("--seconds", type=float, default=460.0, help="stop what still runs after this time")
    parser.add_argument("--group", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.list:
        print("\n".join(GROUPS))
        return
    if options.group:
        import transformer_engine.pytorch  # noqa: F401  # before the first CUDA call

        for group in options.group.split(","):
            GROUPS[group](options.folder)
        return
    import torch

    parts = options.parts or list(GROUPS)
    gpus = torch.cuda.device_count()
    deadline, records = time.monotonic() + options.seconds, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one = [group for group in ONE if group in parts]
        halves = [one[0::2], one[1::2]] if gpus > 1 else [one]
        collect([spawn(half, [n], 0, folder) for n, half in enumerate(halves) if half], records, deadline)
        both = [group for group in BOTH if group in parts]
        if gpus > 1 and both:
            collect([spawn(both, [0, 1], 29600, folder)], records, deadline)
        for log in sorted(folder.glob("*.err")):
            text = log.read_text()
            if "Error" in text:
                print(f"--- {log.name}\n{text[-2500:]}")
    if options.out:
        options.out.write_text("".join(json.dumps(record) + "\n" for record in records))
    tables(records)


if __name__ == "__main__":
    main()
