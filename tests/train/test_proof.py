"""`mbx verify training` passes on what trains here, in every layout, and finds what is planted."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from _trainings import QWEN3, Raw, run_world

from converters.errors import UnsupportedError, UsageError
from fixtures.make_tiny import NAMES, make
from mbx.train.data.rows import Examples, Row
from mbx.train.proof.training import Report, verify_training
from mbx.train.recipe.parse import parse_recipe

CHATS = (
    (("user", "how many"), ("assistant", "two of eight, and one")),
    (("user", "say it"), ("assistant", "two of it")),
    (("user", "a"), ("assistant", "bcd"), ("user", "again"), ("assistant", "bcd bcd")),
)
LORA: dict[str, object] = {"rank": 4, "alpha": 6.0}
ATTENTION: dict[str, object] = {**LORA, "targets": ["linear_qkv", "linear_proj"]}


def recipe(folder: Path, family: str = "qwen3", **sections: dict[str, object]) -> Raw:
    """Three chats in one packed row, with padding behind."""
    hf = QWEN3 if family == "qwen3" else folder / family
    if not hf.exists():
        make(family, hf)
    lines = [{"messages": [{"role": r, "content": c} for r, c in chat]} for chat in CHATS]
    (folder / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    base: Raw = {
        "model": {"path": str(hf)},
        "data": {"kind": "chat", "path": str(folder / "chat.jsonl"), "length": 112},
        "train": {"micro_batch": 1, "global_batch": 2},
        "optim": {"lr": 1e-4, "weight_decay": 0.1},
        "run": {"dir": str(folder / "run"), "device": "cpu"},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return base


def failed(report: Report | None) -> set[str]:
    assert report is not None
    return {leg.name for leg in report.legs if leg.status == "failed"}


def rows_changed(change: Callable[[Row], Row]) -> Callable[[pytest.MonkeyPatch], None]:
    def plant(patch: pytest.MonkeyPatch) -> None:
        plain = Examples.row
        patch.setattr(Examples, "row", lambda self, index: change(plain(self, index)))

    return plant


def end_unlearned(row: Row) -> Row:
    mask = row.mask.copy()
    mask[np.flatnonzero(np.diff(np.append(mask, 0)) < 0)] = 0
    return replace(row, mask=mask)


def mask_forgotten(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A mask that Megatron Core is not given is one of ones, or of no padding."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        from mbx.models.megatron.core.beside import Beside

        plain = Beside.masks

        def masks(self, model, mask, padding):  # type: ignore[no-untyped-def]
            return plain(
                self, model, mask if name != "loss_mask" else mask * 0 + 1, padding if name != "padding_mask" else None
            )

        patch.setattr(Beside, "masks", masks)

    return plant


def doubled_start(patch: pytest.MonkeyPatch) -> None:
    from mbx.train.run import dataset

    plain = dataset.example_rows

    def doubled(*given):  # type: ignore[no-untyped-def]
        rows = plain(*given)
        more = [
            replace(one, tokens=np.append(one.tokens[0], one.tokens), learn=np.append(False, one.learn))
            for one in rows.examples
        ]
        return replace(rows, examples=more)

    patch.setattr(dataset, "example_rows", doubled)


def tokens_counted_twice(patch: pytest.MonkeyPatch) -> None:
    from mbx.train.run import batches

    plain = batches.forward_step

    def counted(*given, **named):  # type: ignore[no-untyped-def]
        output, reduce = plain(*given, **named)

        def twice(losses):  # type: ignore[no-untyped-def]
            total, tokens, said = reduce(losses)
            return total, 2 * tokens, said

        return output, twice

    patch.setattr(batches, "forward_step", counted)


def decay_everywhere(patch: pytest.MonkeyPatch) -> None:
    from mbx.train.model import build

    plain = build.optimizer

    def decaying(*given):  # type: ignore[no-untyped-def]
        made = plain(*given)
        for group in made.param_groups:
            group["wd_mult"] = 1.0
        return made

    patch.setattr(build, "optimizer", decaying)


def after(name: str, change: Callable[[object], None]) -> Callable[[pytest.MonkeyPatch], None]:
    """`change` to the bare model behind a call of the loop's function `name`."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        from mbx.train.run import loop

        plain = getattr(loop, name)

        def changed(model, *given):  # type: ignore[no-untyped-def]
            plain(model, *given)
            change(model)

        patch.setattr(loop, name, changed)

    return plant


def scale_dropped(model) -> None:  # type: ignore[no-untyped-def]
    for module in model.modules():
        if hasattr(module, "lora_a") and hasattr(module, "scale"):
            module.scale = 1.0


def norm_thawed(model) -> None:  # type: ignore[no-untyped-def]
    model.decoder.final_layernorm.weight.requires_grad_(True)


def bias_moves(patch: pytest.MonkeyPatch) -> None:
    from mbx.train.model import config

    patch.setattr(config, "bias_rate", lambda recipe: 0.001)


