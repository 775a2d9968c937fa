"""Models with towers convert whole: as other tools arrange them, bit for bit, and back at any layout."""

from __future__ import annotations

import filecmp
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.errors import CoverageError, LayoutError, UnsupportedError, UsageError
from converters.mcore.flavours import arranged, in_flavour, usual_of
from converters.mcore.layout import Layout
from converters.planning.exporter import HfTensor, Origin, plan_export
from converters.planning.importer import plan_import
from converters.tensors import StoredTensor
from fixtures.index import load_config
from fixtures.wrapped import TOWERS, WITHIN, WRAPPED, make_wrapped
from mbx.cli import main
from mbx.formats.hf import MANIFEST
from mbx.formats.registry import open_megatron
from mbx.models.transformers.equivalents import TWINS
from mbx.proof.parity import parity
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run
from mbx.run.reshard import plan_mcore_to_mcore
from mbx.tables import shipped, table_for
from mbx.torchfile.dcp import read_dcp

PLAIN = Options(sync=False)
#: Tensors of two layers of Gemma 4's tower.
_EXCHANGED = tuple(f"model.vision_tower.encoder.layers.{n}.self_attn.o_proj.linear.weight" for n in (0, 1))
_OF_RADIO = tuple(f"vision_model.radio_model.model.blocks.{n}.attn.proj.weight" for n in (0, 1))
_HEARD = tuple(f"sound_encoder.encoder.layers.{n}.conv.norm.running_mean" for n in (0, 1))
_CHOOSERS = tuple(f"language_model.model.layers.{n}.self_attn.index_k_proj.weight" for n in (1, 2))
#: What is no part of any Megatron model.
_APART = ("talker.", "token2wav.", "code2wav.", "vision_model.radio_model.summary", "vision_model.radio_model.input_")
_APART += ("sound_encoder.encoder.feature_extractor.",)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny checkpoint by model type, in the hub's names, made once."""
    root = tmp_path_factory.mktemp("towers")
    return cache(lambda kind: make_wrapped(kind, root / kind))


_ELSEWHERE = ("gemma4", "gemma4_26b", "nemotron_nano_omni")


def _once(kind: str) -> object:
    """A kind, but for those whose table another kind tries."""
    return pytest.param(kind, marks=pytest.mark.slow) if kind in _ELSEWHERE else kind


def same_files(source: Path, back: Path) -> bool:
    names = {path.name for path in source.iterdir()}
    whole = names == {path.name for path in back.iterdir()} - {MANIFEST}
    return whole and filecmp.cmpfiles(source, back, names, shallow=False)[1:] == ([], [])


@pytest.mark.parametrize("kind", [*WRAPPED, *(_once(kind) for kind in TOWERS)])
def test_a_round_trip_is_byte_identical_in_every_flavour(
    checkpoint: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    source = checkpoint(kind)
    table = table_for(json.loads((source / "config.json").read_text("utf-8")))
    for number, flavour in enumerate(table.flavours):
        layout = Layout(tp=2, pp=2) if number == 0 else Layout()
        job = plan_hf_to_mcore(source, tmp_path / flavour, Options(sync=False, layout=layout, flavour=flavour))
        assert all(name.startswith(_APART) for name in job.plan.ledger.beside)
        assert job.plan.ledger.consumed == len(job.plan.sources)
        run(job)
        opened = open_megatron(tmp_path / flavour)
        assert any("language_model.decoder." in name for name in opened.tensors)
        assert arranged(table, opened.tensors).flavour == flavour, "the keys tell whose they are"
        run(plan_mcore_to_hf(tmp_path / flavour, tmp_path / f"{flavour} back", PLAIN))
        assert same_files(source, tmp_path / f"{flavour} back")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*WRAPPED, *TOWERS])
