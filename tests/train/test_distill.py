"""A student and its teacher: the loss against PyTorch's own, and runs under several layouts."""

from __future__ import annotations

import json
import shutil
import time
import weakref
from pathlib import Path
from typing import TypeAlias

import pytest
import torch
import torch.nn.functional as F
from _distilled import drawn_rows
from _trainings import QWEN3, ROOT, Raw, raw, run_here, run_world, start_world

from converters.errors import LayoutError, StorageError, UnsupportedError, UsageError
from mbx.cli import main
from mbx.train.budget.counts import count
from mbx.train.budget.predict import predict
from mbx.train.distill import loss
from mbx.train.distill.loss import likeliest, total_loss
from mbx.train.distill.terms import Columns, CrossEntropy, Likeliest, Whole
from mbx.train.model.blueprint import blueprint
from mbx.train.model.teacher import teacher_of
from mbx.train.recipe.parse import parse_recipe
from mbx.train.run.logits import prepared_for, write_logits
from mbx.train.run.prepare import prepare

LLAMA, MISTRAL = (ROOT / "fixtures" / "tiny" / name for name in ("llama", "mistral"))
Records: TypeAlias = tuple[Path, dict[str, dict[str, list[dict[str, float]]]]]
TOKENS, VOCABULARY, WIDTH = 23, 50, 53
STEPS = 3


class One:
    """A group of one rank."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of student and teacher, labels, and a weight for each token, which go through five at a time."""
    monkeypatch.setattr(loss, "LOSS_CHUNK", 5 * WIDTH)
    g = torch.Generator().manual_seed(0)
    z, t = (3 * torch.randn(TOKENS, WIDTH, generator=g) for _ in range(2))
    return z, t, torch.randint(0, VOCABULARY, (TOKENS,), generator=g), torch.rand(TOKENS, generator=g)


def held() -> Columns:
    return Columns.of(WIDTH, VOCABULARY, One())  # type: ignore[arg-type]


def judged(z: torch.Tensor, weights: torch.Tensor, terms: list[object]) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of every token by `total_loss`, and the gradient by the logits."""
    leaf = z.clone().requires_grad_()
    found, _ = total_loss(leaf * 1, terms, One())  # type: ignore[arg-type]
    (found * weights).sum().backward()
    assert leaf.grad is not None
    return found.detach(), leaf.grad


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_whole_divergence_is_pytorchs(drawn: tuple[torch.Tensor, ...], temperature: float) -> None:
    """`torch.nn.functional` in float64 is the oracle, rows of padding left out of the divergence alone."""
    z, t, labels, weights = drawn
    own = z.double().requires_grad_()
    p, q = (F.log_softmax(x[:, :VOCABULARY].double() / temperature, -1) for x in (t, own))
    kl = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    want = 0.3 * F.cross_entropy(own, labels, reduction="none") + 0.7 * temperature**2 * kl
    (want * weights).sum().backward()
    terms = [CrossEntropy(labels, held(), 0.3), Whole(t, held(), 0.7 * temperature**2, temperature)]
    found, grad = judged(z, weights, terms)
    torch.testing.assert_close(found.double(), want.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad.double(), own.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 5, VOCABULARY])
def test_the_likeliest_and_the_rest_are_a_divergence(drawn: tuple[torch.Tensor, ...], k: int) -> None:
    """By autograd in float64; it falls short of the whole by what the rest hides, p_rest · KL among the rest."""
    z, t, _, weights = drawn
    own, tau = z.double().requires_grad_(), 2.0
    p, q = (F.log_softmax(x[:, :VOCABULARY].double() / tau, -1) for x in (t, own))
    best = p.topk(k).indices
    known = torch.zeros_like(p, dtype=torch.bool).scatter(1, best, True)
    rest = [x.masked_fill(known, -torch.inf).logsumexp(-1) for x in (p, q)]
    want = (p.exp() * (p - q) * known).sum(-1)
    if k < VOCABULARY:
        want = want + rest[0].exp() * (rest[0] - rest[1])
    (want * weights).sum().backward()
    top = likeliest(t, k, tau, held())
    found, grad = judged(z, weights, [Likeliest(top, held(), 1.0, tau)])
    assert torch.equal(top.tokens, best)
    torch.testing.assert_close(found.double(), want.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad.double(), own.grad, atol=1e-6, rtol=1e-5)
    hidden = (F.kl_div(q, p, log_target=True, reduction="none").sum(-1) - want).detach()
    if k < VOCABULARY:
        among = [x - r[:, None] for x, r in zip((p, q), rest, strict=True)]
        gap = rest[0].exp() * (among[0].exp() * (among[0] - among[1]) * ~known).sum(-1)
        torch.testing.assert_close(hidden, gap.detach(), atol=1e-9, rtol=1e-6)
    assert (hidden > -1e-9).all()


def test_a_kept_loss_keeps_no_teacher(drawn: tuple[torch.Tensor, ...]) -> None:
    """Schedules hold a micro-batch's loss while the next one runs forward: the teacher's logits are gone by then."""
    z, t, _, _ = drawn
    spoken = t.clone()
    gone = weakref.ref(spoken)
    term = Whole(spoken, held(), 1.0, 1.0)
    found, _ = total_loss(z.clone().requires_grad_() * 1, [term], One())  # type: ignore[arg-type]
    del spoken, term
    assert gone() is not None
    found.sum().backward()
    assert gone() is None


def test_extremes_stay_finite() -> None:
    """A teacher that is sure of one token, a student that is sure of another: nothing overflows, nothing vanishes."""
    z, t = torch.zeros(2, WIDTH), torch.zeros(2, WIDTH)
    z[:, 3], t[:, 4] = 500.0, 500.0
    for terms in (
        [Whole(t, held(), 1.0, 1.0)],
        [Likeliest(likeliest(t, 2, 1.0, held()), held(), 1.0, 1.0)],
    ):
        found, grad = judged(z, torch.ones(2), terms)  # type: ignore[arg-type]
        torch.testing.assert_close(found, torch.full((2,), 500.0))
        assert torch.isfinite(grad).all() and grad[0, 3] == 1 and grad[0, 4] == -1


def taught(run_dir: Path, *, distill: dict[str, object], **sections: dict[str, object]) -> Raw:
    """The tiny Qwen3 under the tiny Llama's teaching, unless `distill` says otherwise."""
    sections["run"] = {"save": False, **sections.get("run", {})}
    asked = {"train": {"steps": STEPS, **sections.pop("train", {})}, "model": sections.pop("model", {})}
    asked["model"] = {"path": str(QWEN3), "vocab_divisor": 64, **asked["model"]}
    return raw(run_dir, distill={"teacher": str(LLAMA), **distill}, **{**sections, **asked})


