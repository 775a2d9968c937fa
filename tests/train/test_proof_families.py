"""`mbx verify training` passes for every tiny family that trains on a CPU, in every layout, or is refused by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from _trainings import Raw, run_world
from test_proof import LORA, recipe

from converters.errors import LayoutError, UnsupportedError
from fixtures.make_tiny import NAMES, make
from mbx.train.proof.training import Report, verify_training
from mbx.train.recipe.parse import parse_recipe

#: Other models in Megatron Core (`test_families.py`), those that train with Transformer Engine only, and FP8 blocks.
ELSEWHERE = frozenset(
    (
        *("exaone4_1_2b", "gpt_oss_mxfp4", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"),
        *("nemotron_h", "nemotron_nano_v2", "nemotron_nano_v3", "nemotron_super", "deepseek_v3_fp8"),
        *("glm_5", "glm_5_2", "deepseek_v32", "falcon_h1_0_5b", "exaone_moe"),
        *("lfm2", "lfm2_moe", "kimi_linear", "kimi_k3"),
    )
)
#: Every tiny family that trains on a CPU.
FAMILIES = tuple(name for name in NAMES if name not in ELSEWHERE)
#: Worlds of two processes that share them.
PARTS = 9
#: Whose experts have biases, which train with Transformer Engine only, or which choose keys by what has no module.
ADAPTERS_ALONE = ("gpt_oss", "minimax_m3")
#: Whose tokenizer Transformers reads with the folder's own code only: their rows count up.
WITHOUT_TOKENIZER = ("llama_nemotron", "kimi_k2")
#: Of other tensors in Transformers than on disk, or of other names in the checkpoint than in the model, which take no
#: adapter of the folder.
WITHOUT_PEFT = ("gemma4_31b", "gemma4_e2b", "gemma4_26b", "llama_nemotron", "sarvam_moe", "bailing_moe_v2", "deepseek")
WITHOUT_PEFT += ("step_3_5_flash",)  # a gate's row stands in Megatron Core once for each channel of its head
#: Linears of latent attention, those without a norm behind them, and those that PEFT loads (docs/training.md).
TARGETS: dict[str, list[str]] = {
    **dict.fromkeys(("gemma2", "gemma3_text", "glm4", "olmo2", "olmo3", "exaone4_32b"), ["linear_qkv", "linear_fc1"]),
    **dict.fromkeys(
        (
            "glm4_moe",
            "glm4_moe_air",
            "dots1",
            "hy3",
            "exaone_moe_alone",
            "ernie4_5_moe",
            "mimo_v2_flash",
            "llama4_scout",
            "llama4_maverick",
        ),
        ["linear_qkv", "linear_proj"],
    ),
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "kimi_k2", "glm_4_7_flash"),
        ["linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj", "linear_proj"],
    ),
    **dict.fromkeys(
        ("deepseek_v2_lite", "moonlight"), ["linear_q_proj", "linear_kv_down_proj", "linear_kv_up_proj", "linear_proj"]
    ),
}


def of_family(folder: Path, family: str, adapters: bool, **sections: dict[str, object]) -> Raw:
    targets = {"targets": TARGETS[family]} if family in TARGETS else {}
    more = {"lora": {**LORA, **targets}} if adapters else {}
    made = recipe(folder, family, **sections, **more)
    if family in WITHOUT_TOKENIZER:
        made["data"] = {"kind": "pattern", "length": 32}
    return made


def unproven(report: Report | None) -> list[tuple[str, str]]:
    """Legs that failed or did not run: every family has something to say in each."""
    assert report is not None and len(report.legs) == 12
    return [(leg.name, leg.status) for leg in report.legs if leg.status != "passed"]


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes(family: str, adapters: bool, tmp_path: Path) -> None:
    asked = parse_recipe(of_family(tmp_path, family, adapters))
    if not adapters and family in ADAPTERS_ALONE:
        with pytest.raises(UnsupportedError, match="Transformer Engine only|adapters alone"):
            verify_training(asked)
    elif adapters and family in WITHOUT_PEFT:
        with pytest.raises(UnsupportedError, match="adapter"):
            verify_training(asked)
    else:
        assert unproven(verify_training(asked)) == []


def test_fp8_blocks_that_transformers_cannot_decode_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="FP8 blocks"):
        verify_training(parse_recipe(recipe(tmp_path, "deepseek_v3_fp8")))


def test_prediction_layers_behind_a_list_of_windowed_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="not what prediction layers are"):
        verify_training(parse_recipe(of_family(tmp_path, "exaone_moe", False)))


def layouts_pass(folder: Path, jobs: dict[str, Raw]) -> None:
    found = run_world(2, [{"recipe": job, "verify": True} for job in jobs.values()], folder / "legs.json")
    bad = {name: [leg for leg in legs if leg[1] != "passed"] for name, legs in zip(jobs, found, strict=True)}
    assert {name: legs for name, legs in bad.items() if legs} == {}
    assert all(len(legs) == 12 for legs in found)


def test_two_processes_pass(tmp_path: Path) -> None:
    layouts_pass(
        tmp_path,
        {
            "tp, adapters": of_family(tmp_path, "qwen3", True, parallel={"tp": 2}),
            "tp, norms over heads": of_family(tmp_path, "olmo2", False, parallel={"tp": 2}),
        },
    )


@pytest.mark.slow
def test_experts_pass_on_two_shares_of_the_data(tmp_path: Path) -> None:
    layouts_pass(tmp_path, {"dp, experts": of_family(tmp_path, "qwen3_moe", False)})


def shared_out(config: dict[str, object], axis: str) -> bool:
    """Whether two processes of a CPU can share a model along `axis`.

    Latent attention is shared by tensor parallelism on GPUs only, and all stages have as many layers.
    """
    return (
        not config.get("kv_lora_rank")
        if axis == "tp"
        else int(str(config.get("num_hidden_layers", config.get("n_layer")))) % 2 == 0
    )


def spread(folder: Path, families: Sequence[str], axis: str, *, shared: bool = True) -> dict[str, Raw]:
    """Recipes of those of some families that two processes can share along `axis`, or cannot."""
    jobs = {}
    for family in families:
        config = json.loads((make(family, folder / family) / "config.json").read_text())
        for adapters in (False, True):
            if shared_out(config, axis) == shared and family not in (WITHOUT_PEFT if adapters else ADAPTERS_ALONE):
                jobs[f"{family} {adapters}"] = of_family(folder, family, adapters, parallel={axis: 2})
    return jobs


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("axis", ["tp", "pp"])
def test_every_family_passes_on_two_processes(axis: str, part: int, tmp_path: Path) -> None:
    """A world takes longer to start than a family to compare, and so many as it compares long before it is ended."""
    jobs = spread(tmp_path, FAMILIES[part::PARTS], axis)
    assert jobs
    layouts_pass(tmp_path, jobs)


@pytest.mark.parametrize(
    ("axis", "error", "why"),
    [
        ("tp", UnsupportedError, "latent attention under tensor parallelism"),
        ("pp", LayoutError, "does not divide num_layers"),
    ],
)
def test_every_family_that_two_processes_cannot_share_is_refused(
    axis: str, error: type[Exception], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, and before a process group is made: one process stands for both."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    jobs = spread(tmp_path, FAMILIES, axis, shared=False)
    assert jobs
    for job in jobs.values():
        with pytest.raises(error, match=why):
            verify_training(parse_recipe(job))
