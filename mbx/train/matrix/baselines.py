"""The same rows through Transformers: every weight trained, or adapters by PEFT."""

from __future__ import annotations

import importlib.util
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F

from converters.errors import DeviceError, UsageError
from mbx.extras import install_line
from mbx.models.transformers.grouped_values import repeated_heads
from mbx.models.transformers.reference import decoding, silent_transformers
from mbx.train.data.batch import to_device
from mbx.train.data.rows import micro_batches
from mbx.train.model.adapted import adapted as adapted_linears
from mbx.train.model.trained_whole import whole_layers
from mbx.train.run import memory
from mbx.train.run.prepare import Prepared

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WARM = 1


def baseline(prepared: Prepared, *, adapted: bool) -> dict[str, object]:
    """Steps of AdamW over the recipe's own batches: tokens a second, losses, peak memory.

    Weights and moments are in the recipe's precision, as a plain script has them; segments of packed rows see one
    another, so that losses are comparable where rows are not packed.
    """
    recipe, ranks = prepared.recipe, prepared.ranks
    if prepared.train_rows is None:
        raise UsageError(f"data.kind `{recipe.data.kind}` is Megatron Core's own and has no baseline")
    if ranks.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        model = _model(prepared, adapted)
        with repeated_heads(model):
            return _steps(prepared, model)
    except torch.cuda.OutOfMemoryError as error:
        raise DeviceError("out of memory: Transformers reached the end of this GPU", details=[str(error)]) from error


def _model(prepared: Prepared, adapted: bool) -> Any:
    from transformers import AutoModelForCausalLM

    recipe, folder = prepared.recipe, prepared.plan.hf
    assert folder is not None
    torch.manual_seed(recipe.train.seed)
    with silent_transformers(kernels=torch.cuda.is_available()):
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            dtype=_DTYPES[recipe.train.precision],
            **decoding(folder),
        )
    model.config.use_cache = False
    if adapted:
        if importlib.util.find_spec("peft") is None:
            raise UsageError("PEFT's baseline needs PEFT", hint=install_line("train"))
        from peft import LoraConfig, get_peft_model

        lora, (modules, parameters) = recipe.lora, _targets(model, prepared)
        whole = whole_layers(lora, prepared.plan)
        settings = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT takes a fraction as well
            lora_dropout=lora.dropout,
            use_dora=lora.dora,
            use_rslora=lora.rslora,
            rank_pattern=dict(lora.rank_pattern),
            alpha_pattern=dict(lora.alpha_pattern),
            target_modules=modules,
            target_parameters=parameters,
            modules_to_save=list(lora.modules_to_save) or None,
            task_type="CAUSAL_LM",
        )
        settings.ensure_weight_tying = bool(whole.names) and whole.tied
        model = get_peft_model(model, settings)
    if recipe.train.recompute == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model.to(prepared.ranks.device).train()


def _targets(model: Any, prepared: Prepared) -> tuple[list[str], list[str]]:
    """What PEFT adapts where the recipe does: modules of Transformers' model, and parameters that hold all experts.

    UsageError where it holds something in other tensors.
    """
    linears = adapted_linears(prepared.recipe.lora, prepared.plan)
    names = {part.module for linear in linears.values() for part in linear.parts}
    modules, parameters = (
        names & {name for name, _ in named} for named in (model.named_modules(), model.named_parameters())
    )
    if lost := sorted(names - modules - parameters):
        raise UsageError(f"PEFT's baseline: Transformers' model has no `{lost[0]}` of its own", details=lost)
    return sorted(modules), sorted(parameters)


def _steps(prepared: Prepared, model: Any) -> dict[str, object]:
    recipe, ranks = prepared.recipe, prepared.ranks
    t, o, rows = recipe.train, recipe.optim, prepared.train_rows
    assert rows is not None
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, o.lr, (o.beta1, o.beta2), o.eps, o.weight_decay)
    losses, times = [], []
    for step in range(t.steps):
        began = time.perf_counter()
        optimizer.zero_grad()
        batches = micro_batches(rows, step, global_batch=t.global_batch, micro_batch=t.micro_batch, dp=1, dp_rank=0)
        sums = torch.zeros(2, device=ranks.device)
        held = [to_device(batch, ranks, 1) for batch in batches]
        count = sum(batch["mask"].sum() for batch in held if batch["mask"] is not None)
        for batch in held:
            tokens, labels, mask = (batch[key] for key in ("tokens", "labels", "mask"))
            assert tokens is not None and labels is not None and mask is not None
            logits = model(input_ids=tokens.view(-1, recipe.data.length)).logits
            each = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
            loss = (each * mask.flatten()).sum()
            torch.autograd.backward(loss / count)
            sums += torch.stack((loss.detach(), mask.sum()))
        torch.nn.utils.clip_grad_norm_(trained, o.clip or float("inf"))
        optimizer.step()
        losses.append(float(sums[0] / sums[1].clamp(min=1)))
        times.append(time.perf_counter() - began)
    took = statistics.median(times[WARM:] or times)
    return {
        "tokens_per_s": t.global_batch * recipe.data.length / took,
        "first_step_s": times[0],
        "step_s": took,
        "losses": losses,
        "peak_gib": memory.peak_gib(ranks.device),
        "predicted_gib": None,
        "device": ranks.device,
    }
