"""Hidden states that a student learns of its teacher: against PyTorch and Transformers, and under several layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _distilled import drawn_rows
from _trainings import QWEN3, ROOT, Raw, raw, run_here, run_world

from converters.errors import LayoutError, MbxError, UnsupportedError, UsageError
from mbx.cli import main
from mbx.formats.registry import open_checkpoint
from mbx.torchfile.dcp import read_dcp
from mbx.train.budget.predict import predict
from mbx.train.checkpoints.export import export_run
from mbx.train.distill import distance
from mbx.train.distill.distance import distances
from mbx.train.distill.hidden import PART
from mbx.train.model.blueprint import blueprint
from mbx.train.model.hidden import pairs_of
from mbx.train.model.parallel import session
from mbx.train.model.teacher import teacher_of
from mbx.train.recipe.parse import parse_recipe
from mbx.train.run.log import Log
from mbx.train.run.loop import Trainer
from mbx.train.run.prepare import prepare

#: Of the student's width and depth; of twice its width and half its depth.
LLAMA, MISTRAL = (ROOT / "fixtures" / "tiny" / name for name in ("llama", "mistral"))
STEPS = 3


def taught(run_dir: Path, *, distill: dict[str, object], **sections: dict[str, object]) -> Raw:
    """The tiny Qwen3, whose hidden states are compared with the tiny Llama's unless `distill` says otherwise."""
    train = {"steps": STEPS, **sections.pop("train", {})}
    model = {"path": str(QWEN3), "vocab_divisor": 64, **sections.pop("model", {})}
    run = {"save": False, **sections.pop("run", {})}
    learned = {"teacher": str(LLAMA), "hidden_weight": 1.0, **distill}
    return raw(run_dir, distill=learned, train=train, model=model, run=run, **sections)


def steps(run_dir: Path) -> list[dict[str, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "step"]


def chats(folder: Path) -> Path:
    """Conversations of several lengths, so that rows end in padding."""
    said = [(f"{n}?", str(n) * (n + 1)) for n in range(9)]
    talk = [[{"role": "user", "content": ask}, {"role": "assistant", "content": answer}] for ask, answer in said]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in talk))
    return folder / "chats.jsonl"


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_distances_are_pytorchs(monkeypatch: pytest.MonkeyPatch, loss: str) -> None:
    """By autograd in float64; tokens go through five at a time. A state without a direction learns none."""
    monkeypatch.setattr(distance, "LOSS_CHUNK", 5 * 16)
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(23, 16, generator=g) for _ in range(2))
    weights = torch.rand(23, generator=g)
    own = x.double().requires_grad_()
    apart = (own - y).square().mean(1) if loss == "mse" else 1 - F.cosine_similarity(own, y.double(), dim=1)
    (apart * weights).sum().backward()
    found, gradient = distances(x, y, weights, loss)
    torch.testing.assert_close(found.double(), apart.detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient.double(), own.grad, atol=1e-7, rtol=1e-5)
    found, gradient = distances(torch.zeros(1, 16), y[:1], weights[:1], loss)
    assert torch.isfinite(gradient).all() and (loss == "mse" or (found == 1 and not gradient.any()))


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path: Path, loss: str) -> None:
    asked = {"teacher": str(QWEN3), "weight": 1.0, "hidden_weight": 10.0, "hidden_loss": loss}
    run_here(taught(tmp_path / "run", distill=asked, optim={"lr": 0.0}, train={"steps": 1}))
    (step,) = steps(tmp_path / "run")
    assert abs(step["distill_hidden"]) < 1e-6 and step["grad_norm"] < 1e-5  # of another teacher 13.7 at a tenth


