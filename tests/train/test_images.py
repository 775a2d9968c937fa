"""Training on chats with images: Megatron Core behind Transformers' tower, against Transformers' whole model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _trainings import Raw, raw, run_here, run_world

from converters.errors import MbxError, UnsupportedError, UsageError
from fixtures.seeing import EYES, image_chats, make_seeing
from fixtures.wrapped import make_wrapped
from mbx.formats.registry import open_hf
from mbx.models.stored import read_whole
from mbx.proof.legs import Leg
from mbx.train.budget.predict import predict, stages
from mbx.train.checkpoints.export import export_run
from mbx.train.data.batch import _two_way
from mbx.train.data.rows import Examples
from mbx.train.data.tokens import Picture
from mbx.train.model import sight
from mbx.train.proof.reference import whole_model
from mbx.train.proof.training import verify_training
from mbx.train.recipe.parse import parse_recipe
from mbx.train.run.prepare import prepare
from tests.delta_on_cpu import delta_on_cpu

KINDS = ("gemma3", "qwen2_5_vl", "qwen3_5")
LORA: dict[str, object] = {"rank": 4, "alpha": 6.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny folder by model type, and `chats` with 64 chats about images; made once."""
    root = tmp_path_factory.mktemp("images")

    def made(kind: str) -> Path:
        if kind == "chats":
            return image_chats(root / "chats", 64)
        return (make_seeing if kind in EYES else make_wrapped)(kind, root / kind)

    return cache(made)


@pytest.fixture(autouse=True)
def delta_nets(request: pytest.FixtureRequest) -> Iterator[None]:
    """Gated delta nets run on a CPU where a test is about a model that has them."""
    if not has_delta_nets(getattr(request.node, "callspec", None) and request.node.callspec.params.get("kind")):
        yield
        return
    with delta_on_cpu():
        yield


def has_delta_nets(kind: str | None) -> bool:
    return str(kind).startswith("qwen3_5")


def unlike(kind: str, legs: Sequence[Leg]) -> list[Leg]:
    """Legs that did not pass, but for rows of several examples where delta nets keep none apart."""
    return [leg for leg in legs if leg.status != "passed" and not (leg.name == "packing" and has_delta_nets(kind))]


def recipe(folder: Callable[[str], Path], kind: str, at: Path, **sections: dict[str, object]) -> Raw:
    """Two steps over the chats, in their order, a chat a row; without prediction layers, which see no image."""
    base: Raw = {
        "model": {"path": str(folder(kind))},
        "data": {"kind": "auto", "path": str(folder("chats")), "length": 112, "pack": False, "shuffle": False},
        "train": {"steps": 2, "global_batch": 8, "micro_batch": 4},
        "optim": {"lr": 3e-3, "schedule": "constant", "clip": 0.0},
    }
    if has_delta_nets(kind) or kind == "glm4v_moe":
        base["model"]["config"] = {"mtp_num_layers": 0}
    if has_delta_nets(kind):
        base["train"]["deterministic"] = True  # Megatron Core's torch code in place of kernels
    return raw(at, **{name: {**base.get(name, {}), **sections.get(name, {})} for name in {**base, **sections}})


def reference_loss(asked: Raw, first: int, model: Any) -> float:
    """The mean loss of eight chats from `first` on, as Transformers' own model has it."""
    prepared = prepare(parse_recipe({**asked, "run": {**asked["run"], "dir": "unused"}}))
    eyes, (chosen,) = prepared.data.eyes, prepared.data.chosen
    assert eyes is not None
    total = tokens = 0.0
    kinds = "token_type_ids" if eyes.sight.two_way else "mm_token_type_ids"
    for example in chosen[first : first + 8]:
        ids = torch.from_numpy(example.tokens)[None]
        given = {**eyes.inputs([one.read() for one in example.pictures]), kinds: (ids == eyes.sight.token).long()}
        with torch.no_grad():
            logits = model(input_ids=ids, **given).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        learned = torch.from_numpy(example.learn[1:])
        total, tokens = total + float(losses[learned].sum()), tokens + int(learned.sum())
    return total / tokens


