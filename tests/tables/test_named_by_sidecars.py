"""What a checkpoint is of, where nothing but Megatron's own sidecars says it: its own table, or an error.

Every table's checkpoint meets the sidecars of every other, as mbx writes them and as Megatron-Bridge 0.6.2 does:
`fixtures/bridge/run_configs_0_6.json` holds the `model` nodes that its converters make of the tiny families' configs,
and of families that no table reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from converters.engine.plan import Plan
from converters.errors import MbxError, UnsupportedError, UsageError
from converters.mcore.bridge_config import config_of_run_config, run_config_of
from converters.mcore.bridge_families import FAMILIES as BRIDGE_FAMILIES
from converters.mcore.field_equality import alike, is_idle
from converters.mcore.layout import Layout
from converters.mcore.megatron_args import TRAINING, args_of, config_of_args
from converters.planning.importer import plan_import
from fixtures.families import FAMILIES
from fixtures.headers import hub_headers
from fixtures.make_tiny import tiny_config
from mappings import table_names
from mbx.formats.architecture import architecture_of
from mbx.formats.checkpoint import Checkpoint
from mbx.tables import shipped, table_for
from tests.tables._scaffold import stored

ROOT = Path(__file__).resolve().parents[2]
BRIDGE: dict[str, dict[str, Any]] = json.loads((ROOT / "fixtures/bridge/run_configs_0_6.json").read_text("utf-8"))
#: Stored by a codec: the same models as others here.
SAME = ("deepseek_v3_fp8", "gpt_oss_mxfp4")
NAMES = tuple(name for name in FAMILIES if name not in SAME)
#: The first family of each table.
ONE_EACH = tuple({table_for(tiny_config(name)).name: name for name in reversed(NAMES)}.values())
#: Nodes of families for which there is no table.
STRANGERS = tuple(sorted(BRIDGE.keys() - FAMILIES.keys()))


@cache
def planned(name: str) -> Plan:
    """A family's checkpoint, headers alone."""
    config = tiny_config(name)
    headers = hub_headers(config, repository=FAMILIES[name].reference)
    plain = {key: (header[0], header[1]) for key, header in headers.items()}
    return plan_import(table_for(config), config, stored(plain), Layout())


@cache
def tensors(name: str) -> Mapping[str, Any]:
    return stored({draft.name: (draft.dtype, draft.shape) for draft in planned(name).drafts})


def opened(name: str, args: Mapping[str, object] | None, run_config: Mapping[str, object] | None) -> Checkpoint:
    nowhere = Path("/nonexistent/iter_0000000")
    return Checkpoint(
        nowhere, "torch_dist", "mcore", nowhere, tensors(name), root=nowhere.parent, args=args, run_config=run_config
    )


def table_of(name: str) -> str:
    table = planned(name).table
    assert table is not None
    return table.name


@cache
def our_args(name: str, *, stated: bool = True) -> dict[str, object]:
    plan = planned(name)
    assert plan.table is not None
    args = args_of(plan.config, Layout(), 251, plan.table.architectures)
    return args if stated else {key: value for key, value in args.items() if key != "mbx"}


@cache
def our_run_config(name: str) -> dict[str, object] | None:
    plan = planned(name)
    assert plan.table is not None
    return run_config_of(plan.config, Layout(), 251, "BF16", None, architectures=plan.table.architectures)


def unlike(name: str, found: Mapping[str, Any]) -> list[str]:
    """Fields in which a family's config and `found` differ."""
    wanted = planned(name).config
    shared = [key for key in wanted.keys() & found.keys() - TRAINING if not alike(key, wanted, found)]
    lost = [key for key in wanted.keys() ^ found.keys() if not is_idle(key, ({**wanted, **found})[key])]
    return [*shared, *(key for key in lost if key not in TRAINING)]


def test_every_table_is_here() -> None:
    """All but those of diffusion: of what Megatron's sidecars say of these, their own tests tell."""
    text = [name for name in table_names() if shipped(name).family != "dit"]
    assert {table_of(name) for name in NAMES} == {name for name in text if not shipped(name).flavours}
    known = {name for family in BRIDGE_FAMILIES for name in (family.architecture,)}
    assert len(known) == len(BRIDGE_FAMILIES), "a family a class"


@pytest.mark.parametrize("name", NAMES)
def test_our_own_sidecars_give_the_model_back(name: str) -> None:
    """Each sidecar alone and both together: the table, and every field."""
    run_config = our_run_config(name)
    for args, node in ((our_args(name), None), (None, run_config), (our_args(name), run_config)):
        if args is None and node is None:
            continue
        found = architecture_of(opened(name, args, node))
        assert found.table.name == table_of(name)
        assert unlike(name, found.table.config.to_mcore(found.config)) == []


