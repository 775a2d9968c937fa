"""FP8 and FP4 recipes: the fields that they become, the GPUs and the sizes that they need, and what they take."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from converters.errors import DeviceError, UnsupportedError, UsageError
from mbx.cli import doctor
from mbx.models.megatron import config as megatron_config
from mbx.train.budget.blocks import check_blocks
from mbx.train.budget.counts import count
from mbx.train.budget.devices import DEVICES, peak_tflops
from mbx.train.budget.fit import casts, fit
from mbx.train.budget.load import Load
from mbx.train.budget.predict import predict
from mbx.train.budget.shape import shape_of
from mbx.train.model.blueprint import blueprint
from mbx.train.model.config import train_config
from mbx.train.model.fp8 import CAPABILITY, check_capability, check_fp8, fp8_config
from mbx.train.model.parallel import Ranks, spread_of
from mbx.train.recipe.catalogue import load_recipe
from mbx.train.recipe.sections import Fp8, Recipe

GPU = Ranks(0, 1, 0, 1, "cuda", te=True)
CPU = Ranks(0, 1, 0, 1, "cpu", te=False)


def recipe_of(*overrides: str, name: str = "llama32_1b_pretrain") -> Recipe:
    return load_recipe(name, ["train.micro_batch=1", "data.length=4096", *overrides])


@pytest.mark.parametrize(
    ("name", "capability", "fits"),
    [
        ("delayed", (9, 0), True),
        ("delayed", (8, 9), True),
        ("delayed", (8, 0), False),
        ("tensorwise", (9, 0), True),
        ("blockwise", (9, 0), True),
        ("blockwise", (8, 9), False),
        ("mxfp8", (9, 0), False),
        ("mxfp8", (10, 0), True),
        ("mxfp8", (10, 3), True),
        ("mxfp8", (12, 0), False),
        ("nvfp4", (9, 0), False),
        ("nvfp4", (10, 0), True),
        ("nvfp4", (12, 1), False),
    ],
)
def test_a_recipe_is_for_some_gpus(
    name: str, capability: tuple[int, int], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    recipe = recipe_of(f"fp8.recipe={name}")
    if fits:
        check_fp8(recipe, GPU)
        return
    words = rf"fp8.recipe={name} needs compute capability .*; this GPU has {capability[0]}\.{capability[1]}"
    with pytest.raises(DeviceError, match=words):
        check_fp8(recipe, GPU)
    with pytest.raises(DeviceError, match=words):
        check_capability(name, capability)


def test_there_is_no_such_recipe_on_a_cpu() -> None:
    for name, capability in {"mxfp8": "10.0 to 11.0", "nvfp4": "10.0 to 11.0", "delayed": "8.9 or newer"}.items():
        with pytest.raises(DeviceError, match=f"needs a GPU of compute capability {capability} with Transformer"):
            check_fp8(recipe_of(f"fp8.recipe={name}"), CPU)


def test_settings_that_do_not_go_together_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    with pytest.raises(UsageError, match="fp8.format=e4m3 is of FP8"):
        check_fp8(recipe_of("fp8.recipe=nvfp4", "fp8.format=e4m3"), GPU)
    for name, length, block in (("mxfp8", 4080, 32), ("nvfp4", 4088, 16)):
        with pytest.raises(UsageError, match=f"a multiple of {block} tokens a rank, got {length}"):
            check_fp8(recipe_of(f"fp8.recipe={name}", f"data.length={length}"), GPU)
    check_fp8(recipe_of("fp8.recipe=nvfp4", "data.length=4080"), GPU)


def test_products_that_blocks_do_not_divide_are_named() -> None:
    for name, ffn, block in (("mxfp8", 8208, 32), ("nvfp4", 8200, 16)):
        recipe = recipe_of(f"fp8.recipe={name}", f"model.config.ffn_hidden_size={ffn}")
        words = rf"fp8.recipe={name} needs multiples of {block} on both sides .* not so: mlp\.linear_fc2$"
        with pytest.raises(UsageError, match=words) as caught:
            check_blocks(recipe, blueprint(recipe))
        assert caught.value.details == (f"`mlp.linear_fc2` of layer 0: [2048, {ffn}]",)
    whole = recipe_of("fp8.recipe=mxfp8", "model.config.ffn_hidden_size=8256")
    check_blocks(whole, blueprint(whole))
    cut = recipe_of("fp8.recipe=mxfp8", "model.config.ffn_hidden_size=8256", "parallel.tp=8")
    with pytest.raises(UsageError, match="not so: .*mlp.linear_fc2") as caught:
        check_blocks(cut, blueprint(cut))
    assert "`mlp.linear_fc2` of layer 0: [2048, 1032]" in caught.value.details
    for name in ("none", "tensorwise"):
        odd = recipe_of(f"fp8.recipe={name}", "model.config.ffn_hidden_size=8200")
        check_blocks(odd, blueprint(odd))


@pytest.mark.parametrize(
    ("capability", "lacks"), [((9, 0), "compute capability 10.0 to 11.0"), ((10, 0), None), ((12, 0), "MXFP8")]
)
def test_doctor_says_whether_a_gpu_has_them(capability: tuple[int, int], lacks: str | None) -> None:
    installed = {name for _, names in doctor._JOBS.values() for name in names}
    verdicts = doctor._verdicts(installed, {"devices": [{"capability": list(capability)}]})
    assert verdicts["train in FP8"]["ok"]
    said = verdicts["train in MXFP8 and NVFP4"]
    assert said["ok"] == (lacks is None) and (lacks or "") in " ".join(said["lacks"])


@pytest.mark.parametrize("name", CAPABILITY)
def test_the_config_is_what_megatron_core_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built as on a GPU that has it: TransformerConfig's own checks pass, and a wrong word does not."""
    monkeypatch.setattr(megatron_config, "_check_te", lambda *_: None)
    ends = ("first_last_layers_bf16=true", "num_layers_at_start_in_bf16=1", "num_layers_at_end_in_bf16=4")
    kept = [f"model.config.{one}" for one in ends] if name in ("mxfp8", "nvfp4") else []
    recipe = recipe_of(f"fp8.recipe={name}", *kept)
    plan = blueprint(recipe)
    flat = {**train_config(recipe, plan, GPU), "apply_rope_fusion": False}  # whose kernel is not installed here
    built = megatron_config.transformer_config(flat, spread_of(recipe, GPU), use_te=True)
    if name == "nvfp4":
        assert (built.fp4, built.fp4_recipe, built.fp8) == ("e2m1", "nvfp4", None)
        with pytest.raises(UnsupportedError, match="cannot be used simultaneously"):
            megatron_config.transformer_config(
                {**flat, "fp8": "hybrid", "fp8_recipe": "mxfp8"}, spread_of(recipe, GPU), use_te=True
            )
    else:
        assert (built.fp8, built.fp8_recipe, built.fp4) == ("hybrid", name, None)
    assert built.bf16 and built.num_layers_at_end_in_bf16 == (4 if kept else 1)
    assert fp8_config(Fp8()) == {}


