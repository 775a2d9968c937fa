"""What cannot be pruned, or was asked for in words that mean nothing, is refused by name before a byte is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from _masks import drawn_importance, fields_of
from safetensors.torch import load_file, save_file

import mbx
from converters.errors import CoverageError, StorageError, UnsupportedError, UsageError
from converters.pruning.choosing import Importance, Pruning
from fixtures.make_tiny import make
from fixtures.wrapped import TOWERS, WRAPPED, make_wrapped
from mbx.cli.prune import Sizes
from mbx.run.importance_file import importance_text, read_importance
from mbx.run.job import Options
from mbx.run.prune import plan_prune

LLAMA = Path(__file__).resolve().parents[2] / "fixtures" / "tiny" / "llama"


@pytest.mark.parametrize(
    ("name", "pruning", "error", "named"),
    [
        ("gemma2", Pruning(hidden=16), UnsupportedError, "scales its embeddings"),
        ("pythia", Pruning(ffn=16), UnsupportedError, "linear_qkv"),
        ("gpt2", Pruning(heads=2), UnsupportedError, "head_dim"),
        ("nemotron_h", Pruning(hidden=16), UnsupportedError, "final_norm"),
        ("step_3_5_flash", Pruning(hidden=16), UnsupportedError, "widths of their own"),
        ("step_3_5_flash", Pruning(heads=4), UnsupportedError, "widths of their own"),
        ("glm4_moe", Pruning(experts=4), UnsupportedError, "prediction layer"),
        ("glm_5_2", Pruning(layers=(0, 1)), UnsupportedError, "tokens that one before chose"),
        ("olmo2", Pruning(heads=4), UnsupportedError, "over all heads"),
        ("mixtral", Pruning(ffn=16), UsageError, "by the same key"),
        ("deepseek_v3", Pruning(experts=6), UsageError, "no multiple of the 4 groups"),
        ("qwen3_moe", Pruning(experts=1), UsageError, "a token is sent to"),
        ("llama", Pruning(hidden=20), UsageError, "Transformers loads no llama"),
        ("qwen3_5_text", Pruning(layers=(0, 1)), UnsupportedError, "layer_types"),
        ("qwen3_vl", Pruning(layers=(0, 1)), UnsupportedError, "more than a text model"),
    ],
)
def test_what_cannot_be_pruned_is_refused_by_name(
    tmp_path: Path, name: str, pruning: Pruning, error: type[Exception], named: str
) -> None:
    source = (make_wrapped if name in WRAPPED | TOWERS else make)(name, tmp_path / "source")
    importance = drawn_importance(fields_of(source))
    with pytest.raises(error, match=named):
        plan_prune(source, tmp_path / "pruned", pruning, Options(), importance=importance)
    assert not (tmp_path / "pruned").exists()


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    (folder := tmp_path / "adapter").mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"]}')
    save_file({"base_model.model.q_proj.lora_A.weight": torch.zeros(1, 4)}, folder / "adapter_model.safetensors")
    with pytest.raises(UnsupportedError, match="is an adapter"):
        plan_prune(folder, tmp_path / "pruned", Pruning(layers=(0,)), Options())


def test_tensors_that_no_row_knows_are_not_lost(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "source")
    save_file({**load_file(source / "model.safetensors"), "model.odd": torch.zeros(1)}, source / "model.safetensors")
    with pytest.raises(CoverageError, match="model.odd"):
        plan_prune(source, tmp_path / "pruned", Pruning(layers=(0,)), Options())


@pytest.mark.parametrize(
    ("options", "to"),
    [
        (Options(layout=mbx.Layout(tp=2)), "hf"),
        (Options(format="torch"), "hf"),
        (Options(codec="fp8_block"), "hf"),
        (Options(dtype="fp32"), "hf"),
        (Options(), "onnx"),
    ],
)
def test_options_of_another_target_are_refused(tmp_path: Path, options: Options, to: str) -> None:
    with pytest.raises(UsageError):
        plan_prune(LLAMA, tmp_path / "pruned", Pruning(layers=(0,)), options, to=to)


def test_the_file_of_importance_says_what_was_written(tmp_path: Path) -> None:
    importance = drawn_importance(fields_of(make("qwen3_moe", tmp_path / "qwen3_moe")))
    path = tmp_path / "importance.json"
    path.write_bytes(importance_text(importance, {"tokens": 1}))
    again = read_importance(path)
    assert again.layers is not None and importance.layers is not None
    assert again.layers == pytest.approx(importance.layers, rel=1e-5)
    assert again.widths.keys() == importance.widths.keys()
    for width, scores in importance.widths.items():
        assert again.widths[width].keys() == scores.keys()
        assert all(again.widths[width][spot] == pytest.approx(own, rel=1e-5) for spot, own in scores.items())
    for text in (
        '{"layers": [1, null]}',
        '{"ffn": {"9999999": [1]}}',
        '{"ffn": {"1": {"1": {"1": [1]}}}}',
        '{"ffn": {"x": [1]}}',
        '{"tokens": 3}',
        "[]",
    ):
        path.write_text(text)
        with pytest.raises(StorageError):
            read_importance(path)


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    other = drawn_importance({**fields_of(LLAMA), "ffn_hidden_size": 40, "num_layers": 2})
    for pruning, said in ((Pruning(ffn=4), "40 parts of"), (Pruning(keep_layers=1), "of 2 layers")):
        with pytest.raises(UsageError, match=said):
            plan_prune(LLAMA, tmp_path / "pruned", pruning, Options(), importance=other)
    with pytest.raises(UsageError, match="needs the importance"):
        plan_prune(LLAMA, tmp_path / "pruned", Pruning(ffn=4), Options(), importance=Importance())


def test_layers_are_named_by_ranges(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=" 0-1,3-99: the model's are 0-3"):
        plan_prune(LLAMA, tmp_path / "pruned", Pruning(layers=(0, 1, *range(3, 100))), Options())
    assert Sizes(layers="0-2, 5,7-8").pruning() == Pruning(layers=(0, 1, 2, 5, 7, 8))
    for text in ("", "a", "1-", "-3", "0-1000000", ",".join(["0-99999"] * 9), "1,,2"):
        with pytest.raises(UsageError, match="ranges"):
            Sizes(layers=text).pruning()
