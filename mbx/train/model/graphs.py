"""Whether a run's passes are recorded as a CUDA graph (`mbx.train.run.graph`)."""

from __future__ import annotations

from collections.abc import Mapping

from converters.rows.expr import Value
from mbx.train.model.config import gpu_config
from mbx.train.model.experts import joins_experts
from mbx.train.model.kernels import unpacked_layers
from mbx.train.model.parallel import Ranks
from mbx.train.model.sight import learns
from mbx.train.recipe.sections import Recipe


def turns_packed(config: Mapping[str, Value]) -> bool:
    """Whether rotary positions of packed rows are one kernel; Megatron Core's own loops over the examples."""
    fused = {**gpu_config(config), **config}.get("apply_rope_fusion")
    return bool(fused) or config.get("model.position_embedding_type") in ("none", "learned_absolute")


def why_not(recipe: Recipe, config: Mapping[str, Value], ranks: Ranks) -> str | None:
    """What of a run no graph can hold, in words; None where its passes are recorded."""
    t, p = recipe.train, recipe.parallel
    dropout = recipe.lora.dropout or config.get("hidden_dropout") or config.get("attention_dropout")
    reasons: dict[str, object] = {
        "train.cuda_graph=off": t.cuda_graph == "off",
        "graphs are recorded on GPUs with Transformer Engine": ranks.device != "cuda" or not ranks.te,
        "packed rows are turned example by example, which the processor counts (data.pack=false)": recipe.data.packs
        and not unpacked_layers(config, te=ranks.te)
        and not turns_packed(config),
        "pipeline stages wait for one another": p.pp > 1,
        "context parallelism exchanges parts of a row": p.cp > 1,
        "experts wait for their tokens' counts": config.get("num_moe_experts")
        and not joins_experts(recipe, config, ranks),
        "prediction layers": config.get("mtp_num_layers"),
        "a teacher's pass lies inside": recipe.distill.teacher,
        "a tower that learns reads images of any size": learns(recipe),
        "passes are timed (run.stragglers)": recipe.run.stragglers,
        "dropout draws anew each time": dropout,
        "recomputation puts random streams back": t.recompute != "none",
        "the loss scale of fp16 changes": t.precision == "fp16",
        "delayed scaling of FP8 keeps a history outside": recipe.fp8.recipe == "delayed",
        "NVFP4 rounds at random, and no GPU has recorded it": recipe.fp8.recipe == "nvfp4",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
