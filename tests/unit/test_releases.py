"""A release of Megatron Core is plain data: it says what the installed package does, and code follows what it says."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from converters.mcore.keys import canonical_names
from converters.mcore.local import extra_states, parse_local, spell_local
from converters.mcore.releases import (
    CURRENT,
    PREDICTION_LAYERS,
    RELEASE_0_16,
    RELEASE_0_19,
    RELEASES,
    FusedNorm,
    is_known,
    numbers,
    release_of,
    written_by,
)
from converters.mcore.torch_dist import extra_states_of, stacks_layers
from converters.rows.isos.rope import LLAMA3_FIXED
from mbx import installed

HEAD = "mtp.layers.1.transformer_layer.self_attention.linear_proj.weight"
#: A release that differs from the current one in every fact that a test below looks at.
OTHER = replace(
    CURRENT,
    version="of a test",
    plain_prediction_layer="mtp_model_layer",
    fused_norms=(FusedNorm("input_layernorm.", "mlp.router"),),
    te_linears=frozenset({"linear_qkv"}),
    torch_norms=("pre_mlp_layernorm",),
    head_core_state=False,
    output_state=frozenset({"gpt"}),
    stacked_kinds=frozenset({"hybrid"}),
    layer_patterns=("window_size",),
)


def test_the_installed_package_is_what_its_release_says() -> None:
    from megatron.core import __version__
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayerSubmodules
    from megatron.core.transformer.transformer_block import TransformerBlock
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    release = installed.core_release()
    assert numbers(__version__) == release.number == numbers(str(installed.core_version()))
    inner = {field.name for field in fields(MultiTokenPredictionLayerSubmodules)} & PREDICTION_LAYERS
    assert inner == {release.plain_prediction_layer}
    assert f"self.{release.final_norm['gpt'].rpartition('.')[2]}" in inspect.getsource(TransformerBlock)
    model, name = _source(release.hybrid_model)
    assert all(f"\n{words}" in model for words in (f"class {name}(", f"        {release.hybrid_spec}: ModuleSpec"))
    assert re.search(rf"\n        {release.hybrid_pattern}: .* = None", model)
    specs, name = _source(release.hybrid_stack)
    assert f"\n{name} = ModuleSpec(" in specs
    defaults = {field.name: field.default for field in fields(MLATransformerConfig)}
    defaults |= {f"model.{name}": one.default for name, one in inspect.signature(GPTModel).parameters.items()}
    assert {name: defaults[name] for name in release.defaults} == release.defaults
    assert ("dsa_indexer_rotate_activation" in defaults) == release.sparse_attention
    scaling = inspect.signature(RotaryEmbedding._apply_scaling).parameters
    assert {name: scaling[name].default for name in LLAMA3_FIXED} == LLAMA3_FIXED


def test_common_state_and_asynchronous_saves_are_where_the_release_has_them() -> None:
    from megatron.core import dist_checkpointing

    release = installed.core_release()
    saving = inspect.signature(dist_checkpointing.save).parameters
    assert release.async_save.keys() == saving.keys() & {"async_strategy"}
    within = 'ShardedObject(\n        key="common_state"' in inspect.getsource(dist_checkpointing.save)
    assert within == (release.common_file is None)


def _source(place: tuple[str, str]) -> tuple[str, str]:
    """A module's text, and the name in it that is meant; importing it may need triton."""
    import megatron.core

    module, name = place
    path = Path(megatron.core.__file__).parent.parent.parent / f"{module.replace('.', '/')}.py"
    return path.read_text(encoding="utf-8"), name


@pytest.mark.parametrize(
    ("version", "taken_for", "known"),
    [
        *(("0.16.1", "0.16", True), ("0.17.0rc1", "0.17", True), ("0.18.2", "0.18", True), ("0.19.2", "0.19", True)),
        *(("0.20.0", "0.19", False), ("1.0.0", "0.19", False), ("0.13.1", "0.16", False), ("0.160.0", "0.19", False)),
    ],
)
def test_a_version_that_is_not_known_is_taken_for_the_newest_that_it_is_not_older_than(
    version: str, taken_for: str, known: bool
) -> None:
    assert (release_of(version).version, is_known(version)) == (taken_for, known)


