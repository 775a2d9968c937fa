"""The text model of a larger one converts alone, as before there were towers; these travel along and come back."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from converters.errors import CoverageError, UnsupportedError, UsageError
from converters.mcore.layout import Layout
from converters.rows.config_spelling import canonical
from converters.rows.coverage import Waivers
from fixtures.wrapped import WRAPPED, make_wrapped
from mbx.formats.hf import MANIFEST, read_config
from mbx.proof.parity import parity
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run
from mbx.tables import table_for

CASES = [("gemma3", "v4"), ("gemma3", "v5"), ("llama4", "v4"), ("qwen3_5", "v4"), ("qwen3_5_moe", "v4")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A tiny checkpoint by model type and layout, made once."""
    root = tmp_path_factory.mktemp("wrapped")
    return cache(
        lambda kind, layout: make_wrapped(kind, root / kind / layout, layout="v5" if layout == "v5" else "v4")
    )


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_round_trip_is_byte_identical(
    checkpoint: Callable[[str, str], Path], tmp_path: Path, kind: str, layout: str
) -> None:
    source = checkpoint(kind, layout)
    job = plan_hf_to_mcore(source, tmp_path / "mcore", Options(sync=False, layout=Layout(tp=2), flavour="text"))
    run(job)
    assert any("vis" in name for name in job.plan.ledger.beside)
    assert not any("vis" in name for name in job.tensors)
    run(plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "hf", Options(sync=False)))
    names = {path.name for path in source.iterdir()}
    assert names == {path.name for path in (tmp_path / "hf").iterdir()} - {MANIFEST}
    assert filecmp.cmpfiles(source, tmp_path / "hf", names, shallow=False)[1:] == ([], [])
    legs = {leg.name: leg for leg in parity(source, tmp_path / "mcore").legs}
    assert {legs[name].status for name in ("cover", "weights", "config")} == {"passed"}


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_the_text_part_is_the_text_model_alone(
    checkpoint: Callable[[str, str], Path], tmp_path: Path, kind: str, layout: str
) -> None:
    """The same text weights in a repository of the text model give the same Megatron Core checkpoint."""
    source = checkpoint(kind, layout)
    config = read_config(source)
    family = table_for(config)
    alone = tmp_path / "alone"
    alone.mkdir()
    ways = {other: own for way in family.wrapped for own, other in way.items()}
    weights = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.startswith(family.beside):
            before = next((other for other in ways if name.startswith(other)), "")
            weights[ways.get(before, "") + name.removeprefix(before)] = tensor
    save_file(weights, alone / "model.safetensors", {"format": "pt"})
    text = {**config["text_config"], "model_type": family.text_types[0], "architectures": []}
    (alone / "config.json").write_text(json.dumps({**text, "dtype": "bfloat16"}), encoding="utf-8")
    run(plan_hf_to_mcore(alone, tmp_path / "a", Options(sync=False)))
    run(plan_hf_to_mcore(source, tmp_path / "b", Options(sync=False, flavour="text")))
    files = {path.name for path in (tmp_path / "a" / "iter_0000000").glob("*.distcp")}
    assert files
    assert filecmp.cmpfiles(*(tmp_path / side / "iter_0000000" for side in "ab"), files, shallow=False)[1:] == ([], [])


def test_the_tower_can_be_left_out(checkpoint: Callable[[str, str], Path], tmp_path: Path) -> None:
    source = checkpoint("gemma3", "v4")
    unused = Waivers(unused=("vision_tower.*", "multi_modal_projector.*"))
    waived = Options(sync=False, waivers=unused, flavour="text")
    job = plan_hf_to_mcore(source, tmp_path / "mcore", waived)
    run(job)
    assert job.plan.ledger.beside == ()
    run(plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "hf", Options(sync=False)))
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        assert not any(name.startswith(("vision", "multi")) for name in file.keys())  # noqa: SIM118


def test_other_strangers_are_refused(checkpoint: Callable[[str, str], Path], tmp_path: Path) -> None:
    source = checkpoint("gemma3", "v4")
    weights = load_file(source / "model.safetensors")
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    stranger = {**weights, "audio_tower.weight": weights["language_model.model.norm.weight"].clone()}
    save_file(stranger, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CoverageError, match="audio_tower"):
        plan_hf_to_mcore(folder, tmp_path / "mcore", Options(sync=False))


def test_a_bare_text_config_means_the_class_defaults() -> None:
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152},
    }
    from transformers import Gemma3Config

    full = Gemma3Config.from_dict(config).to_dict()
    full = {**full, "architectures": config["architectures"], "torch_dtype": None}
    table = table_for(config)
    assert {k: v for k, v in table.config.to_mcore(config).items() if k != "window_attn_skip_freq"} == {
        k: v for k, v in table.config.to_mcore(full).items() if k != "window_attn_skip_freq"
    }


def test_two_answers_about_tied_embeddings_are_refused() -> None:
    with pytest.raises(UsageError, match="tie_word_embeddings"):
        canonical({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}})


def test_a_model_around_a_known_text_model_says_so() -> None:
    config = {
        "model_type": "llava_next",
        "architectures": ["LlavaNextForConditionalGeneration"],
        "text_config": {"model_type": "mistral"},
    }
    with pytest.raises(UnsupportedError, match="LlavaNextForConditionalGeneration") as error:
        table_for(config)
    assert error.value.hint is not None and "`mistral`" in error.value.hint and "[text]" in error.value.hint


def test_every_wrapped_model_is_tried() -> None:
    assert {kind for kind, _ in CASES} == set(WRAPPED)
