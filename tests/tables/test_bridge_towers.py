"""What is written for Megatron-Bridge beside models with towers: its own provider and fields, or nothing.

`fixtures/bridge/towers_0_6.json` holds, of the `model` nodes that Megatron-Bridge 0.6.2 writes on import of the same
tiny folders, the fields that are written here too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from converters.errors import MbxError, UnsupportedError
from converters.mcore.bridge_config import config_of_run_config
from converters.mcore.bridge_towers import TOWERS, towers_of
from converters.mcore.field_equality import alike, is_idle
from converters.mcore.layout import Layout
from converters.mcore.megatron_args import TRAINING
from fixtures.make_tiny import make
from fixtures.wrapped import make_wrapped
from mbx.formats.architecture import architecture_of
from mbx.formats.registry import open_megatron
from mbx.proof.parity import parity
from mbx.run.job import Options, plan_hf_to_mcore, run
from mbx.run.reshard import plan_mcore_to_mcore

PLAIN = Options(sync=False)
BRIDGE: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).resolve().parents[2] / "fixtures/bridge/towers_0_6.json").read_text("utf-8")
)
#: Fields of every model here that say the same otherwise, or stand for the tensors rather than the model.
_NOT_THE_MODEL = {
    *("bf16", "params_dtype._target_"),  # the folder's dtype; Bridge's is the one it was asked for
    *("make_vocab_size_divisible_by", "should_pad_vocab"),  # 251 rows either way
    "rope_scaling_factor",  # of no model without rope_scaling
}
#: What Bridge writes whatever the folder says: constants, and keys that it looks for in another place.
_NOT_THE_FOLDER = {
    "gemma3": {"interleaved_attn_pattern"},
    "glm4v_moe": {"mrope_section"},
    # The class of Transformers has no prediction layers, whatever its config counts, and its folders none.
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe"), {"mtp_num_layers"}),
    "qwen2_5_vl": {"mrope_section", "share_embeddings_and_output_weights"},  # tied by the text's config
    "qwen2_5_omni": {"thinker_config.text_config.sliding_window"},  # null where no layer has it
    "qwen3_omni_moe": {"attention_dropout"},
    # Transformers rounds the range where the folder does not say otherwise.
    "ministral3": {"yarn_correction_range_round_to_int"},
}
#: One group of experts, of which one is taken, and no prediction layer: said by a number or by none.
_SAME = {"moe_router_group_topk": (None, 1), "moe_router_num_groups": (None, 1), "mtp_num_layers": (None, 0)}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny folder `hf` of a model type, and `mcore` made of it, in one folder; made once."""
    root = tmp_path_factory.mktemp("towers")

    @cache
    def make(kind: str) -> Path:
        run(plan_hf_to_mcore(make_wrapped(kind, root / kind / "hf"), root / kind / "mcore", PLAIN))
        return root / kind

    return make