class Beside:
    """The same student and teacher in Transformers, and the loss of rows by plain PyTorch: the states that layers hand
    on, in front of the last norm, which Transformers' `hidden_states` has behind it."""

    def __init__(self, teacher: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.student, self.teacher = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
            for folder in (QWEN3, teacher)
        )

    def states(self, model: Any, tokens: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        last: list[torch.Tensor] = []

        def keep(_: object, given: object, output: Any) -> None:
            last.append(output[0] if isinstance(output, tuple) else output)

        hook = model.model.layers[-1].register_forward_hook(keep)
        found = model(tokens, output_hidden_states=True)
        hook.remove()
        torch.testing.assert_close(model.model.norm(last[0]), found.hidden_states[-1])
        return [*found.hidden_states[1:-1], last[0]], found.logits

    def loss(self, rows: list[Any], pairs: dict[int, int], asked: Any, projections: dict[int, torch.Tensor]) -> Any:
        """(all of it, the distance alone), each the mean over the tokens that are learned."""
        tokens, labels, mask = (
            torch.stack([torch.from_numpy(getattr(row, name).copy()) for row in rows])
            for name in ("tokens", "labels", "mask")
        )
        mine, logits = self.states(self.student, tokens)
        with torch.no_grad():
            its, _ = self.states(self.teacher, tokens)
        apart = []
        for student, teacher in pairs.items():
            own, other = mine[student - 1], its[teacher - 1]
            if student in projections:
                own = own @ projections[student].t()
            far = {
                "mse": lambda x, y: (x - y).square().mean(-1),
                "cosine": lambda x, y: 1 - F.cosine_similarity(x, y, -1),
            }
            apart.append(far[asked.hidden_loss](own, other))
        plain = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        hidden = torch.stack(apart).mean(0)
        total, far_off = (
            (part * mask).sum() / mask.sum()
            for part in ((1 - asked.weight) * plain + asked.hidden_weight * hidden, hidden)
        )
        return total, far_off


@pytest.mark.parametrize("teacher", [LLAMA, MISTRAL], ids=["as_wide", "projected"])
def test_adapters_in_recomputed_layers_learn_the_same(tmp_path: Path, teacher: Path) -> None:
    """A layer that is computed again leaves its last product out, which a projection reads."""
    found = {}
    for recompute in ("none", "full"):
        run = tmp_path / recompute
        asked = {"steps": 2, "global_batch": 2, "micro_batch": 1, "recompute": recompute}
        run_here(taught(run, distill={"teacher": str(teacher), "hidden_weight": 1.0}, lora={"rank": 4}, train=asked))
        found[recompute] = [(step["loss"], step["grad_norm"], step["distill_hidden"]) for step in steps(run)]
    assert found["full"] == [pytest.approx(step, rel=1e-4) for step in found["none"]]


CASES: dict[str, tuple[Path, dict[str, object], dict[int, int]]] = {
    "every_layer": (LLAMA, {}, {1: 1, 2: 2, 3: 3, 4: 4}),
    "cosine": (LLAMA, {"hidden_loss": "cosine", "hidden_layers": {"2": 3, "4": 3}}, {2: 3, 4: 3}),
    "projected": (MISTRAL, {"hidden_weight": 0.5}, {1: 1, 2: 1, 3: 2, 4: 2}),
}


@pytest.mark.parametrize(
    ("name", "recompute", "by_token"),
    [
        ("every_layer", "none", True),
        ("every_layer", "full", False),
        ("cosine", "none", False),
        ("projected", "full", True),
    ],
)
def test_gradients_are_those_of_transformers(tmp_path: Path, name: str, recompute: str, by_token: bool) -> None:
    """Rows of chats that end in padding, in micro-batches of two: every gradient, those of projections included, where
    every token weighs the same, and where every micro-batch does."""
    teacher, asked, pairs = CASES[name]
    data = {"kind": "chat", "path": str(chats(tmp_path)), "length": 64, "pack": False}
    recipe = taught(
        tmp_path / "run",
        distill={"teacher": str(teacher), "weight": 0.0, **asked},
        model={"vocab_divisor": 1},
        data=data,
        train={"steps": 1, "recompute": recompute, "per_token_loss": by_token},
        optim={"clip": 0.0},
    )
    prepared = prepare(parse_recipe(recipe))
    found: dict[str, torch.Tensor] = {}

    def keep(wrapped: Any) -> None:
        found.update({name: p.main_grad.clone() for name, p in wrapped[0].module.named_parameters()})

    with session(prepared.recipe, prepared.ranks):
        log = Log(prepared.recipe, main=True, live=False, messages=False)
        trainer = Trainer(prepared, log, on_gradients=keep)
        network = trainer.chunks[0].module
        projections = {
            n: network.get_submodule(f"{PART}.{n}").weight.detach().clone().requires_grad_()
            for n in pairs
            if teacher is MISTRAL
        }
        rows = [trainer.train_rows.row(index) for index in range(prepared.recipe.train.global_batch)]
        step = trainer.one_step()
        log.close()
        trainer.close()
    assert any((row.mask == 0)[-1] for row in rows)
    beside = Beside(teacher)
    total, distance = beside.loss(rows, pairs, prepared.recipe.distill, projections)
    assert step.beside["distill_hidden"] == pytest.approx(distance.item(), rel=1e-5)
    if not by_token:
        every = [beside.loss(rows[n : n + 2], pairs, prepared.recipe.distill, projections)[0] for n in range(0, 8, 2)]
        total = torch.stack(every).mean()
    total.backward()
    theirs = {key: p.grad for key, p in beside.student.named_parameters()}
    compared = 0
    for n in range(4):
        own, its = f"decoder.layers.{n}.", f"model.layers.{n}."
        gate_up = torch.cat([theirs[f"{its}mlp.{part}_proj.weight"] for part in ("gate", "up")])
        for key, want in {
            f"{own}mlp.linear_fc1.weight": gate_up,
            f"{own}mlp.linear_fc2.weight": theirs[f"{its}mlp.down_proj.weight"],
            f"{own}self_attention.linear_proj.weight": theirs[f"{its}self_attn.o_proj.weight"],
            f"{own}self_attention.q_layernorm.weight": theirs[f"{its}self_attn.q_norm.weight"],
        }.items():
            torch.testing.assert_close(found[key], want, atol=2e-6, rtol=2e-4)
            compared += 1
    torch.testing.assert_close(
        found["embedding.word_embeddings.weight"][:251], theirs["model.embed_tokens.weight"], atol=2e-6, rtol=2e-4
    )
    for number, weight in projections.items():
        torch.testing.assert_close(found[f"{PART}.{number}.weight"], weight.grad, atol=2e-6, rtol=2e-4)
    assert compared == 16 and len(projections) == (4 if name == "projected" else 0)


#: name: sections, of which `parallel` is the layout that is compared with one process.
LAYOUTS: dict[str, dict[str, dict[str, object]]] = {
    "tp": {"parallel": {"tp": 2}, "distill": {"teacher": str(MISTRAL)}},
    "tp_whole_rows": {"parallel": {"tp": 2, "sequence_parallel": False}, "distill": {"teacher": str(MISTRAL)}},
    "tp_padded": {"parallel": {"tp": 2}, "data": {"kind": "chat"}},
    "tp_lora": {"parallel": {"tp": 2}, "distill": {"teacher": str(MISTRAL)}, "lora": {"rank": 4}},
    "pp_recomputed": {"parallel": {"pp": 2}, "distill": {"teacher": str(MISTRAL)}, "train": {"recompute": "full"}},
    "vpp_packed": {"parallel": {"pp": 2, "vpp": 2}, "distill": {"hidden_loss": "cosine"}, "data": {"kind": "chat"}},
    "pp_by_batch": {"parallel": {"pp": 2}, "train": {"per_token_loss": False}, "data": {"kind": "chat"}},
    "dp": {"parallel": {}, "distill": {"teacher": str(MISTRAL)}},
}
Records = dict[str, dict[str, list[dict[str, float]]]]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Records:
    """The steps of each layout and of one process."""
    folder = tmp_path_factory.mktemp("hidden")
    said = chats(folder)

    def recipe(name: str, where: str) -> Raw:
        sections = {key: dict(values) for key, values in LAYOUTS[name].items() if key != "parallel" or where == "two"}
        if "data" in sections:
            sections["data"] |= {"path": str(said), "length": 64, "pack": "packed" in name}
        else:  # a validation on the way hears no teacher
            sections["train"] = {"eval_every": 2, "eval_steps": 1, **sections.get("train", {})}
        return taught(folder / where / name, distill=sections.pop("distill", {}), **sections)

    run_world(2, [{"recipe": recipe(name, "two")} for name in LAYOUTS], folder / "losses.json")
    for name in LAYOUTS:
        run_here(recipe(name, "one"))
    return {where: {name: steps(folder / where / name) for name in LAYOUTS} for where in ("one", "two")}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_agree(records: Records, name: str) -> None:
    one, two = (records[where][name] for where in ("one", "two"))
    assert len(one) == len(two) == STEPS
    for key in ("loss", "distill_kl", "distill_hidden", "grad_norm"):
        assert [step[key] for step in two] == pytest.approx([step[key] for step in one], rel=2e-4), key
    assert one[0]["distill_hidden"] > 0.1  # the teacher is another


def test_a_batch_is_the_sum_of_its_micro_batches(tmp_path: Path) -> None:
    found = {}
    for size in (2, 8):
        run_here(taught(tmp_path / str(size), distill={"teacher": str(MISTRAL)}, train={"micro_batch": size}))
        found[size] = [(step["distill_hidden"], step["grad_norm"]) for step in steps(tmp_path / str(size))]
    for few, many in zip(found[2], found[8], strict=True):
        assert few == pytest.approx(many, rel=1e-4)


@pytest.mark.parametrize("rank", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_same_run(tmp_path: Path, rank: int) -> None:
    """Projections and their optimizer state come back to the bit; no export has them."""

    def asked(name: str, last: int) -> Raw:
        schedule = {"schedule": "constant", "lr": 3e-3}
        sections = {"optim": schedule, "run": {"save": True}, "train": {"steps": last, "deterministic": True}}
        if rank:
            sections["lora"] = {"rank": rank}
        return taught(tmp_path / name, distill={"teacher": str(MISTRAL)}, **sections)

    run_here(asked("whole", 4))
    run_here(asked("run", 2))
    run_here(asked("run", 4), resume=True)
    whole, again = (steps(tmp_path / name) for name in ("whole", "run"))
    for key in ("loss", "distill_hidden", "grad_norm"):
        assert [step[key] for step in again] == [step[key] for step in whole]
    names = read_dcp(tmp_path / "run" / "iter_0000004").tensors
    assert {f"{PART}.{n}.weight" for n in range(1, 5)} <= names.keys()
    stored = open_checkpoint(tmp_path / "run")
    assert not [name for name in stored.tensors if name.startswith(PART)]
    assert "projections to a teacher's width: 4 tensors" in stored.left_out
    folder, _ = export_run(tmp_path / "run", tmp_path / "exported")
    if not rank:
        assert open_checkpoint(folder).tensors.keys() == open_checkpoint(QWEN3).tensors.keys()


def test_a_run_exports_on_the_way_without_projections(tmp_path: Path) -> None:
    run = {"save": True, "save_every": 1, "export_every": 1}
    run_here(taught(tmp_path / "run", distill={"teacher": str(MISTRAL)}, train={"steps": 1}, run=run))
    folder = tmp_path / "run" / "export" / "step_0000001"
    assert open_checkpoint(folder).tensors.keys() == open_checkpoint(QWEN3).tensors.keys()


def test_a_student_comes_closer_and_learns_more(tmp_path: Path) -> None:
    """A teacher of four layers, a student of its first two: rows that neither saw. With the states of two layers the
    student's own come closer, and its loss on held-out rows is lower than with the teacher's distributions alone."""
    teacher, student, rows = drawn_rows(tmp_path, train=32, held=64)
    found = {}
    for name, hidden in (("logits", {}), ("both", {"hidden_weight": 0.1})):
        run_here(
            raw(
                tmp_path / name,
                model={"path": str(student)},
                data={"kind": "indexed", "path": rows, "split": "32,64,0"},
                train={"steps": 20, "micro_batch": 8, "eval_every": 20},
                run={"save": False},
                distill={"teacher": str(teacher), "weight": 1.0, **hidden},
            )
        )
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        found[name] = next(record["loss"] for record in lines if record["kind"] == "eval")
    apart = [step["distill_hidden"] for step in steps(tmp_path / "both")]
    assert apart[-1] < apart[0] - 0.3
    assert found["both"] < found["logits"] - 0.03


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, object], dict[str, dict[str, object]], type[MbxError], str]] = [
        ({"hidden_layers": {"2": 5}}, {}, UsageError, "the teacher has layers 1 to 4, and no layer 5"),
        ({"hidden_layers": {"5": 1}}, {}, UsageError, "the student has layers 1 to 4, and no layer 5"),
        ({"hidden_layers": {"two": 1}}, {}, UsageError, "'two' is no number of a layer"),
        ({"hidden_layers": {"2": 1, "02": 3}}, {}, UsageError, "'02' is no number of a layer"),
        (
            {"hidden_layers": {"2": 3}},
            {"parallel": {"pp": 2}},
            LayoutError,
            "layer 2 is of stage 1 .* layer 3 of stage 2",
        ),
        ({"hidden_weight": 0.0, "hidden_loss": "cosine"}, {}, UsageError, "distill.hidden_weight is 0"),
        ({"hidden_weight": 0.0, "weight": 0.0}, {}, UsageError, "leaves nothing to learn"),
        ({"teacher": ""}, {}, UsageError, "distill.teacher names none"),
    ]
    for distill, sections, kind, said in cases:
        with pytest.raises(kind, match=said):
            prepare(parse_recipe(taught(tmp_path / "run", distill=distill, **sections)), dry=True)


