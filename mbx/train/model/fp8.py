"""FP8 recipes of Transformer Engine, and named errors where the GPU or the layers cannot do them."""

from __future__ import annotations

from converters.errors import DeviceError, UsageError
from converters.rows.expr import Value
from mbx.train.model.parallel import Ranks
from mbx.train.recipe.sections import Fp8, Recipe

#: Compute capability from which a recipe runs, and to which (None: no end). Transformer Engine 2.11, fp8.py:
#: delayed and tensorwise from Ada on, 1x128 blocks on Hopper only, MXFP8 from Blackwell on.
_CAPABILITY: dict[str, tuple[tuple[int, int], tuple[int, int] | None]] = {
    "delayed": ((8, 9), None),
    "tensorwise": ((8, 9), None),
    "blockwise": ((9, 0), (9, 0)),
    "mxfp8": ((10, 0), None),
}

#: Scalings whose casts of a weight depend on the weight alone: frozen weights are held in FP8 only. MXFP8 is left to
#: Transformer Engine, as no GPU with it has run this.
_CAST_AHEAD = ("delayed", "tensorwise", "blockwise")


def holds_casts(recipe: Recipe) -> bool:
    """Whether a run's frozen weights are held in FP8 alone (`mbx.models.megatron.core.frozen`)."""
    return recipe.lora.rank > 0 and recipe.fp8.recipe in _CAST_AHEAD


def fp8_config(fp8: Fp8) -> dict[str, Value]:
    """TransformerConfig fields of the recipe; none without FP8."""
    if fp8.recipe == "none":
        return {}
    config: dict[str, Value] = {"fp8": fp8.format, "fp8_recipe": fp8.recipe}
    if fp8.recipe == "delayed":
        # Transformer Engine's default window and rule (arXiv 2209.05433 takes the maximum of recent history)
        config |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    return config


def check_fp8(recipe: Recipe, ranks: Ranks) -> None:
    """Refuse FP8 where it cannot run, before any group or GPU work: DeviceError, or UsageError for the settings."""
    name = recipe.fp8.recipe
    if name == "none":
        return
    if recipe.train.precision != "bf16":
        raise UsageError(f"fp8.recipe={name} needs train.precision=bf16, got {recipe.train.precision}")
    if ranks.device != "cuda" or not ranks.te:
        raise DeviceError(
            f"fp8.recipe={name} needs a GPU with Transformer Engine; this run is on {ranks.device} with "
            f"{'Transformer Engine' if ranks.te else 'local'} layers",
            hint="fp8.recipe=none trains in bf16",
        )
    import torch

    check_capability(name, torch.cuda.get_device_capability(ranks.local_rank))
    rows = recipe.data.length * recipe.train.micro_batch // (recipe.parallel.tp * recipe.parallel.cp)
    if rows % 16:
        raise UsageError(f"FP8 products need a multiple of 16 tokens a rank, got {rows}", hint="change data.length")


def check_capability(name: str, capability: tuple[int, int]) -> None:
    """DeviceError unless a GPU of `capability` (major, minor) runs the recipe `name`."""
    low, high = _CAPABILITY[name]
    if capability < low or (high is not None and capability > high):
        allowed = [n for n, (lo, hi) in _CAPABILITY.items() if lo <= capability and (hi is None or capability <= hi)]
        span = f"{low[0]}.{low[1]}" + ("" if high is None else f" to {high[0]}.{high[1]}")
        raise DeviceError(
            f"fp8.recipe={name} needs compute capability {span}{'' if high else ' or newer'}; this GPU has "
            f"{capability[0]}.{capability[1]}",
            hint=f"fp8.recipe={allowed[0]}" if allowed else "fp8.recipe=none",
        )