def steps(run_dir: Path) -> list[dict[str, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "step"]


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path: Path) -> None:
    """At a learning rate of 0 it stays so: no divergence and no gradient, of the whole and of the likeliest tokens."""
    for name, top_k in (("whole", 0), ("top", 8)):
        asked = {"teacher": str(QWEN3), "weight": 1.0, "temperature": 2.0, "top_k": top_k}
        run_here(taught(tmp_path / name, distill=asked, optim={"lr": 0.0}, train={"steps": 1}))
        for step in steps(tmp_path / name):
            assert abs(step["loss"]) < 1e-6 and abs(step["distill_kl"]) < 1e-6
            assert step["grad_norm"] < 1e-5  # of another teacher it is 1.5


def test_a_checkpoint_teaches(tmp_path: Path) -> None:
    """A run's own checkpoint as the start and as the teacher: they are one model."""
    run = tmp_path / "run"
    run_here(raw(run, train={"steps": 1}))
    asked = taught(tmp_path / "again", distill={"teacher": str(run)}, optim={"lr": 0.0}, model={"vocab_divisor": 1})
    run_here({**asked, "train": {**asked["train"], "steps": 1}}, init_from=str(run))
    (step,) = steps(tmp_path / "again")
    assert abs(step["distill_kl"]) < 1e-6 and step["loss"] > 1