def test_words_on_disk_have_no_states(tmp_path: Path) -> None:
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "mbx_logits.json").write_text("{}")
    asked = taught(tmp_path / "run", distill={"teacher": str(tmp_path / "words")})
    with pytest.raises(UsageError, match="holds a teacher's likeliest tokens, and no hidden states"):
        prepare(parse_recipe(asked), dry=True)


def test_context_parallelism_is_refused(tmp_path: Path) -> None:
    from mbx.train.model.hidden import check_hidden

    recipe = parse_recipe(taught(tmp_path, distill={}, parallel={"cp": 2}))
    with pytest.raises(UnsupportedError, match="not compared under context parallelism"):
        check_hidden(recipe, blueprint(recipe), teacher_of(recipe))


@pytest.mark.parametrize(("pp", "vpp"), [(1, 1), (2, 1), (2, 2), (4, 1)])
def test_layers_without_names_are_of_one_stage(tmp_path: Path, pp: int, vpp: int) -> None:
    """Whatever the depths: the last hears the last, and no stage hears another's."""
    depths = [n * pp * vpp for n in (1, 2, 3, 5, 7)]
    for own in depths:
        for its in depths:
            config = {"num_layers": own}
            sections = {"parallel": {"pp": pp, "vpp": vpp}, "model": {"config": config}}
            recipe = parse_recipe(taught(tmp_path, distill={}, **sections))
            plan, teacher = blueprint(recipe), teacher_of(recipe)
            assert teacher is not None
            object.__setattr__(teacher.plan, "config", {**teacher.plan.config, "num_layers": its})
            pairs = pairs_of(recipe, plan, teacher)
            assert [pair.student for pair in pairs] == list(range(1, own + 1)) and pairs[-1].teacher == its
            assert [pair.teacher for pair in pairs] == sorted(pair.teacher for pair in pairs)