def test_the_installed_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout has no metadata; a newer one than any known says so; where there is none, the newest is meant."""
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text("raise AssertionError('imported')")
    (core / "package_info.py").write_text("MAJOR = 0\nMINOR = 21\nPATCH = 3\nPRE_RELEASE = 'rc0'\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "megatron"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    installed.core_version.cache_clear()
    try:
        assert installed.core_version() == "0.21.3rc0"
        assert installed.core_release() is RELEASES[-1]
        assert "0.21.3rc0 is not known here: it is taken for 0.19" in str(installed.unknown_core())
        monkeypatch.setattr(sys, "path", [])
        monkeypatch.delitem(sys.modules, "megatron", raising=False)
        installed.core_version.cache_clear()
        assert installed.core_version() is None and installed.unknown_core() is None
        assert installed.core_release() is RELEASES[-1]
    finally:
        installed.core_version.cache_clear()


def test_a_checkpoint_tells_the_release_that_wrote_it() -> None:
    assert written_by("common.pt") == "0.18 or older"
    assert written_by("") == "0.19 or newer"
    assert written_by(None) is None
    assert written_by(names=["mtp.layers.0.transformer_layer.mlp.linear_fc1.weight"]) == "0.16 or older"
    assert written_by(names=["mtp.layers.0.mtp_model_layer.mlp.linear_fc1.weight"]) == "0.17 or newer"
    assert written_by(names=["mtp.layers.0.eh_proj.weight", "decoder.layers.0.mlp.linear_fc1.weight"]) is None


def test_what_0_16_asks_for_every_later_release_finds() -> None:
    """Folders are written for the first release: its objects are a superset, and its common state a file."""
    for name in (HEAD, "output_layer.weight", "decoder.layers.self_attention.linear_qkv.weight"):
        for kind in ("gpt", "hybrid"):
            asked = [set(extra_states_of(name, (), (), kind, release)) for release in RELEASES]
            assert set(extra_states_of(name, (), (), kind)) >= set().union(*asked)
    assert CURRENT is RELEASE_0_16 and CURRENT.common_file == "common.pt"


def test_ranks_own_names_follow_the_release() -> None:
    param = "transformer_layer.self_attention.linear_qkv.weight"
    assert spell_local(param, None, "local", RELEASE_0_16) == param
    assert spell_local(param, None, "local", RELEASE_0_19) == param.replace("transformer_layer", "mtp_model_layer")


@pytest.mark.parametrize("name", sorted(PREDICTION_LAYERS))
@pytest.mark.parametrize("rest", ["self_attention.linear_qkv.weight", "mlp.experts.linear_fc1.weight3"])
def test_a_rank_s_name_of_a_prediction_layer_becomes_the_key_s_whoever_wrote_it(name: str, rest: str) -> None:
    found = parse_local(f"mtp.layers.0.{name}.{rest}")
    assert found.param.startswith("transformer_layer.")
    assert spell_local(found.param, found.expert, "transformer_engine") == f"transformer_layer.{rest}"
    assert spell_local(found.param, found.expert, "transformer_engine", OTHER) == f"mtp_model_layer.{rest}"


def test_a_hybrid_head_keeps_its_name() -> None:
    param = "mtp_model_layer.layers.0.self_attention.linear_qkv.weight"
    assert parse_local(f"mtp.layers.0.{param}").param == param
    assert spell_local(param, None, "transformer_engine", CURRENT) == param


def test_names_of_norms_follow_the_release() -> None:
    key = "decoder.layers.3.input_layernorm.weight"
    keys = (key, "decoder.layers.3.mlp.router.weight", "decoder.layers.3.self_attention.linear_qkv.weight")
    assert canonical_names(keys)[key] == "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight"
    assert canonical_names(keys, OTHER)[key] == "decoder.layers.3.mlp.router.layer_norm_weight"
    assert spell_local("mlp.router.layer_norm_weight", None, "local", OTHER) == "input_layernorm.weight"


def test_states_follow_the_release() -> None:
    assert len(extra_states_of(HEAD, (), (), "gpt")) == 2
    assert extra_states_of(HEAD, (), (), "gpt", release=OTHER) == ()
    output = "output_layer.weight"
    assert [bool(extra_states_of(output, (), (), kind)) for kind in ("gpt", "hybrid")] == [False, True]
    assert [bool(extra_states_of(output, (), (), kind, release=OTHER)) for kind in ("gpt", "hybrid")] == [
        True,
        False,
    ]
    names = ["self_attention.linear_qkv.weight", "mlp.linear_fc1.weight", "pre_mlp_layernorm.weight"]
    assert extra_states(names, "transformer_engine", OTHER) == {"self_attention.linear_qkv._extra_state": True}


def test_stacking_follows_the_release() -> None:
    mixed = {"moe_layer_freq": [0, 1], "window_size": 0}
    assert [stacks_layers(kind, mixed) for kind in ("gpt", "hybrid")] == [False, False]
    assert [stacks_layers(kind, mixed, OTHER) for kind in ("gpt", "hybrid")] == [False, True]