def unlike(ours: Mapping[str, Any], theirs: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for name in ours.keys() & theirs.keys():
        if isinstance(ours[name], Mapping) and isinstance(theirs[name], Mapping):
            yield from unlike(ours[name], theirs[name], f"{path}{name}.")
        elif ours[name] != theirs[name] and not all(
            value in _SAME.get(name, ()) for value in (ours[name], theirs[name])
        ):
            yield path + name


def test_every_family_is_here() -> None:
    assert len(TOWERS) == len(BRIDGE)
    assert {one.family.provider for one in TOWERS} == {node["_target_"] for node in BRIDGE.values()}


@pytest.mark.parametrize("kind", BRIDGE)
def test_every_field_is_as_bridge_writes_it(written: Callable[[str], Path], kind: str) -> None:
    run_config = open_megatron(written(kind) / "mcore").run_config
    assert run_config is not None
    model = run_config["model"]
    assert isinstance(model, Mapping)
    wrong = set(unlike(model, BRIDGE[kind])) - _NOT_THE_MODEL
    assert wrong == _NOT_THE_FOLDER.get(kind, set())
    # Which fields Bridge's classes do not have; old spellings that Transformers' classes take, too.
    assert {name for name in model.keys() - BRIDGE[kind].keys()} == set()
    assert model["_target_"] == BRIDGE[kind]["_target_"]
    assert model.get("transformer_layer_spec") == BRIDGE[kind].get("transformer_layer_spec")


@pytest.mark.parametrize("kind", BRIDGE)
def test_the_run_config_gives_the_model_back(written: Callable[[str], Path], kind: str) -> None:
    """Field by field without the folder, by itself and beside the args; and parity holds in every leg."""
    opened = open_megatron(written(kind) / "mcore")
    whole = architecture_of(opened)
    # Whatever config.json counts, these folders have no prediction layer, and the checkpoint says so.
    assert not any("mtp." in name for name in opened.tensors)
    wanted = {**whole.table.config.to_mcore(whole.config), "mtp_num_layers": None}
    assert opened.run_config is not None
    fields = config_of_run_config(opened.run_config)
    assert [name for name in wanted.keys() & fields.keys() - TRAINING if not alike(name, wanted, fields)] == []
    for args in (opened.args, None):
        found = architecture_of(replace(opened, hf=None, args=args))
        assert found.table.name == whole.table.name
        back = found.table.config.to_mcore(found.config)
        assert [name for name in wanted.keys() & back.keys() - TRAINING if not alike(name, wanted, back)] == []
        apart = (wanted.keys() ^ back.keys()) - TRAINING
        assert [name for name in apart if not is_idle(name, {**wanted, **back}[name])] == []
    report = parity(written(kind) / "hf", written(kind) / "mcore")
    assert [leg.name for leg in report.legs if leg.status != "passed"] == []


@pytest.mark.parametrize("kind", BRIDGE)
def test_transformers_reads_the_config_that_is_made(written: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    """Of the run_config alone: the same towers, sections of positions, and whether the embedding is tied."""

    def read(folder: Path) -> list[object]:
        whole = AutoConfig.from_pretrained(folder)
        inner = getattr(whole, "thinker_config", whole)
        text = inner.get_text_config()
        towers = [getattr(inner, name).to_dict() for name in ("vision_config", "audio_config") if hasattr(inner, name)]
        for tower in towers:
            tower.pop("dtype", None)  # said once, of the whole
            if not tower.get("deepstack_visual_indexes"):  # of a class without
                tower.pop("deepstack_visual_indexes", None)
        return [*towers, text.tie_word_embeddings, text.rope_parameters.get("mrope_section"), text.hidden_size]

    opened = open_megatron(written(kind) / "mcore")
    made = architecture_of(replace(opened, hf=None, args=None)).config
    (tmp_path / "config.json").write_text(json.dumps(made), encoding="utf-8")
    assert read(tmp_path) == read(written(kind) / "hf")


@pytest.mark.parametrize("path", [("vision_config",), ("thinker_config", "text_config")])
def test_an_object_that_is_none_is_an_error(written: Callable[[str], Path], path: tuple[str, ...]) -> None:
    opened = open_megatron(written("qwen2_5_omni" if "thinker_config" in path else "qwen2_5_vl") / "mcore")
    assert opened.run_config is not None
    planted = json.loads(json.dumps(opened.run_config))
    held = planted["model"]
    for key in path[:-1]:
        held = held[key]
    held[path[-1]] = "none"
    with pytest.raises(MbxError):
        architecture_of(replace(opened, hf=None, args=None, run_config=planted))


@pytest.mark.parametrize("kind", BRIDGE)
def test_a_provider_of_another_family_is_refused(written: Callable[[str], Path], kind: str) -> None:
    opened = open_megatron(written(kind) / "mcore")
    assert opened.run_config is not None
    model = opened.run_config["model"]
    assert isinstance(model, Mapping)
    for other in {node["_target_"] for node in BRIDGE.values()} - {model["_target_"]}:
        planted = {**opened.run_config, "model": {**model, "_target_": other}}
        with pytest.raises(UnsupportedError, match=other.rpartition(".")[2]):
            architecture_of(replace(opened, hf=None, args=None, run_config=planted))


@pytest.mark.parametrize(
    ("kind", "flavour"),
    [("mistral3", "bridge"), ("internvl", None), ("gemma3", "bridge-0.3"), ("qwen3_vl", "mcore-bridge")],
)
def test_no_provider_is_named_that_would_not_find_the_keys(tmp_path: Path, kind: str, flavour: str | None) -> None:
    """Neither that of the text model alone, nor one whose arrangement is another; nor after a change of layout."""
    source = make_wrapped(kind, tmp_path / "hf")
    run(plan_hf_to_mcore(source, tmp_path / "mcore", Options(sync=False, flavour=flavour)))
    run(plan_mcore_to_mcore(tmp_path / "mcore", tmp_path / "again", PLAIN))
    for made in ("mcore", "again"):
        assert list((tmp_path / made).rglob("*.distcp"))
        assert list((tmp_path / made).rglob("run_config.yaml")) == []


@pytest.mark.parametrize("kind", [*BRIDGE, "gemma2", "qwen3_next", "minimax_m2", "nemotron_h", "falcon_h1_0_5b"])
def test_after_a_change_of_layout_bridge_is_told_the_same(tmp_path: Path, kind: str) -> None:
    """As if the folder had been written under that layout at once; with towers and without."""
    source = make_wrapped(kind, tmp_path / "hf") if kind in BRIDGE else make(kind, tmp_path / "hf")
    two = replace(PLAIN, layout=Layout(tp=2))
    run(plan_hf_to_mcore(source, tmp_path / "one", PLAIN))
    run(plan_hf_to_mcore(source, tmp_path / "two", two))
    run(plan_mcore_to_mcore(tmp_path / "one", tmp_path / "changed", two))
    said = [open_megatron(tmp_path / name).run_config for name in ("one", "two", "changed")]
    assert said[1] == said[2] and said[0] != said[1] and said[1] is not None


def test_the_text_model_alone_gets_no_provider_of_towers(tmp_path: Path) -> None:
    source = make_wrapped("qwen2_5_vl", tmp_path / "hf")
    run(plan_hf_to_mcore(source, tmp_path / "mcore", Options(sync=False, flavour="text")))
    for path in (tmp_path / "mcore").rglob("run_config.yaml"):
        assert "qwen_vl" not in path.read_text("utf-8")
    opened = open_megatron(tmp_path / "mcore")
    shutil.rmtree(opened.home / "hf")
    assert architecture_of(open_megatron(tmp_path / "mcore")).table.name == "qwen2_5_vl"


def test_two_models_of_one_class_are_told_by_their_text() -> None:
    """Mistral Small 3.1 and Ministral 3 share a class; only of the latter has Bridge a provider that works."""
    classes = ("Mistral3ForConditionalGeneration",)
    assert towers_of(classes, {"text_config": {"model_type": "mistral"}}) is None
    found = towers_of(classes, {"text_config": {"model_type": "ministral3"}})
    assert found is not None and found.family.provider.endswith("Ministral3ModelProvider")