def test_the_budget_knows_the_states(tmp_path: Path) -> None:
    """Mistral's width, bf16: a tensor a pair, and projections that are trained with the student."""
    found = {}
    for weight in (0.0, 1.0):
        asked = taught(
            tmp_path, distill={"teacher": str(MISTRAL), "hidden_weight": weight}, train={"precision": "bf16"}
        )
        recipe = parse_recipe(asked)
        found[weight] = predict(recipe, blueprint(recipe), 1).parts
    before, after = found[0.0], found[1.0]
    projections = 4 * 32 * 64
    assert "hidden states" not in before and after["hidden states"] == 4 * (2 * 32) * 64 * 2
    assert after["weights"] - before["weights"] == 2 * projections
    assert after["gradients"] - before["gradients"] == 4 * projections
    assert after["optimizer"] - before["optimizer"] == 12 * projections


def test_the_plan_says_whose_states(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["llama32_1b_sft", f"model={QWEN3}", "data.kind=pattern", "data.length=32", "train.global_batch=2"]
    words += [
        f"run.dir={tmp_path / 'run'}",
        "run.device=cpu",
        f"distill.teacher={MISTRAL}",
        "distill.hidden_weight=0.5",
    ]
    assert main(["train", *words, "distill.hidden_layers.4=2", "distill.hidden_layers.2=1", "--dry-run"]) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "hidden states (mse) of layers 2:1, 4:2 weigh 0.5, by learned projections from 32 to 64" in said