def test_the_budget_knows_bytes_of_casts() -> None:
    """Of a weight two copies: a byte an element, with one for 32 in MXFP8, half a byte with one for 16 in NVFP4."""

    def parts(name: str, *overrides: str) -> dict[str, int]:
        recipe = recipe_of(f"fp8.recipe={name}", *overrides)
        return dict(predict(recipe, blueprint(recipe), 1).parts)

    plain = recipe_of()
    counts = count(plain, blueprint(plain), 0)
    assert "fp8 copies" not in parts("none")
    for name, size in {"tensorwise": 1.0, "mxfp8": 33 / 32, "nvfp4": 9 / 16}.items():
        assert parts(name)["fp8 copies"] == round(2 * counts.linears * size)
    dropped = round((2 * counts.linears - counts.normed) * 9 / 16)
    assert parts("nvfp4", "train.recompute=full")["fp8 copies"] == dropped
    plan = blueprint(plain)
    kept = {
        name: Load(recipe_of(f"fp8.recipe={name}"), plan, shape_of(plan.config), 4096).seen("linear_fc1")
        for name in ("none", "mxfp8", "nvfp4")
    }
    assert kept == {"none": 2.0, "mxfp8": 33 / 32, "nvfp4": 9 / 16}


def test_a_gpu_that_has_not_the_recipe_is_no_place_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mxfp8", "nvfp4"):
        recipe = recipe_of(f"fp8.recipe={name}")
        assert fit(recipe, blueprint(recipe), DEVICES["b200"], 1).needed > 0
        for other in ("h200", "rtx5090", "gb10"):
            with pytest.raises(DeviceError, match=f"fp8.recipe={name} needs compute capability 10.0 to 11.0"):
                fit(recipe, blueprint(recipe), DEVICES[other], 1)
        odd = replace(recipe, model=replace(recipe.model, config={**recipe.model.config, "ffn_hidden_size": 8200}))
        with pytest.raises(UsageError, match="on both sides"):
            fit(odd, blueprint(odd), DEVICES["b200"], 1)
    plain = recipe_of()
    assert [casts(DEVICES[name], plain) for name in ("b200", "rtx5090", "h200", "a100-80")] == [
        ["tensorwise", "mxfp8"],
        ["tensorwise"],
        ["tensorwise", "blockwise"],
        [],
    ]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA B200")
    assert [peak_tflops(recipe_of(f"fp8.recipe={name}")) for name in ("none", "mxfp8", "nvfp4")] == [2250, 4500, 9000]
