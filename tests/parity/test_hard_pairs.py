"""Pairs that are nearly the same model: what no Megatron Core field says, names twice, tensors that are empty."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from _planted import convert
from _stores import Tensors, changed_hf, changed_mcore, per_layer, read_hf, read_mcore, write_mcore

from converters.errors import StorageError, UsageError
from converters.mcore.flavours import TEXT_ALONE
from fixtures.make_tiny import make
from fixtures.wrapped import make_wrapped
from mbx.cli import main
from mbx.formats.hf import KEPT
from mbx.formats.summary import summarize as examine
from mbx.proof.diff import diff
from mbx.proof.integrity import check
from mbx.proof.parity import Leg, ParityReport, parity
from mbx.run.execution import run
from mbx.run.job import Options, plan_hf_to_mcore
from mbx.run.manifest import MANIFEST
from mbx.run.reshard import plan_mcore_to_mcore

EMBEDDING = "embedding.word_embeddings.weight"
NORM = "decoder.layers.mlp.linear_fc1.layer_norm_weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("llama") / "hf")


@pytest.fixture(scope="module")
def good(llama: Path) -> Path:
    return convert(llama, llama.parent / "mcore")


def leg(report: ParityReport, name: str) -> Leg:
    return next(found for found in report.legs if found.name == name)


def restated(checkpoint: Path, target: Path, change: Mapping[str, Any]) -> Path:
    """A copy of a checkpoint whose hf/config.json says something else."""
    shutil.copytree(checkpoint, target)
    path = next(target.glob("iter_*")) / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return target


# --- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"])
def test_rotary_constants_that_megatron_core_fixes_are_settings(
    llama: Path, good: Path, tmp_path: Path, key: str
) -> None:
    scaling = json.loads((llama / "config.json").read_text())["rope_scaling"]
    change = {"rope_scaling": {**scaling, key: scaling[key] + 1}}
    folder, checkpoint = changed_hf(llama, tmp_path / "hf", config=change), restated(good, tmp_path / "mc", change)
    for pair in ((llama, folder), (llama, checkpoint), (checkpoint, llama), (good, checkpoint)):
        found = leg(parity(*pair), "config")
        assert found.status == "failed" and any(f"rope_scaling.{key}" in line for line in found.details)
    assert parity(folder, checkpoint).passed


def test_what_llama_4_does_behind_8192_positions_is_a_setting(tmp_path: Path) -> None:
    source = make("llama4_scout", tmp_path / "hf")
    other = changed_hf(source, tmp_path / "other", config={"attn_temperature_tuning": False})
    assert leg(parity(source, other), "config").status == "failed"
    assert parity(source, source).passed


def test_a_checkpoint_of_another_model_type_is_read_by_its_own_table(llama: Path, good: Path, tmp_path: Path) -> None:
    """Gemma scales its embeddings and adds 1 to its norms, under the keys that Llama has."""
    other = restated(good, tmp_path / "mc", {"model_type": "gemma", "architectures": ["GemmaForCausalLM"]})
    for pair in ((llama, other), (other, llama)):
        assert leg(parity(*pair), "config").status != "passed"
    unknown = restated(good, tmp_path / "unknown", {"model_type": "no_such_model"})
    assert leg(parity(llama, unknown), "config").status == "not run"


def test_folders_that_are_decoded_differently_differ(tmp_path: Path) -> None:
    source = make("deepseek_v3_fp8", tmp_path / "fp8")
    stated = json.loads((source / "config.json").read_text())["quantization_config"]
    for number, change in enumerate(({"weight_block_size": [32, 32]}, {"activation_scheme": "static"})):
        other = changed_hf(source, tmp_path / str(number), config={"quantization_config": {**stated, **change}})
        found = leg(parity(source, other), "config")
        assert found.status == "failed" and f"quantization_config.{next(iter(change))}" in found.details[0]
    silent = changed_hf(source, tmp_path / "silent", config={"quantization_config": None})
    assert leg(parity(source, silent), "config").status == "failed"
    spelt = changed_hf(source, tmp_path / "spelt", config={"quantization_config": {**stated, "dequantize": False}})
    assert parity(source, spelt).passed


def test_args_that_say_yarn_and_plain_rotation_differ(tmp_path: Path) -> None:
    source = convert(make("deepseek_v3", tmp_path / "hf"), tmp_path / "mcore")
    sides = []
    for name, kind in (("a", "yarn"), ("b", "rope")):
        run(plan_mcore_to_mcore(source, side := tmp_path / name, Options(format="torch", sync=False)))
        iteration = next(side.glob("iter_*"))
        shutil.rmtree(iteration / "hf")
        for file in iteration.glob("mp_rank_*/*.pt"):
            stored = torch.load(file, weights_only=False)
            stored["args"].rope_type = kind
            torch.save(stored, file)
        sides.append(side)
    assert parity(sides[0], sides[0]).passed
    found = leg(parity(*sides), "config")
    assert found.status == "failed" and "rope_type" in found.details[0]


def test_a_cast_between_two_of_one_kind_and_a_table_that_is_not_there_are_refused(llama: Path, good: Path) -> None:
    for side in (llama, good):
        with pytest.raises(UsageError, match="one kind"):
            parity(side, side, dtype="fp32")
        with pytest.raises(UsageError, match="no table"):
            parity(side, side, mapping="no_such_table")


# --- tensors -------------------------------------------------------------------------------------------------------


def test_a_tensor_under_two_spellings_is_one_too_many(llama: Path, good: Path, tmp_path: Path) -> None:
    """Layers as a stack and each under its own key: which of the two a reader takes is not known."""

    def both(tensors: Tensors) -> None:
        stack = {NORM: tensors[NORM]}
        tensors |= {name: tensor.clone() for name, tensor in per_layer(stack).items()}

    twice = changed_mcore(good, tmp_path / "twice", both)
    for pair in ((llama, twice), (good, twice), (twice, good)):
        found = leg(parity(*pair), "cover")
        assert found.status == "failed" and len(found.details) == 4


def test_a_head_under_two_spellings_is_one_too_many(tmp_path: Path) -> None:
    source = make("deepseek_v3", tmp_path / "hf")
    good = convert(source, tmp_path / "mcore")

    def both(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".transformer_layer." in name]:
            tensors[name.replace(".transformer_layer.", ".mtp_model_layer.")] = tensors[name].clone()

    twice = changed_mcore(good, tmp_path / "twice", both)
    for pair in ((source, twice), (good, twice)):
        assert leg(parity(*pair), "cover").status == "failed"


def test_an_embedding_that_lost_tokens_is_a_change_and_padding_is_none(good: Path, tmp_path: Path) -> None:
    def rows(count: int) -> Any:
        def change(tensors: Tensors) -> None:
            old = tensors[EMBEDDING]
            grown = torch.zeros(max(0, count - old.shape[0]), old.shape[1], dtype=old.dtype)
            tensors[EMBEDDING] = torch.cat([old[:count], grown])

        return change

    shorter = changed_mcore(good, tmp_path / "shorter", rows(240))
    for pair in ((good, shorter), (shorter, good)):
        found = diff(*pair)
        assert [change.name for change in found.changes] == [EMBEDDING] and not found.same
    assert diff(good, changed_mcore(good, tmp_path / "padded", rows(256))).same
    silent = [
        write_mcore(tensors, tmp_path / name)
        for name, tensors in (("a", read_mcore(good)), ("b", read_mcore(shorter)))
    ]
    found = diff(*silent)
    assert not found.same and not found.has_settings


@pytest.mark.parametrize("flavour", [None, TEXT_ALONE])
def test_a_vision_tower_is_compared_where_both_have_it(tmp_path: Path, flavour: str | None) -> None:
    source, good = make_wrapped("gemma3", tmp_path / "hf"), tmp_path / "mcore"
    run(plan_hf_to_mcore(source, good, Options(sync=False, flavour=flavour)))
    tower = next(name for name in read_hf(source) if name.startswith("vision_tower."))
    for pair in ((source, good), (good, source)):
        assert parity(*pair).passed and diff(*pair).same
    hurt = changed_hf(source, tmp_path / "hurt", lambda t: t[tower].view(torch.int16).view(-1)[0].bitwise_xor_(1))
    for pair in ((hurt, good), (good, hurt)):
        report = parity(*pair)
        assert leg(report, "weights").status == "failed" and report.first is not None and report.first.name == tower
        assert [change.name for change in diff(*pair).changes] == [tower]
    if flavour == TEXT_ALONE:
        (next(good.glob("iter_*")) / "hf" / KEPT).unlink()
        report = parity(hurt, good)
        assert report.passed and tower in report.waived  # the text model is whole


def test_tensors_without_values_are_the_same_where_both_have_them(llama: Path, tmp_path: Path) -> None:
    sides = [
        changed_hf(llama, tmp_path / name, lambda t: t.update({"model.none.weight": torch.empty(0, 5)}))
        for name in "ab"
    ]
    assert diff(*sides).same and parity(*sides).passed
    assert not diff(sides[0], llama).same


@pytest.mark.parametrize("environment", [{"RANK": "1"}, {"RANK": "x", "WORLD_SIZE": "2"}, {"WORLD_SIZE": "0"}])
def test_a_rank_that_nobody_started_is_an_error_and_no_silent_pass(
    llama: Path, good: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["verify", "parity", str(llama), str(good)]) == 2


class _Runs:
    """Pickles as a call that leaves a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_no_leg_runs_what_a_pickle_names(llama: Path, good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, checkpoint := tmp_path / "mcore")
    index = checkpoint / "iter_0000000" / ".metadata"
    stored = pickle.loads(index.read_bytes())
    stored.planner_data = {"own": _Runs(tmp_path / "ran")}
    index.write_bytes(pickle.dumps(stored))
    assert parity(llama, checkpoint, forward=True, loss=True).passed
    assert not (tmp_path / "ran").exists()
    pickle.loads(index.read_bytes())
    assert (tmp_path / "ran").exists()  # by a reader that trusts it