@pytest.mark.parametrize("layout", ["v4", "v5"])
def test_a_round_trip_is_byte_identical_at_every_layout(tmp_path: Path, kind: str, layout: str) -> None:
    if layout == "v5" and (kind in WITHIN or kind in ("kimi_k25", "qwen2_5_omni", "qwen3_omni_moe")):
        pytest.skip("Transformers saves none under the names that it holds")
    source = make_wrapped(kind, tmp_path / "hf", layout="v5" if layout == "v5" else "v4")
    for tp, pp in ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2)):
        target = tmp_path / f"{tp} {pp}"
        run(plan_hf_to_mcore(source, target, Options(sync=False, layout=Layout(tp=tp, pp=pp))))
        run(plan_mcore_to_hf(target, tmp_path / f"{tp} {pp} back", PLAIN))
        assert same_files(source, tmp_path / f"{tp} {pp} back")


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_vl", "qwen2_5_vl"])
def test_another_layout_keeps_every_value_and_state(
    checkpoint: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    one, two = (Options(sync=False, layout=Layout(tp=tp)) for tp in (1, 2))
    run(plan_hf_to_mcore(checkpoint(kind), tmp_path / "one", one))
    run(plan_hf_to_mcore(checkpoint(kind), tmp_path / "two", two))
    run(plan_mcore_to_mcore(tmp_path / "one", tmp_path / "again", two))
    wanted, got = (read_dcp(tmp_path / name / "iter_0000000") for name in ("two", "again"))
    assert {n: [(c.offsets, c.sizes) for c in t.chunks] for n, t in wanted.tensors.items()} == {
        n: [(c.offsets, c.sizes) for c in t.chunks] for n, t in got.tensors.items()
    }
    assert set(wanted.objects) == set(got.objects)
    left, right = open_megatron(tmp_path / "two"), open_megatron(tmp_path / "again")
    assert all((left.read(name) == right.read(name)).all() for name in left.tensors)
    with pytest.raises(UnsupportedError, match="torch_dist"):
        plan_mcore_to_mcore(tmp_path / "one", tmp_path / "legacy", Options(sync=False, format="torch"))


def test_towers_are_cut_by_their_own_heads(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Only native ones: a tower of four heads does not go over eight ranks, one that is kept goes over any."""
    with pytest.raises(LayoutError, match=r"vision\.num_attention_heads = 4"):
        plan_hf_to_mcore(checkpoint("qwen3_vl"), tmp_path / "a", Options(sync=False, layout=Layout(tp=8)))
    kept = Options(sync=False, layout=Layout(tp=8), flavour="mcore-bridge")
    drafts = {
        draft.name: draft for draft in plan_hf_to_mcore(checkpoint("qwen3_vl"), tmp_path / "b", kept).plan.drafts
    }
    assert len(drafts["visual.visual.blocks.0.attn.qkv.weight"].boxes) == 1
    assert len(drafts["language_model.decoder.layers.mlp.linear_fc2.weight"].boxes) == 4 * 8


def test_a_flavour_that_a_table_lacks_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no flavour `mcore-bridge`") as error:
        plan_hf_to_mcore(checkpoint("gemma3"), tmp_path / "a", Options(sync=False, flavour="mcore-bridge"))
    assert "bridge" in str(error.value.hint)
    with pytest.raises(UsageError, match="torch_dist"):
        plan_hf_to_mcore(checkpoint("gemma3"), tmp_path / "a", Options(sync=False, flavour="bridge", format="torch"))


def test_gemma_3_of_before_is_told_from_gemma_3_of_today(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    keys = {}
    for flavour in ("bridge", "bridge-0.3"):
        run(plan_hf_to_mcore(checkpoint("gemma3"), tmp_path / flavour, Options(sync=False, flavour=flavour)))
        keys[flavour] = open_megatron(tmp_path / flavour).tensors
        assert arranged(shipped("gemma3_vl"), keys[flavour]).flavour == flavour
        run(plan_mcore_to_hf(tmp_path / flavour, tmp_path / f"{flavour} hf", PLAIN, hf_config=checkpoint("gemma3")))
        assert same_files(checkpoint("gemma3"), tmp_path / f"{flavour} hf")
    assert "vision_tower.post_layernorm.weight" in keys["bridge"]
    assert "vision_tower.vision_model.post_layernorm.weight" in keys["bridge-0.3"]


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (
            "qwen3_vl",
            ("model.visual.deepstack_merger_list.0.norm.weight", "model.visual.deepstack_merger_list.1.norm.weight"),
        ),
        ("qwen3_vl", ("model.visual.blocks.0.attn.proj.weight", "model.visual.blocks.1.attn.proj.weight")),
        ("qwen2_5_vl", ("visual.blocks.0.norm1.weight", "visual.blocks.1.norm2.weight")),
        ("gemma3", ("multi_modal_projector.mm_input_projection_weight", "")),
        ("nemotron_nano_v2_vl", ("mlp1.1.weight", "")),
        ("minimax_m3_vl", ("patch_merge_mlp.linear_1.weight", "")),
        ("minimax_m3_vl", _CHOOSERS),
        pytest.param("nemotron_nano_v2_vl", _OF_RADIO, marks=pytest.mark.slow),
        pytest.param("nemotron_nano_omni", _HEARD, marks=pytest.mark.slow),
        ("nemotron_nano_omni", ("sound_projection.linear1.weight", "")),
        ("gemma4_e2b", ("model.embed_vision.embedding_projection.weight", "")),
        pytest.param("gemma4_e2b", _EXCHANGED, marks=pytest.mark.slow),
    ],
)
def test_parity_finds_what_is_planted_in_a_tower(
    checkpoint: Callable[[str], Path], tmp_path: Path, kind: str, what: tuple[str, str]
) -> None:
    source = checkpoint(kind)
    run(plan_hf_to_mcore(source, tmp_path / "mcore", PLAIN))
    other = Path(shutil.copytree(source, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    first, second = what
    if second:
        weights[first], weights[second] = weights[second].clone(), weights[first].clone()
    else:  # rows of a column exchanged: a transposition in all but the shape
        weights[first] = weights[first].T.contiguous().view(weights[first].shape)
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    clean, planted = (
        {leg.name: leg.status for leg in parity(side, tmp_path / "mcore").legs} for side in (source, other)
    )
    assert set(clean.values()) == {"passed"}
    assert planted["weights"] == "failed"


def test_a_dropped_position_table_is_missed(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    for flavour in ("bridge", "mcore-bridge"):
        run(plan_hf_to_mcore(checkpoint("qwen3_vl"), tmp_path / flavour, Options(sync=False, flavour=flavour)))
        other = Path(shutil.copytree(checkpoint("qwen3_vl"), tmp_path / f"{flavour} without"))
        weights = load_file(other / "model.safetensors")
        del weights["model.visual.pos_embed.weight"]
        save_file(weights, other / "model.safetensors", {"format": "pt"})
        if flavour == "bridge":
            with pytest.raises(CoverageError, match="pos_embed"):
                parity(other, tmp_path / flavour)
        else:
            legs = {leg.name: leg.status for leg in parity(other, tmp_path / flavour).legs}
            assert legs["cover"] == "failed"


def test_a_wrong_section_of_the_positions_fails_the_config_leg(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(checkpoint("qwen3_vl"), tmp_path / "hf"))
    config = json.loads((source / "config.json").read_text("utf-8"))
    text = config["text_config"]
    text["rope_scaling"] = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    run(plan_hf_to_mcore(source, tmp_path / "mcore", PLAIN))
    text["rope_scaling"]["mrope_section"] = [2, 4, 2]
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    legs = {leg.name: leg for leg in parity(source, tmp_path / "mcore").legs}
    assert legs["config"].status == "failed" and "mrope_section" in legs["config"].details[0]


def test_experts_of_either_order_are_the_same_model(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Qwen3-VL's experts lie [expert, in, out] on the hub and [expert, out, in] as Transformers 5 may save them."""
    source = checkpoint("qwen3_vl_moe")
    other = Path(shutil.copytree(source, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    turned = {
        name: tensor.transpose(1, 2).contiguous() if ".mlp.experts." in name else tensor
        for name, tensor in weights.items()
    }
    assert sum(not torch.equal(turned[name].flatten(), weights[name].flatten()) for name in weights)
    save_file(turned, other / "model.safetensors", {"format": "pt"})
    for name, folder in (("a", source), ("b", other)):
        run(plan_hf_to_mcore(folder, tmp_path / name, PLAIN))
    left, right = open_megatron(tmp_path / "a"), open_megatron(tmp_path / "b")
    assert all((left.read(name) == right.read(name)).all() for name in left.tensors)


def test_another_reading_of_images_fails_the_config_leg(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """The same bytes under other heads, epsilon or activation of the tower are another model."""
    source = checkpoint("gemma3")
    run(plan_hf_to_mcore(source, tmp_path / "mcore", PLAIN))
    other = Path(shutil.copytree(source, tmp_path / "other"))
    config = json.loads((source / "config.json").read_text("utf-8"))
    config["vision_config"]["num_attention_heads"] += 2
    (other / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for right in (source, tmp_path / "mcore"):
        (leg,) = (leg for leg in parity(other, right).legs if leg.name == "config")
        assert leg.status == "failed" and "vision_config.num_attention_heads" in "\n".join(leg.details)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind in ("qwen3_vl", "qwen2_5_vl") else pytest.mark.slow)
        for kind in TOWERS
        if kind in TWINS or kind in ("mistral3", "internvl", "gemma4_e2b")
    ],
)
def test_the_text_model_computes_what_transformers_computes(
    checkpoint: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    """Text alone: torch's reader finds the text model behind its prefix, and Megatron Core loads it."""
    source = checkpoint(kind)
    run(plan_hf_to_mcore(source, tmp_path / "mcore", PLAIN))
    report = parity(source, tmp_path / "mcore", forward=True)
    assert {leg.name: leg.status for leg in report.legs}["forward"] == "passed"


#: Classes whose defaults are a published size: their configs, where these have to be told what is tied.
_UNTIED: dict[str, object] = {"text_config": {"tie_word_embeddings": False}, "tie_word_embeddings": False}
PUBLISHED: dict[str, dict[str, object]] = {
    **dict.fromkeys(("gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "llama4"), {}),
    **dict.fromkeys(("qwen3_vl_moe", "mistral3", "internvl"), _UNTIED),
    **dict.fromkeys(("qwen3_5_moe", "glm4v_moe"), {}),
    # as published: gemma-4-26B-A4B, and E2B, which hears as well
    "gemma4 26B-A4B": {
        "text_config": load_config("gemma-4-26B-A4B"),
        "vision_config": {
            **{"head_dim": 72, "hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16},
            **{"num_hidden_layers": 27, "num_key_value_heads": 16, "standardize": True},
        },
    },
    "gemma4 E2B": {
        "text_config": {
            **{"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 35, "num_key_value_heads": 1},
            **{"num_kv_shared_layers": 20, "use_double_wide_mlp": True, "final_logit_softcapping": 30.0},
            "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
        },
        "vision_config": {},
        "audio_config": {},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PUBLISHED)
def test_every_tensor_of_a_published_size_has_its_place(kind: str) -> None:
    """Names and shapes are those of Transformers' class, turned back into the hub's; none is left, none invented."""
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText
    from transformers.core_model_loading import revert_weight_conversion

    config = CONFIG_MAPPING[kind.partition(" ")[0]](**PUBLISHED[kind])
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    shapes = {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}
    stored = {name: StoredTensor.whole(name, "BF16", shape, "file", 0) for name, shape in shapes.items()}
    said = {**config.to_dict(), "architectures": [type(model).__name__]}
    table = table_for(said)
    whole = in_flavour(table, usual_of(table))
    plan = plan_import(whole, said, stored, Layout())
    assert plan.ledger.consumed == len(shapes) and not plan.ledger.beside
    made = {draft.name: StoredTensor.whole(draft.name, draft.dtype, draft.shape, "file", 0) for draft in plan.drafts}
    recorded = {name: HfTensor("BF16", shape) for name, shape in shapes.items()}
    back = plan_export(whole, plan.config, made, Origin(recorded))
    assert {draft.name: draft.shape for draft in back.drafts} == shapes


@pytest.mark.parametrize(
    ("kind", "flavour", "towers", "kept"),
    [
        ("qwen2_5_vl", None, {"visual"}, set()),
        ("qwen2_5_vl", "text", set(), {"visual"}),
        ("qwen3_omni_moe", None, {"audio_model", "visual"}, {"talker", "code2wav"}),
    ],
)
def test_inspect_shows_the_towers_and_what_is_kept_beside(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    flavour: str | None,
    towers: set[str],
    kept: set[str],
) -> None:
    source = checkpoint(kind)
    run(plan_hf_to_mcore(source, tmp_path / "mcore", Options(sync=False, flavour=flavour)))
    assert main(["inspect", str(tmp_path / "mcore"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (set(said["towers"]), set(said["kept"])) == (towers, kept)
    around = sum(part["tensors"] for part in (*said["towers"].values(), *said["kept"].values()))
    assert 0 < around < said["tensors"] + sum(part["tensors"] for part in said["kept"].values())
    assert main(["inspect", str(tmp_path / "mcore")]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name}: " in shown for name in towers | kept) and ("kept in hf/" in shown) == bool(kept)


#: What of MiniMax-M3's published config.json says how large its tower is.
_M3_VISION = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16, "num_hidden_layers": 32}


@pytest.mark.slow
def test_minimax_m3_is_covered_at_full_size_to_the_published_byte() -> None:
    """Its repository has 23,416 tensors, by whose headers the payload is 854,172,958,720 bytes."""
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    text = load_config("MiniMax-M3")
    body = {"vision_config": _M3_VISION, "projector_hidden_size": 6144}
    with torch.device("meta"):
        config = transformers.CONFIG_MAPPING["minimax_m3_vl"].from_dict({**body, "text_config": dict(text)})
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    wide = ("block_sparse_moe.gate.weight", "e_score_correction_bias", "patch_embedding.weight")
    stored = {
        name: StoredTensor.whole(name, "F32" if name.endswith(wide) else "BF16", tuple(tensor.shape), "none", 0)
        for name, tensor in revert_weight_conversion(model, model.state_dict()).items()
    }
    assert len(stored) == 23_416
    assert sum(tensor.nbytes for tensor in stored.values()) == 854_172_958_720
    whole = {**body, "model_type": "minimax_m3_vl", "text_config": text, "tie_word_embeddings": False}
    plan = plan_import(in_flavour(shipped("minimax_m3_vl"), "bridge"), whole, stored, Layout(tp=4, pp=4, ep=32))
    assert plan.ledger.consumed == len(stored) and not plan.ledger.beside
    names = {draft.name for draft in plan.drafts}
    assert {f"lightning_indexers.{layer}.q_norm.weight" for layer in range(3, 60)} <= names
    assert "patch_merge_mlp.linear_2.bias" in names and "lightning_indexers.2.q_norm.weight" not in names
    router = next(draft for draft in plan.drafts if draft.name.endswith("layers.3.mlp.router.weight"))
    assert router.name.startswith("language_model.decoder.") and router.dtype == "F32"