def edited(folder: Path, source: Path, **config: object) -> str:
    """A copy of a checkpoint's folder with another config."""
    shutil.copytree(source, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return str(folder)


def other_tokens(folder: Path) -> str:
    edited(folder, LLAMA)
    path = folder / "tokenizer.json"
    words = json.loads(path.read_text())
    vocab = words["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(words))
    return str(folder)


def test_what_cannot_teach_is_refused(tmp_path: Path) -> None:
    qwen2 = ROOT / "fixtures" / "tiny" / "qwen2"
    mtp = {"model": {"config": {"mtp_num_layers": 1}}}
    cases: list[tuple[dict[str, object], dict[str, dict[str, object]], type[Exception], str]] = [
        ({"teacher": str(tmp_path / "no")}, {}, StorageError, "distill.teacher: .* is no folder"),
        ({"teacher": edited(tmp_path / "more", LLAMA, vocab_size=252)}, {}, UsageError, "252 tokens, .* student 251"),
        ({"teacher": other_tokens(tmp_path / "other")}, {}, UsageError, "tokenizer is another: 2 token.*'a' is"),
        ({"top_k": 251}, {}, UsageError, "the vocabulary has 251 tokens"),
        ({"teacher": str(qwen2)}, {"parallel": {"pp": 2}}, LayoutError, "distill.teacher: .*3"),
        ({}, mtp, UnsupportedError, "prediction layers takes no teacher"),
    ]
    for distill, sections, kind, said in cases:
        with pytest.raises(kind, match=said):
            prepare(parse_recipe(taught(tmp_path / "run", distill=distill, **sections)), dry=True)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"temperature": 2.0}, "distill.teacher names none"),
        ({"teacher": "x", "weight": 0.0}, "leaves nothing to learn"),
    ],
)
def test_keys_that_a_run_would_not_read_are_refused(keys: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        parse_recipe(raw(tmp_path, distill=keys))


def test_another_teacher_is_another_run(tmp_path: Path) -> None:
    run_here(taught(tmp_path / "run", distill={}, train={"steps": 1}, run={"save": True}))
    other = taught(tmp_path / "run", distill={"teacher": str(QWEN3)}, train={"steps": 2}, run={"save": True})
    with pytest.raises(UsageError, match=r"the recipe changed in distill\.teacher"):
        prepare(parse_recipe(other), resume=True)


def test_the_budget_knows_the_teacher(tmp_path: Path) -> None:
    """Its weights, and its logits unless a few tokens are all that is heard; Megatron Core's copy in fp32 is gone."""
    found = {}
    for name, distill in (("alone", None), ("whole", {}), ("top", {"top_k": 8})):
        asked = taught(tmp_path, distill=distill or {}, train={"precision": "bf16"}, model={"vocab_divisor": 1})
        if distill is None:
            del asked["distill"]
        recipe = parse_recipe(asked)
        found[name] = predict(recipe, blueprint(recipe), 1).parts
    teacher = teacher_of(recipe)
    assert teacher is not None
    logits = 2 * 32 * 251 * 2
    for name in ("whole", "top"):
        assert found[name]["teacher"] == 2 * count(teacher.recipe, teacher.plan, 0).base
        assert found[name]["logits"] == logits
    assert found["whole"]["teacher's logits"] == logits and "teacher's logits" not in found["top"]
    assert "teacher" not in found["alone"]


#: name: sections, of which `parallel` is the layout that is compared with one process.
LAYOUTS: dict[str, dict[str, dict[str, object]]] = {
    "tp": {"parallel": {"tp": 2}, "distill": {"teacher": str(MISTRAL)}},
    "tp_top_lora": {
        "parallel": {"tp": 2},
        "distill": {"top_k": 7, "temperature": 2.0, "weight": 1.0},
        "lora": {"rank": 4},
    },
    "pp": {"parallel": {"pp": 2}, "distill": {"teacher": str(MISTRAL)}},
    "vpp_packed": {"parallel": {"pp": 2, "vpp": 2}, "distill": {"temperature": 2.0}, "data": {"kind": "chat"}},
    "tp_states": {
        "parallel": {"tp": 2},
        "distill": {"teacher": str(MISTRAL), "hidden_weight": 0.5},
        "data": {"kind": "chat", "pack": False},
    },
    "pp_states": {"parallel": {"pp": 2}, "distill": {"hidden_weight": 0.5, "hidden_loss": "cosine"}},
}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Records:
    """Where all lies, and the steps of each layout and of one process."""
    folder = tmp_path_factory.mktemp("taught")
    chats = folder / "chats.jsonl"
    said = [(f"{n}?", str(n) * (n + 1)) for n in range(9)]
    talk = [[{"role": "user", "content": ask}, {"role": "assistant", "content": answer}] for ask, answer in said]
    chats.write_text("".join(json.dumps({"messages": one}) + "\n" for one in talk))

    def recipe(name: str, where: str) -> Raw:
        sections = {key: dict(values) for key, values in LAYOUTS[name].items() if key != "parallel" or where == "two"}
        if "data" in sections:
            sections["data"] |= {"path": str(chats), "length": 64}
        # a validation on the way: its passes have no teacher, and states of one width
        sections["train"] = {"eval_every": 2, "eval_steps": 1} if "data" not in sections else {}
        return taught(folder / where / name, **sections)  # type: ignore[arg-type]

    jobs: list[dict[str, object]] = [{"recipe": recipe(name, "two")} for name in LAYOUTS]
    for name, parallel in WRITERS.items():
        jobs.append({"recipe": asked(folder / "none", chats, parallel=parallel), "logits": str(folder / name)})
    from_disk = asked(folder / "pp_from_disk", chats, parallel={"pp": 2}, distill={"teacher": str(folder / "dp")})
    run_world(2, [*jobs, {"recipe": from_disk}], folder / "losses.json")
    for name in LAYOUTS:
        run_here(recipe(name, "one"))
    return folder, {where: {name: steps(folder / where / name) for name in LAYOUTS} for where in ("one", "two")}


#: Layouts in which a teacher's words are written.
WRITERS: dict[str, dict[str, object]] = {"tp": {"tp": 2}, "pp": {"pp": 2}, "dp": {}}


def asked(run_dir: Path, chats: Path, **sections: dict[str, object]) -> Raw:
    """Chats under Mistral's teaching, of which eight tokens and the rest are heard."""
    distill = {"teacher": str(MISTRAL), "top_k": 8, "temperature": 2.0, "weight": 0.5, **sections.pop("distill", {})}
    data: dict[str, object] = {"kind": "chat", "path": str(chats), "length": 64, **sections.pop("data", {})}
    # two rows an epoch, so that the run goes through them three times
    train: dict[str, object] = {"micro_batch": 1, "global_batch": 2}
    return taught(run_dir, distill=distill, data=data, train=train, **sections)


@pytest.fixture(scope="module")
def live(records: Records, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of one process with the teacher beside it."""
    return run_here(asked(tmp_path_factory.mktemp("live") / "run", records[0] / "chats.jsonl"))


@pytest.mark.parametrize("name", WRITERS)
def test_words_on_disk_are_those_of_a_live_teacher(
    tmp_path: Path, records: Records, live: list[float], name: str
) -> None:
    """Written by two ranks, heard by one: the losses of a run with the teacher beside it."""
    folder, _ = records
    read = run_here(asked(tmp_path / "read", folder / "chats.jsonl", distill={"teacher": str(folder / name)}))
    assert read == pytest.approx(live, rel=1e-5)
    assert [step["loss"] for step in steps(folder / "pp_from_disk")] == pytest.approx(live, rel=1e-4)


def test_one_process_writes_what_it_would_hear(tmp_path: Path, records: Records) -> None:
    """To the bit, rows without an end included."""
    recipe = taught(tmp_path / "run", distill={"top_k": 5, "temperature": 2.0}, train={"steps": 2})
    target = tmp_path / "words"
    facts = write_logits(prepared_for(parse_recipe(recipe), target), target)
    assert (facts.rows, facts.learned, facts.parts) == (16, 16 * 32, 1)
    assert not (tmp_path / "words.partial").exists() and not (tmp_path / "words.run").exists()
    heard = taught(tmp_path / "heard", distill={**recipe["distill"], "teacher": str(target)}, train={"steps": 2})
    assert run_here(heard) == run_here(recipe)


def test_the_command_writes_and_the_plan_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "words"
    words = [
        "llama32_1b_sft",
        f"model={QWEN3}",
        "data.kind=pattern",
        "data.length=32",
        "train.global_batch=2",
        "steps=2",
    ]
    words += [f"run.dir={tmp_path / 'run'}", "run.device=cpu"]
    assert main(["train", "logits", *words, "distill.top_k=5", "--teacher", str(LLAMA), "--out", str(target)]) == 0
    assert "5 of 251 tokens for each of 128 that are learned, in 4 rows" in capfd.readouterr().out
    assert main(["train", "logits", *words, "distill.top_k=5", "--teacher", str(LLAMA), "--out", str(target)]) == 2
    assert main(["train", "logits", *words, "--teacher", str(LLAMA), "--out", str(tmp_path / "other")]) == 2
    assert "distill.top_k=64 says" in capfd.readouterr().err
    for teacher, said in (
        (target, f"words of {LLAMA} on disk; its 5 likeliest"),
        (LLAMA, "frozen, on these ranks; its whole"),
    ):
        assert main(["train", *words, f"distill.teacher={teacher}", "--dry-run"]) == 0
        assert said in capfd.readouterr().out


#: A file of hooks whose run looks at no row ahead.
UNLOOKED = "from mbx.train.run import prepare\nprepare._LOOKED_AT = 0\ndef on_step(step):\n    pass\n"


def test_a_row_that_was_not_asked_about_ends_the_run_where_it_comes(
    tmp_path: Path, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = records
    monkeypatch.setattr("mbx.train.run.prepare._LOOKED_AT", 0)
    with pytest.raises(UsageError, match="have nothing on row .* of other data"):
        run_here(one_row_changed(folder, tmp_path))
    assert not list((tmp_path / "run").glob("iter_*"))


@pytest.mark.slow
def test_a_row_that_one_rank_was_not_told_of_ends_both(tmp_path: Path, records: Records) -> None:
    folder, _ = records
    (tmp_path / "hooks.py").write_text(UNLOOKED)
    job = {"recipe": one_row_changed(folder, tmp_path), "hooks": str(tmp_path / "hooks.py")}
    out, began = tmp_path / "losses.json", time.monotonic()
    assert [process.wait(timeout=120) for process in start_world(2, [job], out)] == [1, 1]
    said = [out.with_suffix(f".log{rank}").read_text().strip().splitlines()[-1] for rank in range(2)]
    assert all("have nothing on row" in line for line in said) and sum("rank " in line for line in said) == 1
    assert time.monotonic() - began < 100  # and not run.timeout_s


def one_row_changed(folder: Path, here: Path) -> Raw:
    """A run on the words of `folder`, of whose two rows one is another than it was."""
    other = here / "other.jsonl"
    lines = (folder / "chats.jsonl").read_text().splitlines(keepends=True)
    other.write_text("".join([lines[0].replace('"0"', '"7"'), *lines[1:]]))
    return asked(here / "run", other, distill={"teacher": str(folder / "dp")})


def test_words_that_answer_another_question_are_refused(tmp_path: Path, records: Records) -> None:
    folder, _ = records
    chats, words = folder / "chats.jsonl", str(folder / "dp")
    other = tmp_path / "other.jsonl"
    other.write_text(chats.read_text().replace("3", "4"))
    cases = [
        (
            asked(tmp_path / "run", chats, distill={"teacher": words, "temperature": 1.0}),
            "distill.temperature 2.0, not 1.0",
        ),
        (asked(tmp_path / "run", chats, distill={"teacher": words, "top_k": 4}), "distill.top_k 8, not 4"),
        (asked(tmp_path / "run", other, distill={"teacher": words}), "nothing on row .*other data"),
        (asked(tmp_path / "run", chats, distill={"teacher": words}, data={"length": 32}), "data.length 64, not 32"),
        (
            asked(tmp_path / "run", chats, distill={"teacher": words}, data={"pack": False}),
            "nothing on row .*other data",
        ),
    ]
    for recipe, said in cases:
        with pytest.raises(UsageError, match=said):
            prepare(parse_recipe(recipe), dry=True)
    damaged = tmp_path / "damaged"
    shutil.copytree(words, damaged)
    with (damaged / "00000.rest").open("r+b") as file:
        file.truncate(4)
    with pytest.raises(StorageError, match="part 0 do not fit"):
        prepare(parse_recipe(asked(tmp_path / "run", chats, distill={"teacher": str(damaged)})), dry=True)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_agree(records: Records, name: str) -> None:
    one, two = (records[1][where][name] for where in ("one", "two"))
    assert len(one) == len(two) == STEPS
    for key in ("loss", "distill_kl", "grad_norm", *(["distill_hidden"] if "states" in name else [])):
        assert [step[key] for step in two] == pytest.approx([step[key] for step in one], rel=2e-4)
    assert one[0]["distill_kl"] > 0.01  # the teacher is another


def test_a_student_learns_more_of_a_teacher_than_of_its_few_words(tmp_path: Path) -> None:
    """Rows are drawn from a teacher, the student has half its layers: the loss of rows that neither saw is lower with
    the teacher's distributions than with the rows alone."""
    teacher, student, rows = drawn_rows(tmp_path, train=32, held=64)
    found = {}
    for name, distill in (("alone", {}), ("taught", {"teacher": str(teacher), "weight": 1.0})):
        run_here(
            raw(
                tmp_path / name,
                model={"path": str(student)},
                data={"kind": "indexed", "path": rows, "split": "32,64,0"},
                train={"steps": 20, "micro_batch": 8, "eval_every": 20},
                run={"save": False},
                distill=distill,
            )
        )
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        found[name] = next(record["loss"] for record in lines if record["kind"] == "eval")
    assert found["taught"] < found["alone"] - 0.1