@pytest.mark.parametrize("kind", ["qwen2_5_vl", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_adapters_learn_what_peft_learns_of_transformers_model(
    folder: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    """Losses, gradients, a step, and rows packed or apart, on the first chats."""
    asked = recipe(folder, kind, tmp_path, data={"pack": True}, lora=LORA, train={"global_batch": 2, "micro_batch": 1})
    report = verify_training(parse_recipe(asked), 3)
    assert report is not None and not unlike(kind, report.legs)


@pytest.mark.parametrize(
    "kind", ["qwen3_vl", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("qwen2_5_vl", "glm4v"))]
)
def test_what_is_recorded_has_one_shape_and_says_the_same(
    folder: Callable[[str], Path], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro-batches with and without images, as a CUDA graph is given them, have the losses of those as they are."""
    chats = image_chats(tmp_path / "chats", 8)
    lines = chats.read_text("utf-8").splitlines()
    text = {"messages": [{"role": "user", "content": "how many?"}, {"role": "assistant", "content": "one or two"}]}
    lines[1] = lines[5] = json.dumps(text)
    chats.write_text("\n".join(lines) + "\n", encoding="utf-8")
    own = {"data": {"path": str(chats)}, "train": {"global_batch": 4, "micro_batch": 1}}
    plain = run_here(recipe(folder, kind, tmp_path / "plain", lora=LORA, **own))
    shapes, look = set(), sight.Seeing.look

    def recorded(self: sight.Seeing, batch: Any, **_: object) -> Any:
        found = look(self, batch, recorded=True)
        shapes.add(tuple((name, value.shape) for name, value in found.items() if value is not None))
        return found

    monkeypatch.setattr(sight.Seeing, "look", recorded)
    assert run_here(recipe(folder, kind, tmp_path / "recorded", lora=LORA, **own)) == plain
    assert len({tuple(one for one in found if one[0] != "padding") for found in shapes}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "glm4v", "qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("lora", [{}, LORA], ids=["all", "lora"])
def test_64_chats(folder: Callable[[str], Path], tmp_path: Path, kind: str, lora: dict[str, object]) -> None:
    asked = recipe(folder, kind, tmp_path, lora=lora, train={"global_batch": 64, "micro_batch": 4})
    report = verify_training(parse_recipe(asked), 64)
    assert report is not None and not unlike(kind, report.legs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["glm4v_moe", "qwen3_vl_moe", "qwen3_5_moe"])
@pytest.mark.parametrize("lora", [{}, LORA], ids=["all", "lora"])
def test_experts_learn_behind_a_tower(
    folder: Callable[[str], Path], tmp_path: Path, kind: str, lora: dict[str, object]
) -> None:
    if lora and kind == "glm4v_moe":  # PEFT takes its shared experts for those that are fused
        lora = {**lora, "targets": ["linear_qkv", "linear_proj"]}
    asked = recipe(folder, kind, tmp_path, lora=lora, train={"global_batch": 4, "micro_batch": 1})
    report = verify_training(parse_recipe(asked), 4)
    assert report is not None and not unlike(kind, report.legs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_exported_is_what_was_trained(folder: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    """The next step's loss is the exported model's, with its tower, as Transformers reads the folder.

    Prediction layers, which were left out, are in it as they were.
    """
    from safetensors.torch import load_file

    asked = recipe(folder, kind, tmp_path / "run")
    losses = run_here(asked)
    exported, _ = export_run(tmp_path / "run", tmp_path / "out")
    (further,) = run_here({**asked, "train": {**asked["train"], "steps": 3}}, resume=True)
    assert reference_loss(asked, 0, whole_model(folder(kind))) == pytest.approx(losses[0], rel=1e-5)
    assert reference_loss(asked, 16, whole_model(exported)) == pytest.approx(further, rel=1e-5)
    assert abs(further - losses[0]) > 0.1
    before, after = (load_file(place / "model.safetensors") for place in (folder(kind), exported))
    beyond = [name for name in before if name.startswith("mtp.")]
    assert bool(beyond) == has_delta_nets(kind) and all(torch.equal(before[name], after[name]) for name in beyond)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_adapter_answers_in_peft(folder: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    """By PEFT on the whole model, and merged: the next step's loss. Not a module of the tower is adapted."""
    import peft

    asked = recipe(folder, kind, tmp_path / "run", lora=LORA)
    run_here(asked)
    adapter, _ = export_run(tmp_path / "run", tmp_path / "adapter")
    merged, _ = export_run(tmp_path / "run", tmp_path / "merged", merged=True)
    (further,) = run_here({**asked, "train": {**asked["train"], "steps": 3}}, resume=True)
    model = peft.PeftModel.from_pretrained(whole_model(folder(kind)), str(adapter))
    found = model.load_adapter(str(adapter), "again")
    assert not found.missing_keys and not found.unexpected_keys
    assert all("language_model" in name for name, _ in model.named_parameters() if "lora_" in name)
    assert reference_loss(asked, 16, model) == pytest.approx(further, rel=1e-5)
    # the base is stored in bf16, and so is what is merged
    assert reference_loss(asked, 16, whole_model(merged)) == pytest.approx(further, rel=2e-3)


def test_a_trained_tower_is_exported_and_goes_on(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """What is exported is the whole model as it was trained, and a resumed run goes on with the same tower."""
    from safetensors.torch import load_file

    asked = recipe(folder, "gemma3", tmp_path / "run", train={"tower": "trained"})
    run_here(asked)
    exported, _ = export_run(tmp_path / "run", tmp_path / "out")
    longer = {**asked["train"], "steps": 3}
    (further,) = run_here({**asked, "train": longer}, resume=True)
    straight = run_here({**asked, "train": longer, "run": {**asked["run"], "dir": str(tmp_path / "straight")}})
    assert further == straight[2]
    assert reference_loss(asked, 16, whole_model(exported)) == pytest.approx(further, rel=1e-5)
    before, after = (load_file(place / "model.safetensors") for place in (folder("gemma3"), exported))
    assert before.keys() == after.keys()
    tower = [name for name in before if "vision_tower" in name and name.endswith("proj.weight")]
    assert tower and not any(torch.equal(before[name].float(), after[name].float()) for name in tower)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "glm4v", "qwen3_vl"])
def test_a_trained_tower_learns_what_transformers_learns(
    folder: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    train = {"tower": "trained", "global_batch": 4, "micro_batch": 1}
    report = verify_training(parse_recipe(recipe(folder, kind, tmp_path, train=train)), 8)
    assert report is not None and not unlike(kind, report.legs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "glm4v", "qwen3_vl"])
def test_adapters_of_a_tower_learn_what_peft_learns(folder: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    lora = {**LORA, "tower_targets": ["all-linear"]}
    asked = recipe(folder, kind, tmp_path, lora=lora, train={"global_batch": 4, "micro_batch": 1})
    report = verify_training(parse_recipe(asked), 4)
    assert report is not None and not unlike(kind, report.legs)


def test_an_adapter_of_a_tower_is_exported_and_goes_on(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """By PEFT, with the named linears of the tower and no others, and merged; a resumed run goes on with it."""
    import peft

    lora = {**LORA, "targets": ["q_proj", "down_proj"], "tower_targets": ["attn.qkv", "visual.merger.mlp.2"]}
    asked = recipe(folder, "qwen2_5_vl", tmp_path / "run", lora=lora)
    run_here(asked)
    adapter, _ = export_run(tmp_path / "run", tmp_path / "adapter")
    merged, _ = export_run(tmp_path / "run", tmp_path / "merged", merged=True)
    (further,) = run_here({**asked, "train": {**asked["train"], "steps": 3}}, resume=True)
    model = peft.PeftModel.from_pretrained(whole_model(folder("qwen2_5_vl")), str(adapter))
    found = model.load_adapter(str(adapter), "again")
    assert not found.missing_keys and not found.unexpected_keys
    names = {name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    assert sorted(name.rpartition("visual.")[2] for name in names if "visual" in name) == [
        *("blocks.0.attn.qkv", "blocks.1.attn.qkv", "merger.mlp.2")
    ]
    assert reference_loss(asked, 16, model) == pytest.approx(further, rel=1e-5)
    assert reference_loss(asked, 16, whole_model(merged)) == pytest.approx(further, rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["tp", "pp"])
def test_two_processes_train_one_tower(folder: Callable[[str], Path], tmp_path: Path, axis: str) -> None:
    jobs: list[dict[str, object]] = []
    lora = {**LORA, "tower_targets": ["all-linear"]}
    for kind, tower, adapters in [(kind, "trained", {}) for kind in KINDS] + [("gemma3", "frozen", lora)]:
        train = {"tower": tower, "global_batch": 4, "micro_batch": 2}
        at = tmp_path / f"{kind} {tower}"
        jobs.append(
            {
                "recipe": recipe(folder, kind, at, train=train, lora=adapters, parallel={axis: 2}),
                "verify": True,
                "delta": has_delta_nets(kind),
            }
        )
    for legs in run_world(2, jobs, tmp_path / "world.json"):
        assert [leg for leg in legs if leg[1] != "passed" and leg[:2] != ["packing", "not run"]] == []  # type: ignore[index]


def nothing(patch: pytest.MonkeyPatch) -> None:
    del patch


def other_image(patch: pytest.MonkeyPatch) -> None:
    plain = Picture.read
    patch.setattr(Picture, "read", lambda self: plain(self).transpose(0))


def shifted_position(patch: pytest.MonkeyPatch) -> None:
    plain = Examples.row

    def row(self: Examples, index: int) -> Any:
        found = plain(self, index)
        assert found.axes is not None
        later = np.arange(found.axes.shape[1]) > 20  # positions are relative: a shift of all is none
        return replace(found, axes=found.axes + np.array([[1], [0], [0]]) * later)

    patch.setattr(Examples, "row", row)


def features_dropped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sight.Seeing, "_seen", lambda self, tokens, batch: None)


def seen_one_way(patch: pytest.MonkeyPatch) -> None:
    from mbx.train.data import batch

    patch.setattr(batch, "_two_way", lambda rows, token, hidden: _two_way(rows, -7, hidden))


@pytest.mark.parametrize(
    ("kind", "plant"),
    [
        ("qwen3_5", nothing),
        ("qwen3_5", shifted_position),
        pytest.param("qwen3_5", features_dropped, marks=pytest.mark.slow),
        ("qwen2_5_vl", other_image),
        ("qwen2_5_vl", shifted_position),
        ("qwen2_5_vl", features_dropped),
        ("gemma3", other_image),
        ("gemma3", features_dropped),
        ("gemma3", seen_one_way),
    ],
)
def test_a_planted_fault_changes_the_loss(
    folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    plant: Callable[[pytest.MonkeyPatch], None],
) -> None:
    asked = recipe(folder, kind, tmp_path, train={"steps": 1}, run={"save": False})
    wanted = reference_loss(asked, 0, whole_model(folder(kind)))
    plant(monkeypatch)
    (loss,) = run_here(asked)
    assert (abs(loss - wanted) > 1e-4 * wanted) == (plant is not nothing)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", ["tp", "pp"])
def test_two_processes_agree_with_one(folder: Callable[[str], Path], tmp_path: Path, kind: str, axis: str) -> None:
    """Losses of a run, and the proof, tied embeddings and sequence parallelism included."""
    train = {"global_batch": 8, "micro_batch": 2}
    alone = run_here(recipe(folder, kind, tmp_path / "one", train=train, model={"vocab_divisor": 2}))
    more = {"train": train, "parallel": {axis: 2}, "model": {"vocab_divisor": 1 if axis == "tp" else 2}}
    jobs: list[dict[str, object]] = [
        {"recipe": recipe(folder, kind, tmp_path / "two", **more), "delta": has_delta_nets(kind)},
        {"recipe": recipe(folder, kind, tmp_path / "proof", lora=LORA, **more), "verify": True},
    ]
    together, legs = run_world(2, jobs, tmp_path / "world.json")
    assert together == pytest.approx(alone, rel=1e-5)
    assert [leg for leg in legs if leg[1] != "passed" and leg[:2] != ["packing", "not run"]] == []  # type: ignore[index]


@pytest.mark.parametrize("lora", [pytest.param({}, marks=pytest.mark.slow), LORA], ids=["all", "lora"])
def test_a_run_goes_on_where_it_was(folder: Callable[[str], Path], tmp_path: Path, lora: dict[str, object]) -> None:
    whole = recipe(folder, "qwen2_5_vl", tmp_path / "whole", lora=lora, train={"steps": 4}, data={"shuffle": True})
    half = recipe(folder, "qwen2_5_vl", tmp_path / "half", lora=lora, data={"shuffle": True})
    straight, first = run_here(whole), run_here(half)
    later = run_here({**half, "train": {**half["train"], "steps": 4}}, resume=True)
    assert [*first, *later] == straight


@pytest.mark.slow
def test_recomputed_layers_learn_the_same(folder: Callable[[str], Path], tmp_path: Path) -> None:
    losses = [
        run_here(recipe(folder, "gemma3", tmp_path / how, train={"recompute": how}, run={"save": False}))
        for how in ("none", "full", "selective")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and losses[2] == pytest.approx(losses[0], rel=1e-6)


def test_the_plan_counts_images(folder: Callable[[str], Path], tmp_path: Path) -> None:
    asked = parse_recipe(recipe(folder, "qwen2_5_vl", tmp_path))
    counts = prepare(asked, dry=True).data.counts
    assert counts is not None and (counts.pictured, counts.pictures) == (64, 80)
    assert any(
        "80 images in 64 examples" in line and "none of them learned" in line for line in counts.lines(2, 8, 112)
    )


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5"])
def test_the_budget_has_the_tower(folder: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    """Its weights on the first stage alone, and gradients and optimizer state where it is trained."""
    model = whole_model(folder(kind))
    tower = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    parts = []
    for how in ("frozen", "trained"):
        prepared = prepare(parse_recipe(recipe(folder, kind, tmp_path, train={"tower": how})), dry=True)
        budgets = stages(replace(prepared.recipe, parallel=replace(prepared.recipe.parallel, pp=2)), prepared.plan, 1)
        with_images = predict(prepared.recipe, prepared.plan, 1, prepared.looks)
        assert with_images.parts["tower"] == 4 * tower and all("tower" not in budget.parts for budget in budgets)
        parts.append(with_images.parts)
    assert parts[1]["gradients"] - parts[0]["gradients"] == 4 * tower
    assert parts[1]["optimizer"] - parts[0]["optimizer"] == 8 * tower
    assert parts[1]["images"] > 0


def test_images_of_a_text_model_are_refused(folder: Callable[[str], Path], tmp_path: Path) -> None:
    asked = raw(tmp_path, data={"kind": "auto", "path": str(folder("chats")), "length": 112})
    with pytest.raises(UnsupportedError, match="part of type 'image'"):
        prepare(parse_recipe(asked))


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"parallel": {"pp": 2}}, "the first pipeline stage has 2: it needs one more"),
        ({"train": {"recompute": "full"}}, "not computed twice"),
        ({"parallel": {"pp": 2, "vpp": 2}, "train": {"micro_batch": 1}}, "interleaved stages|one more"),
        ({"train": {"tower": "trained"}, "lora": LORA}, "beside a frozen tower"),
        (
            {"lora": {**LORA, "targets": ["q_proj", "linear_fc2", "attn.qkv"]}},
            r"attn.qkv is of the tower \(`model.visual",
        ),
        ({"train": {"tower": "trained"}, "run": {"export_every": 1}}, "exported from a checkpoint"),
        ({"lora": {**LORA, "dora": True, "tower_targets": ["qkv"]}}, "DoRA on a tower"),
        (
            {"train": {"tower": "trained"}, "data": {"kind": "pattern", "path": "", "length": 32}},
            "no row shows an image",
        ),
    ],
)
def test_what_images_cannot_have_is_said(
    folder: Callable[[str], Path], tmp_path: Path, sections: dict[str, dict[str, object]], said: str
) -> None:
    with pytest.raises(MbxError, match=said):
        prepare(parse_recipe(recipe(folder, "qwen3_vl", tmp_path, **sections)), dry=True)


def test_prediction_layers_are_left_out_where_rows_show_images(folder: Callable[[str], Path], tmp_path: Path) -> None:
    asked = recipe(folder, "qwen3_5", tmp_path, run={"export_every": 1})
    assert "prediction layers are left out" in prepare(parse_recipe(asked), dry=True).start.why
    prepare(parse_recipe({**asked, "lora": LORA}), dry=True)
    del asked["model"]["config"]
    with pytest.raises(UnsupportedError, match="not what the tower makes of them"):
        prepare(parse_recipe(asked), dry=True)


@pytest.mark.parametrize("kind", ["qwen3_5"])
def test_an_export_on_the_way_is_whole(folder: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    """Its tower and the prediction layers that were left out are those of the folder, as in a checkpoint's export."""
    data: dict[str, object] = {"kind": "pattern", "path": "", "length": 32}
    train: dict[str, object] = {"steps": 1, "global_batch": 2, "micro_batch": 2}
    run_here(recipe(folder, kind, tmp_path / "run", data=data, train=train, run={"export_every": 1}))
    source = open_hf(folder(kind))
    for at in (tmp_path / "run" / "export" / "step_0000001", export_run(tmp_path / "run", tmp_path / "out")[0]):
        found = open_hf(at)
        assert found.tensors.keys() == source.tensors.keys()
        kept = [name for name in source.tensors if "visual" in name or "mtp" in name]
        assert len(kept) > 20 and any("mtp" in name for name in kept)
        for name in kept:
            assert read_whole(found.tensors[name], found.source).equal(
                read_whole(source.tensors[name], source.source)
            ), name


@pytest.mark.slow
def test_text_is_trained_between_two_kinds_of_layers(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Gemma 4 beside its towers, against its text model alone; the exported folder is whole."""
    data: dict[str, object] = {"kind": "pattern", "path": "", "length": 32}
    asked = recipe(folder, "gemma4", tmp_path / "run", data=data, train={"global_batch": 4, "micro_batch": 2})
    report = verify_training(parse_recipe(asked), 4)
    assert report is not None and report.passed, report.legs
    run_here(asked)
    exported, _ = export_run(tmp_path / "run", tmp_path / "out")
    assert open_hf(exported).tensors.keys() == open_hf(folder("gemma4")).tensors.keys()


def test_a_model_whose_images_are_not_trained_is_named(folder: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="part of type 'image'") as raised:
        prepare(parse_recipe(recipe(folder, "internvl", tmp_path)), dry=True)
    assert raised.value.hint and "`internvl` is trained on text alone" in raised.value.hint


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"path": "https://example.org/dog.png"}, "nothing is fetched"),
        ({"path": "data:image/png;base64,AAAA"}, "within the record"),
        ({"path": "/etc/hostname"}, "does not lie in the folder"),
        ({"path": "../outside.png"}, "does not lie in the folder"),
        ({"path": "out.png"}, "does not lie in the folder"),
        ({"path": "linked/outside.png"}, "does not lie in the folder"),
        ({"path": "pipe.png"}, "no regular file"),
        ({"path": "absent.png"}, "cannot read the image"),
        ({"path": "text.png"}, "cannot be read as an image"),
        ({"path": "wide.png"}, "pixels; at most"),
        ({"path": 7}, "named by one path"),
        ({}, "named by one path"),
        ({"path": "a.png", "image": "b.png"}, "named by one path"),
    ],
)
def test_images_are_read_as_strangers(
    folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: dict[str, object], said: str
) -> None:
    from PIL import Image

    from mbx.untrusted import images

    data, outside = tmp_path / "data", tmp_path / "outside.png"
    data.mkdir()
    Image.new("RGB", (56, 56)).save(outside)
    (data / "out.png").symlink_to(outside)
    (data / "linked").symlink_to(tmp_path)
    os.mkfifo(data / "pipe.png")
    (data / "text.png").write_text("no image")
    Image.new("RGB", (90, 60)).save(data / "wide.png")
    monkeypatch.setattr(images, "MOST_PIXELS", 60 * 60)
    messages = [
        {"role": "user", "content": [{"type": "image", **part}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "a dog"},
    ]
    (data / "chats.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    asked = recipe(folder, "gemma3", tmp_path / "run", data={"path": str(data / "chats.jsonl")})
    with pytest.raises(MbxError, match=said) as raised:
        prepare(parse_recipe(asked))
    assert "chats.jsonl:1" in raised.value.fact


def test_images_beside_the_messages_are_refused(folder: Callable[[str], Path], tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "<image> what is it?"}, {"from": "gpt", "value": "a dog"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"conversations": talk, "images": ["a.png"]}) + "\n")
    with pytest.raises(UnsupportedError, match="chats.jsonl:1: the record names images in `images`"):
        prepare(parse_recipe(recipe(folder, "gemma3", tmp_path / "run", data={"path": str(tmp_path / "chats.jsonl")})))


def test_an_image_that_changed_is_counted_again(folder: Callable[[str], Path], tmp_path: Path) -> None:
    from PIL import Image

    file = image_chats(tmp_path, 4)
    asked = recipe(folder, "qwen2_5_vl", tmp_path / "run", data={"path": str(file)}, train={"global_batch": 4})
    first, again = (prepare(parse_recipe(asked)).data for _ in range(2))
    assert again.counts and again.counts.from_cache and again.identity == first.identity
    Image.new("RGB", (112, 84)).save(tmp_path / "images" / "000-0.png")
    other = prepare(parse_recipe(asked)).data
    assert other.counts and first.counts and not other.counts.from_cache and other.identity != first.identity
    assert other.counts.picture_tokens > first.counts.picture_tokens


def test_a_chat_with_images_is_not_cut(folder: Callable[[str], Path], tmp_path: Path) -> None:
    short = {"length": 32, "too_long": "truncate"}
    with pytest.raises(UsageError, match="an image is not cut"):
        prepare(parse_recipe(recipe(folder, "gemma3", tmp_path, data=short)))


def test_text_alone_needs_no_tower_and_keeps_it(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """A model that sees, trained on text: the exported folder is whole, byte for byte where nothing was learned."""
    from safetensors.torch import load_file

    data: dict[str, object] = {"kind": "pattern", "path": "", "length": 32}
    asked = recipe(folder, "gemma3", tmp_path / "run", data=data)
    assert prepare(parse_recipe(asked)).data.eyes is None
    run_here(asked)
    exported, _ = export_run(tmp_path / "run", tmp_path / "out")
    before, after = (load_file(place / "model.safetensors") for place in (folder("gemma3"), exported))
    assert before.keys() == after.keys()
    tower = [name for name in before if "language_model" not in name]
    assert tower and all(torch.equal(before[name], after[name]) for name in tower)
