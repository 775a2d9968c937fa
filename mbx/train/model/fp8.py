"""FP8 and FP4 recipes of Transformer Engine, and named errors where the GPU or the layers cannot do them."""

from __future__ import annotations

from converters.errors import DeviceError, UsageError
from converters.rows.expr import Value
from mbx.train.model.parallel import Ranks
from mbx.train.recipe.sections import Fp8, Recipe

#: Compute capability from which a recipe runs, and to which (None: no end). Transformer Engine 2.11, fp8.py:
#: delayed and tensorwise from Ada on, 1x128 blocks on Hopper only, MXFP8 and NVFP4 on data centres' Blackwell. From
#: 12.0 on (RTX 50, GB10) it has no MXFP8 products of all layouts, and its own tests leave NVFP4 out.
CAPABILITY: dict[str, tuple[tuple[int, int], tuple[int, int] | None]] = {
    "delayed": ((8, 9), None),
    "tensorwise": ((8, 9), None),
    "blockwise": ((9, 0), (9, 0)),
    "mxfp8": ((10, 0), (11, 0)),
    "nvfp4": ((10, 0), (11, 0)),
}
#: Elements under one scale: what both sides of a product, and a rank's tokens, divide by.
BLOCKS = {"mxfp8": 32, "nvfp4": 16}

#: Scalings whose casts of a weight depend on the weight alone: frozen weights are held in FP8 only. MXFP8 and NVFP4
#: are left to Transformer Engine, as no GPU with them has run this.
_CAST_AHEAD = ("delayed", "tensorwise", "blockwise")


def holds_casts(recipe: Recipe) -> bool:
    """Whether a run's frozen weights are held in FP8 alone (`mbx.models.megatron.core.frozen`)."""
    return recipe.lora.rank > 0 and recipe.fp8.recipe in _CAST_AHEAD


def fp8_config(fp8: Fp8) -> dict[str, Value]:
    """TransformerConfig fields of the recipe; none without FP8."""
    if fp8.recipe == "none":
        return {}
    if fp8.recipe == "nvfp4":
        return {"fp4": "e2m1", "fp4_recipe": "nvfp4"}
    config: dict[str, Value] = {"fp8": fp8.format, "fp8_recipe": fp8.recipe}
    if fp8.recipe == "delayed":
        # Transformer Engine's default window and rule (arXiv 2209.05433 takes the maximum of recent history)
        config |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    return config


def check_fp8(recipe: Recipe, ranks: Ranks) -> None:
    """Refuse FP8 and FP4 where they cannot run, before any group or GPU work: DeviceError, or UsageError."""
    name = recipe.fp8.recipe
    if name == "none":
        return
    if recipe.train.precision != "bf16":
        raise UsageError(f"fp8.recipe={name} needs train.precision=bf16, got {recipe.train.precision}")
    if name == "nvfp4" and recipe.fp8.format != "hybrid":
        raise UsageError(f"fp8.format={recipe.fp8.format} is of FP8, and fp8.recipe=nvfp4 computes in E2M1")
    if ranks.device != "cuda" or not ranks.te:
        raise DeviceError(
            f"fp8.recipe={name} needs a GPU of compute capability {span(name)} with Transformer Engine; this run is "
            f"on {ranks.device} with {'Transformer Engine' if ranks.te else 'local'} layers",
            hint="fp8.recipe=none trains in bf16",
        )
    import torch

    check_capability(name, torch.cuda.get_device_capability(ranks.local_rank))
    rows = recipe.data.length * recipe.train.micro_batch // (recipe.parallel.tp * recipe.parallel.cp)
    if rows % (multiple := BLOCKS.get(name, 16)):
        raise UsageError(
            f"products of fp8.recipe={name} need a multiple of {multiple} tokens a rank, got {rows}",
            hint="change data.length",
        )


def check_capability(name: str, capability: tuple[int, int]) -> None:
    """DeviceError unless a GPU of `capability` (major, minor) runs the recipe `name`."""
    if not runs_on(name, capability):
        allowed = [other for other in CAPABILITY if runs_on(other, capability)]
        raise DeviceError(
            f"fp8.recipe={name} needs compute capability {span(name)}; this GPU has {capability[0]}.{capability[1]}",
            hint=f"fp8.recipe={allowed[0]}" if allowed else "fp8.recipe=none",
        )


def runs_on(name: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU of `capability` (major, minor) runs the recipe `name`."""
    low, high = CAPABILITY[name]
    return capability >= low and (high is None or capability <= high)


def span(name: str) -> str:
    """The compute capabilities that run the recipe `name`, in words."""
    (major, minor), high = CAPABILITY[name]
    return f"{major}.{minor} " + ("or newer" if high is None else f"to {high[0]}.{high[1]}")