def test_sidecars_are_written_for_all_but_what_neither_tool_builds() -> None:
    without = {table_of(name) for name in NAMES if our_run_config(name) is None}
    assert without == {
        "glm4",
        "granite",
        "llama4",
        "ministral3",
        "olmo2",
        "olmo3",
        "deepseek_v32",
        "gpt_neox",
        "cohere2",
        "ernie4_5_moe",
        "gemma4_text",
        "lfm2",
        "lfm2_moe",
        "mimo_v2_flash",
        "step3p5",
        "kimi_linear",
        "minimax_m3",
        "kimi_k3",
    }
    for name in NAMES:
        assert unlike(name, config_of_args(our_args(name))) == []
        if (node := our_run_config(name)) is not None:
            assert unlike(name, config_of_run_config(node)) == []


#: Bridge routes by sigmoid where Transformers' class has a softmax: what it says is not read as that model.
OTHERWISE = {"ernie4_5_moe"}


@pytest.mark.parametrize("name", [name for name in NAMES if name in BRIDGE.keys() - OTHERWISE])
def test_bridges_run_config_names_its_family(name: str) -> None:
    found = architecture_of(opened(name, None, {"model": BRIDGE[name]}))
    assert found.table.name == table_of(name)


@pytest.mark.parametrize("name", ONE_EACH)
def test_no_neighbours_run_config_is_believed(name: str) -> None:
    """A sidecar of another family on a checkpoint's tensors: an error, unless the other's tensors are the same."""
    for other, node in others(name):
        try:
            found = architecture_of(opened(name, None, {"model": node}))
        except (UsageError, UnsupportedError):
            continue
        assert other not in STRANGERS, f"{other} was taken for {found.table.name}"
        assert found.table.name == table_of(other)
        assert decoder(name) == decoder(other)


def decoder(name: str) -> set[str]:
    """Keys of a small checkpoint but for its prediction layers, which a checkpoint may be without."""
    return {key for key in tensors(name) if not key.startswith("mtp.")}


def others(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for other in (*STRANGERS, *(one for one in ONE_EACH if one in BRIDGE and table_of(one) != table_of(name))):
        yield other, BRIDGE[other]


@pytest.mark.parametrize("name", ONE_EACH)
def test_no_neighbours_args_are_believed(name: str) -> None:
    for other in ONE_EACH:
        if table_of(other) == table_of(name):
            continue
        try:
            found = architecture_of(opened(name, our_args(other), None))
        except (UsageError, UnsupportedError):
            continue
        assert found.table.name == table_of(other)
        assert decoder(name) == decoder(other)


#: Granite's factors, which no argument of Megatron-LM says: a model that it wrote is without them. Likewise what
#: dynamic scaling does behind the context's end, where no model of Megatron Core comes to.
UNSAID = {
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
    "rope_dynamic_factor",
}


@pytest.mark.parametrize("name", NAMES)
def test_megatron_lms_own_args_give_the_same_function_or_an_error(name: str) -> None:
    """Args in Megatron-LM's words alone: another name is taken only for what is the same in every field."""
    try:
        found = architecture_of(opened(name, our_args(name, stated=False), None))
    except (UsageError, UnsupportedError) as error:
        assert table_of(name) in "\n".join((error.fact, *error.details)) or shipped(table_of(name)).unsupported
        return
    said = planned(name).config.items()
    wanted = {key: value for key, value in said if not key.startswith("yarn_") and key not in UNSAID}
    fields = found.table.config.to_mcore(found.config)
    assert [k for k in wanted.keys() & fields.keys() - TRAINING if not alike(k, wanted, fields)] == []
    assert [k for k in wanted.keys() - fields.keys() - TRAINING if not is_idle(k, wanted[k])] == []
    assert not found.table.unsupported


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("gemma2", "window_size", [8, 0]),
        ("gemma2", "query_pre_attn_scalar", 64),
        ("gemma3_text", "rotary_base", [10000, 500000]),
        ("qwen3", "_target_", "megatron.bridge.models.gemma.gemma2_provider.Gemma2ModelProvider"),
        ("qwen3", "transformer_layer_spec", {"_target_": "x.exaone4_layer_spec", "_call_": False}),
        ("deepseek_v3", "multi_latent_attention", False),
        ("llama", "qk_layernorm", True),
        ("gpt_oss", "yarn_rotary_scaling_factor", 16.0),
    ],
)
def test_an_edited_run_config_is_an_error_beside_our_args(name: str, field: str, value: object) -> None:
    node = our_run_config(name)
    assert node is not None and isinstance(node["model"], dict)
    edited = {**node, "model": {**node["model"], field: value}}
    with pytest.raises(MbxError):
        architecture_of(opened(name, our_args(name), edited))


def test_an_error_lists_the_candidates_and_what_speaks_against_each() -> None:
    node = {**BRIDGE["llama"], "num_attention_heads": 16}
    with pytest.raises(UnsupportedError) as error:
        architecture_of(opened("llama", None, {"model": node}))
    named = {line.split(":")[0] for line in error.value.details}
    assert {"llama", "qwen2", "qwen3", "qwen3_moe", "gpt_oss", "nemotron", "mimo"} == named
    assert all(len(line.split(":", 1)[1]) > 10 for line in error.value.details)
