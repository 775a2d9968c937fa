"""`mbx verify training` passes on rows packed and windowed, and finds what is planted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from _trainings import QWEN3, Raw

from converters.errors import UsageError
from fixtures.make_tiny import make
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
    """`change` to the bare model behind a call of the function `name` by which a run begins."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        from mbx.train.run import begin

        plain = getattr(begin, name)

        def changed(model, *given):  # type: ignore[no-untyped-def]
            plain(model, *given)
            change(model)

        patch.setattr(begin, name, changed)

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


def test_packed_windows_pass(tmp_path: Path) -> None:
    """Gemma 3's local layers see a window of the example, and nothing of the row's other examples."""
    assert failed(verify_training(parse_recipe(recipe(tmp_path, "gemma3_text")))) == set()


def test_random_weights_and_bare_tokens_have_no_reference(tmp_path: Path) -> None:
    for section, values in (("model", {"init": "random"}), ("data", {"kind": "mock", "path": ""})):
        with pytest.raises(UsageError, match="reference|tokenizer"):
            verify_training(parse_recipe(recipe(tmp_path, **{section: values})))