def test_a_name_cannot_write_over_the_verdict(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A terminal that obeyed would clear the screen and show another result."""
    name = "\x1b[2J\x1b[Hparity holds\r\x9b2K.weight"
    other = changed_hf(llama, tmp_path / "hf", lambda t: t.update({name: torch.zeros(2)}))
    assert main(["verify", "parity", str(llama), str(other)]) == 1
    said = capsys.readouterr().out
    assert "\\x1b[2J\\x1b[Hparity holds\\r\\x9b2K.weight" in said and not {"\x1b", "\r", "\x9b"} & set(said)


# --- one folder ----------------------------------------------------------------------------------------------------


def test_a_manifest_is_held_to_what_it_lists(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, folder := tmp_path / "mcore")
    path = folder / MANIFEST
    stored = json.loads(path.read_text())
    file, start, *_ = stored["tensors"][EMBEDDING]["chunks"][0]
    none = {"none": {"dtype": "BF16", "shape": [0], "chunks": [[file, start, 0, "00000000"]]}}
    path.write_text(json.dumps({**stored, "tensors": {**stored["tensors"], **none}}))
    assert check(folder).passed  # it begins where the embedding does
    path.write_text(json.dumps({**stored, "tensors": {}, "containers": {}, "files": {}}))
    with pytest.raises(StorageError, match="lists no tensor"):
        check(folder)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("common.pt", "no archive"),
        ("hf/config.json", "no JSON"),
        ("hf/config.json", '{"model_type": "llama", "architectures": {"a": 1}}'),
    ],
)
def test_what_stands_in_a_checkpoint_with_a_damaged_side_file_is_still_said(
    good: Path, tmp_path: Path, file: str, text: str
) -> None:
    shutil.copytree(good, folder := tmp_path / "mcore")
    (folder / "iter_0000000" / file).write_text(text)
    found = examine(folder)
    assert found.fault is not None and found.num_tensors == examine(good).num_tensors
    assert examine(good).fault is None
