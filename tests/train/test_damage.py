"""Full disks, damaged checkpoints and early ends: one clear error, and nothing half left."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from _trainings import QWEN3, Raw, raw, run_here

from converters.errors import CoverageError, MbxError, StorageError, UnsupportedError, UsageError
from mbx.installed import core_release
from mbx.train.checkpoints.export import export_run
from mbx.train.checkpoints.state import latest
from mbx.train.recipe.parse import parse_recipe
from mbx.train.run.log import METRICS, chart
from mbx.train.run.prepare import prepare
from mbx.train.run.report import read_metrics, write_report


def short(folder: Path, steps: int = 2, **sections: dict[str, object]) -> Raw:
    sections["train"] = {"steps": steps, "micro_batch": 2, "global_batch": 4, **sections.get("train", {})}
    return raw(folder, **sections)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    run_here(short(run))
    return run


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.mark.parametrize("beside", [False, True], ids=["waited for", "asynchronous"])
def test_a_checkpoint_that_does_not_fit_on_the_disk(tmp_path: Path, beside: bool) -> None:
    """A limit on files stands for a full disk: the writers meet it in the same calls."""
    run = tmp_path / "run"
    run_here(short(run))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(StorageError, match=r"iter_0000003` could not be written: RuntimeError") as caught:
            run_here(short(run, 3, run={"save_async": beside}), resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in caught.value.fact and caught.value.hint == "‹resume› continues from iter_0000002"
    assert [path.name for path in run.glob("iter_*")] == ["iter_0000002"]
    assert len(run_here(short(run, 3), resume=True)) == 1


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda last: (last / ".metadata").unlink(), "no .metadata"),
        pytest.param(
            lambda last: (last / "common.pt").unlink(),
            "common.pt",
            marks=pytest.mark.skipif(core_release().common_file is None, reason="this release saves no common.pt"),
        ),
        (lambda last: (last / "__0_0.distcp").unlink(), "__0_0.distcp"),
        (lambda last: (last / "__0_0.distcp").write_bytes(b"cut"), "__0_0.distcp"),
        (lambda last: (last / "mbx_train.json").write_text("{}"), "mbx_train.json"),
        (lambda last: (last / "recipe.json").write_text('{"a": 1}'), "recipe.json"),
        (lambda last: (last / "recipe.json").write_text("[]"), "recipe.json"),
    ],
)
def test_a_damaged_checkpoint_is_named(copy: Path, damage: Callable[[Path], object], words: str) -> None:
    last = latest(copy)
    assert last is not None
    damage(last)
    with pytest.raises(StorageError) as caught:
        run_here(short(copy, 3), resume=True)
    assert words in caught.value.fact and str(last) in caught.value.fact and "\n" not in caught.value.fact


def test_an_export_needs_a_whole_recipe(copy: Path, tmp_path: Path) -> None:
    (copy / "iter_0000002" / "recipe.json").write_text('{"a": 1}')
    with pytest.raises(StorageError, match=r"recipe\.json"):
        export_run(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_is_older_than_a_key_has_its_default(copy: Path) -> None:
    path = copy / "iter_0000002" / "recipe.json"
    before = json.loads(path.read_text())
    del before["lora"]["dropout"], before["parallel"]["etp"]
    path.write_text(json.dumps(before))
    assert len(run_here(short(copy, 3), resume=True)) == 1


def test_a_lost_tracker_is_not_a_lost_run(copy: Path) -> None:
    (copy / "latest_checkpointed_iteration.txt").unlink()
    for resume in (True, False):
        with pytest.raises(MbxError) as caught:
            run_here(short(copy, 3), resume=resume)
        assert f"echo 2 > {copy / 'latest_checkpointed_iteration.txt'}" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("train", {"precision": "bf16"}),
        ("optim", {"optimizer": "sgd"}),
        ("run", {"save_optimizer": False}),
        ("train", {"seed": 5}),
        ("lora", {"rank": 4}),
    ],
)
def test_a_changed_recipe_is_refused_before_anything_is_built(
    finished: Path, section: str, change: dict[str, object]
) -> None:
    (key,) = change
    with pytest.raises(UsageError) as caught:
        prepare(parse_recipe(short(finished, 3, **{section: change})), resume=True, dry=True)
    assert caught.value.fact.startswith(f"‹resume›: the recipe changed in {section}.{key};")
    prepare(parse_recipe(short(finished, 3)), resume=True, dry=True)  # more steps are no change


def test_what_a_kill_leaves_goes_with_the_next_checkpoint(copy: Path) -> None:
    (copy / "iter_0000009").mkdir()
    (copy / "iter_0000009" / "__0_0.distcp").write_bytes(b"half")
    run_here(short(copy, 3), resume=True)
    assert sorted(path.name for path in copy.glob("iter_*")) == ["iter_0000002", "iter_0000003"]


def test_a_run_that_ends_before_its_first_step_leaves_no_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(UnsupportedError, match="foo"):
        run_here(short(run, model={"config": {"foo": 1}}))
    with pytest.raises(CoverageError, match=r"has shape \[251, 32\] in the storage"):
        run_here(short(run, model={"config": {"hidden_size": 16}}))
    with pytest.raises(CoverageError, match="the model has"):
        run_here(short(run, model={"config": {"num_layers": 2}}))
    assert not run.exists()


@pytest.mark.parametrize("layers", [0, "abc", True])
def test_a_model_without_layers_is_refused(tmp_path: Path, layers: object) -> None:
    with pytest.raises(UsageError, match="num_layers"):
        prepare(parse_recipe(short(tmp_path / "run", model={"config": {"num_layers": layers}})), dry=True)


def test_weights_are_looked_at_by_a_dry_run(tmp_path: Path) -> None:
    folder = shutil.copytree(QWEN3, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"cut")
    recipe = parse_recipe(short(tmp_path / "run", model={"path": str(folder)}))
    with pytest.raises(StorageError, match=r"model\.safetensors"):
        prepare(recipe, dry=True)
    (folder / "model.safetensors").unlink()
    assert prepare(recipe, dry=True).start.why.endswith("which are not there yet"), "a config is enough for a plan"
    with pytest.raises(StorageError, match="no safetensors weights"):
        prepare(recipe)
    with pytest.raises(StorageError, match="is no folder"):
        prepare(parse_recipe(short(tmp_path / "run")), init_from=str(folder / "config.json"), dry=True)


def test_random_weights_need_no_weights_in_the_folder(tmp_path: Path) -> None:
    """Config and tokenizer are enough to pretrain; the checkpoint is saved, and exported in one file."""
    folder = shutil.copytree(QWEN3, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    run_here(short(tmp_path / "run", 1, model={"path": str(folder), "init": "random"}))
    out, _ = export_run(tmp_path / "run", tmp_path / "out")
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {path.name for path in out.iterdir()}


def test_adapters_on_random_weights_are_not_saved(tmp_path: Path) -> None:
    sections: dict[str, dict[str, object]] = {"model": {"init": "random"}, "lora": {"rank": 4}}
    with pytest.raises(UsageError, match="random weights"):
        prepare(parse_recipe(short(tmp_path / "run", **sections)), dry=True)
    prepare(parse_recipe(short(tmp_path / "run", **sections, run={"save": False})), dry=True)


def test_adapters_need_targets(tmp_path: Path) -> None:
    for lora, words in (
        ({"targets": []}, "empty"),
        ({"targets": ["q_prj"]}, "this model has no q_prj"),
        ({"adapter": "nowhere"}, "no folder"),
    ):
        with pytest.raises(MbxError, match=words):
            prepare(parse_recipe(short(tmp_path / "run", lora={"rank": 4, **lora})), dry=True)


def test_names_that_people_use_are_taken(tmp_path: Path) -> None:
    from mbx.train.model.adapted import adapted
    from mbx.train.recipe.catalogue import load_recipe

    given = ["model.init=random", "data.kind=pattern", "run.save=false", f"run.dir={tmp_path}", "run.device=cpu"]

    def modules(*overrides: str) -> set[str]:
        prepared = prepare(load_recipe("gemma3_1b_lora", [*given, *overrides]), dry=True)
        found = adapted(prepared.recipe.lora, prepared.plan)
        return {part.module.rpartition(".")[2] for linear in found.values() for part in linear.parts}

    everything = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert modules() == modules("lora.targets=all-linear") == everything
    assert modules("lora.targets=q_proj,self_attn.v_proj") == {"q_proj", "v_proj"}
    assert modules("lora.targets=linear_qkv", "lora.exclude=k_proj") == {"q_proj", "v_proj"}
    assert modules(r"lora.targets=.*\.mlp\..*") == {"gate_proj", "up_proj", "down_proj"}
    with pytest.raises(MbxError, match="this model has no q_prj") as caught:
        modules("lora.targets=q_prj")
    assert "q_proj" in str(caught.value.hint)
    with pytest.raises(MbxError, match="leaves nothing"):
        modules("lora.targets=q_proj", "lora.exclude=linear_qkv")


def test_a_base_is_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(QWEN3, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    run_here(short(tmp_path / "run", 1, model={"path": "base"}, lora={"rank": 4}))
    monkeypatch.chdir("/")
    assert export_run(tmp_path / "run", tmp_path / "merged", merged=True)[1].endswith("merged in fp32")


def test_families_that_need_transformer_engine_are_planned_but_not_run(tmp_path: Path) -> None:
    from mbx.train.recipe.catalogue import load_recipe

    for name in ("gpt_oss_20b_pretrain", "nemotron_h_8b_pretrain"):
        recipe = load_recipe(
            name, ["data.kind=mock", f"run.dir={tmp_path}", "parallel.ep=1", "parallel.tp=1", "run.device=cpu"]
        )
        with pytest.raises(UnsupportedError, match="Transformer Engine only"):
            prepare(recipe)
        prepare(recipe, dry=True)


def test_chats_need_a_template(tmp_path: Path) -> None:
    folder = shutil.copytree(QWEN3, tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}))
    sections: dict[str, dict[str, object]] = {
        "model": {"path": str(folder)},
        "data": {"kind": "chat", "path": str(tmp_path / "d.jsonl")},
    }
    with pytest.raises(UsageError, match="has no chat template"):
        prepare(parse_recipe(short(tmp_path / "run", **sections)), dry=True)


def test_files_of_tokens_are_looked_for_before_anything_is_built(tmp_path: Path) -> None:
    for path, words in (("", "needs a file"), (str(tmp_path / "no"), r"no\.idx")):
        with pytest.raises(MbxError, match=words):
            prepare(parse_recipe(short(tmp_path / "run", data={"kind": "indexed", "path": path})), dry=True)


def test_a_record_cut_by_a_kill_is_left_out_and_overwritten(copy: Path) -> None:
    with (copy / METRICS).open("a") as file:
        file.write('{"kind": "st')
    assert len(read_metrics(copy)[0]) == 2
    run_here(short(copy, 3), resume=True)
    assert len(read_metrics(copy)[0]) == 3


@pytest.mark.parametrize("line", ["[1]", '{"kind": "step"}', '{"kind": "step", "step": "x"}', "{", "\\xff"])
def test_a_damaged_record_is_named_by_its_line(copy: Path, line: str) -> None:
    with (copy / METRICS).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(StorageError, match=rf"{METRICS}:3: "):
        write_report(copy)


def test_losses_without_end_are_drawn_as_gaps(copy: Path) -> None:
    nan, infinite = float("nan"), float("inf")
    assert chart([nan, infinite]) == "" and len(chart([1.0, infinite, nan, 2.0]).splitlines()) == 6
    record = json.loads((copy / METRICS).read_text().splitlines()[0])
    with (copy / METRICS).open("a") as file:
        file.write(json.dumps({**record, "step": 3, "loss": infinite}) + "\n")
    assert "nan" not in write_report(copy).read_text()