#: fault → (how it is planted, the family, further sections, legs that must find it)
FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str, dict[str, dict[str, object]], set[str]]] = {
    "mask shifted by one": (rows_changed(lambda r: replace(r, mask=np.roll(r.mask, 1))), "qwen3", {}, {"mask"}),
    "end token unlearned": (rows_changed(end_unlearned), "qwen3", {}, {"mask"}),
    "padding learned by prediction layers": (mask_forgotten("loss_mask"), "mimo", {}, {"longer rows", "weight 0"}),
    "padding in the balance loss": (mask_forgotten("padding_mask"), "qwen3_moe", {}, {"longer rows"}),
    "start token doubled": (doubled_start, "qwen3", {}, {"tokens"}),
    "positions not reset": (
        rows_changed(lambda r: replace(r, positions=np.arange(len(r.positions)))),
        "qwen3",
        {},
        {"tokens"},
    ),
    "accumulation scaled wrongly": (tokens_counted_twice, "qwen3", {}, {"gradients", "norm"}),
    "weight decay on norms": (decay_everywhere, "qwen3", {}, {"step"}),
    "adapter scale dropped": (after("load_peft", scale_dropped), "qwen3", {"lora": LORA}, {"loss", "gradients"}),
    "bias moving under adapters": (bias_moves, "glm4_moe", {"lora": ATTENTION}, {"frozen"}),
    "buffer moving at lr 0": (bias_moves, "glm4_moe", {}, {"lr 0"}),
    "frozen parameter updated": (after("attach", norm_thawed), "qwen3", {"lora": LORA}, {"frozen"}),
}
#: Those of the default suite; each takes a dozen builds of a model.
QUICK = ("padding learned by prediction layers", "weight decay on norms", "frozen parameter updated")


@pytest.mark.parametrize(
    "fault", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAULTS]
)
def test_a_planted_fault_is_found(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, family, sections, legs = FAULTS[fault]
    plant(monkeypatch)
    assert legs <= failed(verify_training(parse_recipe(recipe(tmp_path, family, **sections))))


#: Other models in Megatron Core (`test_families.py`), those that train with Transformer Engine only, and FP8 blocks.
ELSEWHERE = frozenset(
    (
        *("exaone4_1_2b", "gpt_oss_mxfp4", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"),
        *("nemotron_h", "nemotron_nano_v2", "nemotron_nano_v3", "nemotron_super", "deepseek_v3_fp8"),
    )
)
#: Every tiny family that trains on a CPU.
FAMILIES = tuple(name for name in NAMES if name not in ELSEWHERE)
#: Worlds of two processes that share them.
PARTS = 9
#: Whose experts have biases: without Transformer Engine their adapters train, and they do not.
ADAPTERS_ALONE = ("gpt_oss",)
#: Whose tokenizer Transformers reads with the folder's own code only: their rows count up.
WITHOUT_TOKENIZER = ("llama_nemotron", "kimi_k2")
#: Of other tensors in Transformers than on disk, which take no adapter of the folder.
WITHOUT_PEFT = ("llama_nemotron", "sarvam_moe")
#: Linears of latent attention, those without a norm behind them, and those that PEFT loads (docs/training.md).
TARGETS: dict[str, list[str]] = {
    **dict.fromkeys(("gemma2", "gemma3_text", "glm4", "olmo2", "olmo3", "exaone4_32b"), ["linear_qkv", "linear_fc1"]),
    **dict.fromkeys(
        ("glm4_moe", "glm4_moe_air", "dots1", "llama4_scout", "llama4_maverick"), ["linear_qkv", "linear_proj"]
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


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes(family: str, adapters: bool, tmp_path: Path) -> None:
    asked = parse_recipe(of_family(tmp_path, family, adapters))
    if not adapters and family in ADAPTERS_ALONE:
        with pytest.raises(UnsupportedError, match="Transformer Engine only"):
            verify_training(asked)
    elif adapters and family in WITHOUT_PEFT:
        with pytest.raises(UnsupportedError, match="adapter"):
            verify_training(asked)
    else:
        assert failed(verify_training(asked)) == set()


def test_fp8_blocks_that_transformers_cannot_decode_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="FP8 blocks"):
        verify_training(parse_recipe(recipe(tmp_path, "deepseek_v3_fp8")))


def test_packed_windows_pass(tmp_path: Path) -> None:
    """Gemma 3's local layers see a window of the example, and nothing of the row's other examples."""
    assert failed(verify_training(parse_recipe(recipe(tmp_path, "gemma3_text")))) == set()


def test_random_weights_and_bare_tokens_have_no_reference(tmp_path: Path) -> None:
    for section, values in (("model", {"init": "random"}), ("data", {"kind": "mock", "path": ""})):
        with pytest.raises(UsageError, match="reference|tokenizer"):
            verify_training(parse_recipe(recipe(tmp_path, **{section: values})))


def layouts_pass(folder: Path, jobs: dict[str, Raw]) -> None:
    found = run_world(2, [{"recipe": job, "verify": True} for job in jobs.values()], folder / "legs.json")
    bad = {name: [leg for leg in legs if leg[1] == "failed"] for name, legs in zip(jobs, found, strict=True)}
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


def spread(folder: Path, families: Sequence[str], axis: str) -> dict[str, Raw]:
    """Recipes of some families over two processes. Experts train under tensor parallelism on GPUs only, and all stages
    have as many layers."""
    jobs = {}
    for family in families:
        config = json.loads((make(family, folder / family) / "config.json").read_text())
        if "expert" in json.dumps(config) if axis == "tp" else config.get("num_hidden_layers", 2) % 2:
            continue
        for adapters in (False, True):
            if family not in (WITHOUT_PEFT if adapters else ADAPTERS_ALONE):
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
