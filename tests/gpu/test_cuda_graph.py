"""A recorded run is the run: the same losses with several micro-batches a step, in bf16 and FP8, with adapters or not.

What is recorded runs the same kernels on the same numbers; sums of gradients over a linear's tiles may be added in
another order.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from fixtures.seeing import EYES, image_chats, make_seeing
from fixtures.wrapped import make_wrapped
from mbx.train.model.graphs import why_not
from mbx.train.recipe.catalogue import load_recipe
from mbx.train.run import graph
from mbx.train.run.loop import train
from mbx.train.run.prepare import prepare

pytestmark = pytest.mark.gpu
SMALL = (
    "model.init=random",
    "data.kind=pattern",
    "data.length=512",
    "run.save=false",
    "train.steps=8",
    "optim.lr=1e-4",
)
MICRO = ("train.micro_batch=1", "train.global_batch=4")
CASES = {
    "adapters": ("qwen3_0_6b_lora", ()),
    "weights": ("qwen3_0_6b_sft", ()),
    "mean_of_means": ("qwen3_0_6b_sft", ("train.per_token_loss=false",)),
    "fp8": ("qwen3_0_6b_lora", ("fp8.recipe=tensorwise",)),
    "fp8_weights": ("qwen3_0_6b_sft", ("fp8.recipe=tensorwise",)),
}
TINY = Path(__file__).parents[2] / "fixtures" / "tiny"


@pytest.mark.parametrize("case", CASES)
def test_a_recorded_run_is_the_run(case: str, tmp_path: Path) -> None:
    name, own = CASES[case]
    losses = []
    for word in ("auto", "off"):
        overrides = [*SMALL, *MICRO, *own, f"train.cuda_graph={word}", f"run.dir={tmp_path / word}"]
        prepared = prepare(load_recipe(name, overrides))
        assert (why_not(prepared.recipe, prepared.plan.config, prepared.ranks) is None) == (word == "auto")
        losses.append(train(prepared, live=False).losses)
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 0.02
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("room", [32, 2])
@pytest.mark.parametrize("name", ["llama32_1b_lora", "llama32_1b_sft"])
def test_packed_rows_are_recorded(name: str, room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of different numbers of examples replay one recording, or a larger one where there was no room."""
    monkeypatch.setattr(graph, "_EXAMPLES", room)
    chats, stream = tmp_path / "chats.jsonl", random.Random(7)
    with chats.open("w") as out:
        for _ in range(300):
            words = " ".join(stream.choices("the law of the sea and a tree".split(), k=stream.randint(1, 60)))
            turns = [{"role": "user", "content": words}, {"role": "assistant", "content": words[::-1]}]
            out.write(json.dumps({"messages": turns}) + "\n")
    losses, made = [], []
    record = graph.Graph._record
    monkeypatch.setattr(graph.Graph, "_record", lambda self, given: made.append(1) or record(self, given))
    for word in ("auto", "off"):
        overrides = [f"model={TINY / 'llama'}", f"data={chats}", "data.length=512", "run.save=false", "train.steps=10"]
        overrides += ["train.micro_batch=2", "train.global_batch=4", "optim.lr=1e-3", "optim.warmup_steps=0"]
        prepared = prepare(load_recipe(name, [*overrides, f"train.cuda_graph={word}", f"run.dir={tmp_path / word}"]))
        assert prepared.recipe.data.packs
        assert (why_not(prepared.recipe, prepared.plan.config, prepared.ranks) is None) == (word == "auto")
        losses.append(train(prepared, live=False).losses)
    assert len(made) == 1 if room == 32 else len(made) > 1
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 0.02
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize(("kind", "fp8"), [("qwen2_5_vl", "none"), ("qwen3_vl", "none"), ("qwen2_5_vl", "tensorwise")])
def test_rows_with_images_are_recorded(kind: str, fp8: str, tmp_path: Path) -> None:
    """What a frozen tower made of images of other sizes, or of none, is given to one recording."""
    folder = (make_seeing if kind in EYES else make_wrapped)(kind, tmp_path / "model")
    chats = image_chats(tmp_path / "chats", 8)
    lines = chats.read_text("utf-8").splitlines()
    lines[2] = json.dumps(
        {"messages": [{"role": "user", "content": "how many?"}, {"role": "assistant", "content": "2"}]}
    )
    chats.write_text("\n".join(lines) + "\n", encoding="utf-8")
    # in fp32 what is recorded is what is launched; in FP8 a sum in another order becomes another code now and then
    computed, near = (["train.precision=fp32"], 1e-3) if fp8 == "none" else ([f"fp8.recipe={fp8}"], 0.1)
    losses, lengths = [], ["data.length=256", "train.micro_batch=1", "train.global_batch=4", "train.steps=8"]
    for word in ("auto", "off"):
        overrides = [f"model={folder}", f"data={chats}", "run.save=false", "optim.lr=1e-3", "optim.warmup_steps=0"]
        overrides += [*lengths, *computed, f"train.cuda_graph={word}", f"run.dir={tmp_path / word}"]
        prepared = prepare(load_recipe("llama32_1b_lora", overrides))
        assert prepared.data.eyes is not None
        assert (why_not(prepared.recipe, prepared.plan.config, prepared.ranks) is None) == (word == "auto")
        losses.append(train(prepared, live=False).losses)
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < near
    assert losses[0][-1] < losses[0][0]
