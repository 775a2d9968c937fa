"""Families with experts and hybrids: exact cover, byte-identical round trips, pinned names, and equal logits.

`python tests/tables/test_families_moe.py` writes `fixtures/golden/mcore/` again.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)] if __name__ == "__main__" else [str(Path(__file__).parent)]

from _moe_cases import (  # noqa: E402
    ALL,
    FORWARD,
    LAYOUTS,
    TABLES,
    WITHOUT_INDEXER,
    cases,
    family,
    headers_in,
    headers_of,
    made,
    with_key,
)
from _scaffold import (  # noqa: E402
    DEFECT,
    FORWARD_TOLERANCE,
    GOLDEN,
    Config,
    assert_every_row_is_needed,
    golden,
    imported,
    logits_differ,
    plan_headers,
    same_files,
    stored,
    write_golden,
)

from converters.codecs.decode import decoded_view  # noqa: E402
from converters.errors import CoverageError, MbxError  # noqa: E402
from converters.mcore.bridge_families import family_named  # noqa: E402
from converters.mcore.flavours import flavoured  # noqa: E402
from converters.mcore.layout import Layout  # noqa: E402
from converters.planning.exporter import HfTensor, Origin, plan_export  # noqa: E402
from converters.planning.importer import plan_import  # noqa: E402
from converters.rows.expr import Value  # noqa: E402
from fixtures.index import Header, load_index  # noqa: E402
from mappings import table_text  # noqa: E402
from mbx.formats.registry import open_megatron  # noqa: E402
from mbx.models.megatron.build import build_model  # noqa: E402
from mbx.models.megatron.config import transformer_config  # noqa: E402
from mbx.models.megatron.core.cpu import megatron_on_cpu  # noqa: E402
from mbx.models.megatron.processes import process_group  # noqa: E402
from mbx.run.execution import run  # noqa: E402
from mbx.run.job import Options, plan_mcore_to_hf  # noqa: E402
from mbx.tables import shipped, table_for  # noqa: E402

#: Plans of more than 70,000 tensors take longer than a default test may.
LARGE = ("DeepSeek-V3", "DeepSeek-V3.2", "GLM-5", "Kimi-K2-Instruct", "MiniMax-M2", "Qwen3-Next-80B-A3B-Instruct")
LARGE += ("Kimi-K3",)
FULL_SIZE = [
    pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else [])
    for name in sorted({family(name).reference for name in ALL})
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A tiny checkpoint by family and layout, made once."""
    root = tmp_path_factory.mktemp("families")
    return cache(lambda name, layout="v4": made(name, root / name / layout, layout))


def dcp_tensors(folder: Path) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Tensors and object names of a torch_dist folder by torch's own reader."""
    reader = dcp.FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {n: torch.empty(e.size, dtype=e.properties.dtype) for n, e in entries.items() if hasattr(e, "size")}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors, set(entries) - set(tensors)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_round_trip_is_byte_identical(
    checkpoint: Callable[..., Path], tmp_path: Path, name: str, layout: str, tp: int
) -> None:
    source = checkpoint(name, layout)
    imported(source, tmp_path / "mcore", tp=tp)
    run(plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "hf", Options(sync=False)))
    same_files(source, tmp_path / "hf")


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_both_directions_equal_the_peers_files(peers: Path, tmp_path: Path, name: str) -> None:
    source, theirs = peers / name / "hf", peers / name / "mcore"
    imported(source, tmp_path / "mcore")
    ours, our_objects = dcp_tensors(tmp_path / "mcore" / "iter_0000000")
    other, their_objects = dcp_tensors(theirs / "iter_0000000")
    assert our_objects == their_objects
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in other.items()}
    assert [n for n in ours if not torch.equal(ours[n], other[n])] == []
    run(plan_mcore_to_hf(theirs, tmp_path / "hf", Options(sync=False), hf_config=source))
    same_files(source, tmp_path / "hf")


@pytest.mark.parametrize("reference", FULL_SIZE)
def test_table_covers_the_full_size_model(reference: str) -> None:
    config, headers = load_index(reference)
    held = stored(headers)
    plan = plan_import(table_for(config), config, held, Layout())
    decoded, _ = decoded_view(held, config.get("quantization_config"))
    assert plan.ledger.consumed == len(decoded)


@pytest.mark.parametrize("name", ALL)
def test_an_export_without_a_record_spells_names_as_the_hub_does(name: str) -> None:
    config, headers = headers_of(name)
    plan = plan_headers(table_for(config), (config, headers))
    back = plan_export(plan.table, plan.config, stored({d.name: (d.dtype, d.shape) for d in plan.drafts}))
    expected = {n: shape for n, (_, shape) in headers.items() if n not in plan.ledger.repeated}
    assert {draft.name: draft.shape for draft in back.drafts} == expected
    # Only Megatron Core's fp32 router bias is wider than a bf16 source.
    widened = [d.name for d in back.drafts if d.dtype != headers[d.name][0]]
    assert all(n.endswith(("expert_bias", "e_score_correction_bias")) for n in widened)


@pytest.mark.parametrize("name", TABLES)
def test_every_row_is_needed_and_every_name_is_checked(name: str) -> None:
    assert_every_row_is_needed(shipped(name), cases(name))


@pytest.mark.parametrize("name", ALL)
def test_megatron_core_names_are_the_pinned_ones(checkpoint: Callable[..., Path], tmp_path: Path, name: str) -> None:
    assert golden(checkpoint(name), tmp_path / "mcore") == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_config_survives_the_cycle_and_megatron_core_knows_every_field(
    checkpoint: Callable[..., Path], name: str, layout: str
) -> None:
    config = json.loads((checkpoint(name, layout) / "config.json").read_text(encoding="utf-8"))
    table = table_for(config)
    fields = table.config.to_mcore(config)
    assert table.config.to_mcore(table.config.to_hf(fields)) == fields
    family = family_named(table.architectures)
    known = {key: value for key, value in fields.items() if family is None or key not in family.own}
    transformer_config({**known, **WITHOUT_INDEXER, "moe_latent_size": None})  # which needs Transformer Engine


def test_a_cast_spares_state_space_parameters_and_the_router_bias() -> None:
    for name, spared in (("qwen3_next", ("A_log", "dt_bias")), ("nemotron_nano_v3", ("A_log", "dt_bias", "mixer.D"))):
        case = headers_of(name)
        dtypes = {d.name: d.dtype for d in plan_headers(table_for(case[0]), case, dtype="F16").drafts}
        for key, dtype in dtypes.items():
            expected = "BF16" if key.endswith(spared) else "F32" if key.endswith("expert_bias") else "F16"
            assert dtype == expected, key


def test_a_checkpoint_that_is_all_fp32_exports_its_sinks_so() -> None:
    config, headers = headers_of("mimo_v2_flash")
    plan = plan_headers(table_for(config), (config, headers))
    recorded = {name: HfTensor(*header) for name, header in headers.items()}
    for wide in ("softmax_offset", ""):  # the sinks alone, as mcore-bridge keeps them, or every tensor
        held = stored({d.name: ("F32" if wide in d.name else d.dtype, d.shape) for d in plan.drafts})
        back = plan_export(flavoured(plan.table, held), plan.config, held, Origin(recorded))
        dtypes = {draft.dtype for draft in back.drafts if draft.name.endswith("attention_sink_bias")}
        assert dtypes == {"BF16" if wide else "F32"}


def test_rows_of_one_gate_are_alike_in_what_is_saved() -> None:
    config = table_for(headers_of("step_3_5_flash")[0]).config.to_mcore(headers_of("step_3_5_flash")[0])
    with megatron_on_cpu(), process_group():
        model = build_model(config)
        saved = {entry.key: entry.data for entry in model.sharded_state_dict().values() if hasattr(entry, "data")}
        for layer, heads in ((0, 8), (1, 12)):
            rows = saved[f"decoder.layers.{layer}.self_attention.linear_qkv.weight"].view(4, -1, 8, 32)
            query, gate = rows[:, : heads // 4], rows[:, heads // 4 : heads // 2]
            assert torch.equal(gate, gate[:, :, :1].expand_as(gate)) and not torch.equal(
                query[:, :, 0], query[:, :, 1]
            )


def test_rows_of_one_gate_that_differ_are_not_exported(tmp_path: Path) -> None:
    """Megatron Core and Megatron-Bridge train each of them; the folder has room for one."""
    imported(made("step_3_5_flash", tmp_path / "hf"), tmp_path / "mcore")
    opened = open_megatron(tmp_path / "mcore")
    (chunk,) = opened.tensors["decoder.layers.1.self_attention.linear_qkv.weight"].chunks
    row = 3 * 8 + 1  # the second channel of the first head's gate, behind three heads of queries of eight channels
    with (opened.iteration / chunk.file).open("r+b") as file:
        file.seek(opened.source.data_start(chunk) + 2 * 32 * row)
        file.write(b"\x40\x40")
    with pytest.raises(CoverageError, match="has one row for 8 of .*those from 24 on differ"):
        run(plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "back", Options(sync=False)))
    assert not (tmp_path / "back").exists()


def test_a_prediction_head_of_its_own_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = made("deepseek_v3", tmp_path / "hf")
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith("shared_head.head.weight"):
                tensors[name][3, 5] += 1
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CoverageError, match=r"shared_head\.head\.weight` should repeat `lm_head\.weight`"):
        imported(source, tmp_path / "mcore")


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe", "qwen3_next", "qwen3_5_moe_text", "nemotron_super"])
def test_prediction_layers_may_be_absent_but_not_torn(checkpoint: Callable[..., Path], name: str) -> None:
    config, headers = headers_of(name)
    last = f"model.layers.{config['num_hidden_layers']}."
    without = {n: h for n, h in headers.items() if not n.startswith(("mtp.", last))}
    assert len(without) < len(headers)
    keys = {draft.name for draft in plan_headers(table_for(config), (config, without)).drafts}
    assert not any(key.startswith("mtp.") for key in keys)
    torn = {n: h for n, h in headers.items() if not n.endswith(".experts.3.up_proj.weight") or n in without}
    assert len(torn) < len(headers)
    with pytest.raises(CoverageError):
        plan_headers(table_for(config), (config, torn))


@pytest.mark.parametrize(("name", "layout"), FORWARD)
def test_logits_are_those_of_transformers(
    checkpoint: Callable[..., Path], tmp_path: Path, name: str, layout: str
) -> None:
    assert logits_differ(checkpoint(name, layout), tmp_path, {}) <= FORWARD_TOLERANCE


@pytest.mark.parametrize("name", ["glm_5", "glm_5_2", "deepseek_v32"])
def test_sparse_attention_is_latent_attention_up_to_as_many_tokens_as_it_chooses(
    checkpoint: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    few = checkpoint(name)  # chooses 16, of 40 that it is shown
    config = json.loads((few / "config.json").read_text(encoding="utf-8"))
    source = shutil.copytree(few, tmp_path / "every")
    (source / "config.json").write_text(json.dumps({**config, "index_topk": 40}), encoding="utf-8")
    assert logits_differ(source, tmp_path / "all", WITHOUT_INDEXER) <= FORWARD_TOLERANCE
    assert logits_differ(few, tmp_path / "some", WITHOUT_INDEXER) > DEFECT


def test_chosen_blocks_of_keys_are_all_keys_up_to_as_many_as_are_chosen(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    few = Path(shutil.copytree(checkpoint("minimax_m3", "v5"), tmp_path / "few"))
    config = json.loads((few / "config.json").read_text(encoding="utf-8"))
    config |= {"index_block_size": 4, "index_topk_blocks": 2}
    (few / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert logits_differ(few, tmp_path / "some", {}) > DEFECT


EXPERTS = (
    '"mlp.experts.{E}.gate_proj.weight", "mlp.experts.{E}.up_proj.weight"',
    '"mlp.experts.{E}.up_proj.weight", "mlp.experts.{E}.gate_proj.weight"',
)
SHARED = (
    '"mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"',
    '"mlp.shared_experts.up_proj.weight", "mlp.shared_experts.gate_proj.weight"',
)
W1_W3 = (
    '"block_sparse_moe.experts.{E}.w1.weight", "block_sparse_moe.experts.{E}.w3.weight"',
    '"block_sparse_moe.experts.{E}.w3.weight", "block_sparse_moe.experts.{E}.w1.weight"',
)


@pytest.mark.parametrize(
    ("name", "layout", "wrong"),
    [
        ("qwen3_moe", "v4", EXPERTS),
        ("qwen3_moe", "v5", ("glu_fused", "glu_zip")),
        ("gpt_oss", "v4", ("glu_zip", "glu_fused")),
        ("mixtral", "v4", W1_W3),
        (
            "qwen2_moe",
            "v4",
            ('"self_attn.k_proj.bias", "self_attn.v_proj', '"self_attn.v_proj.bias", "self_attn.k_proj'),
        ),
        ("deepseek_v2", "v4", SHARED),
        ("glm4_moe", "v4", SHARED),
        ("glm_4_7_flash", "v4", SHARED),
        ("dots1", "v4", EXPERTS),
        ("hy3", "v5", SHARED),
        ("exaone_moe_alone", "v4", SHARED),
        ("ernie4_5_moe", "v4", EXPERTS),
        ("llama4_scout_unscaled", "v4", ("glu_fused", "glu_zip")),
    ],
)
def test_a_wrong_row_passes_every_check_but_the_forward_one(
    checkpoint: Callable[..., Path], tmp_path: Path, name: str, layout: str, wrong: tuple[str, str]
) -> None:
    text = table_text(table_for(headers_of(name)[0]).name)
    assert wrong[0] in text
    (tmp_path / "wrong.toml").write_text(text.replace(*wrong), encoding="utf-8")
    assert logits_differ(checkpoint(name, layout), tmp_path, {}, str(tmp_path / "wrong.toml")) > DEFECT


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("qwen3_moe", {"moe_router_pre_softmax": True}),
        ("gpt_oss", {"window_attn_skip_freq": 3}),
        ("gpt_oss", {"glu_linear_offset": 0.0}),
        ("mixtral_window", {"window_size": [8, 0]}),
        ("deepseek_v2", {"mscale_all_dim": 0.0}),
        ("deepseek_v2", {"moe_router_topk_scaling_factor": 1.0}),
        ("glm4_moe", {"model.rotary_percent": 1.0}),
        ("hy3", {"moe_router_topk_scaling_factor": 1.0}),
        ("exaone_moe_alone", {"no_rope_freq": None}),
        ("ernie4_5_moe", {"model.biased_softmax_router": False}),
        ("mimo_v2_flash", {"attention_value_scale": None}),
        ("gemma4_31b", {"rope_proportion": 1.0}),
        ("gemma4_31b", {"final_logit_softcapping": 0.5}),
        ("gemma4_31b", {"model.scale_embeddings": False}),
        ("mimo_v2_flash", {"model.rotary_percent_local": 1.0}),
        ("mimo_v2_flash", {"model.rotary_base_local": 5000000.0}),
        ("llama4_scout_unscaled", {"qk_l2_norm": False}),
        ("llama4_scout_unscaled", {"no_rope_freq": None}),
        ("llama4_scout_unscaled", {"moe_apply_probs_on_input": False}),
        # Two known limits of Megatron Core's latent attention models, each seen by the check.
        ("deepseek_v3_one_a_group", {}),
        ("moonlight", {"model.latent_layernorm_epsilon": None}),
    ],
)
def test_a_wrong_config_field_fails_the_forward_check(
    checkpoint: Callable[..., Path], tmp_path: Path, name: str, wrong: Config
) -> None:
    limit = FORWARD_TOLERANCE if name == "moonlight" else DEFECT
    assert logits_differ(checkpoint(name), tmp_path, wrong) > limit


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("qwen3_moe", "attention_bias", True),
        ("qwen3_moe", "use_sliding_window", True),
        ("gpt_oss", "swiglu_alpha", 1.0),
        ("deepseek_v2", "topk_method", "noaux_tc"),
        ("deepseek_v3", "scoring_func", "softmax"),
        ("deepseek_v3", "rope_scaling", {"type": "linear", "factor": 2.0}),
        ("glm4_moe", "norm_topk_prob", False),
        ("glm_4_7_flash", "mlp_layer_types", ["dense", "dense", "sparse", "sparse"]),
        ("hy3", "route_norm", False),
        ("gemma4_31b", "use_bidirectional_attention", "all"),
        ("gemma4_31b", "per_layer_config", {"2": {"head_dim": 16}, "5": {"head_dim": 32}}),
        ("mimo_v2_flash", "swa_v_head_dim", 16),
        ("kimi_linear", "linear_attn_config", {"full_attn_layers": [4], "kda_layers": [1, 2]}),
        (
            "kimi_linear",
            "linear_attn_config",
            {"full_attn_layers": [4], "kda_layers": [1, 2, 3], "gate_lower_bound": -5},
        ),
        ("kimi_linear", "mla_use_nope", False),
        ("kimi_k3", "linear_attn_config", {"full_attn_layers": [4], "kda_layers": [1, 2, 3]}),
        ("kimi_k3", "activation_situ_beta", 1.0),
        ("kimi_k3", "hidden_act", "silu"),
        ("step_3_5_flash", "rope_theta", [5000000.0, 10000.0, 10000.0, 500.0]),
        ("step_3_5_flash_with_heads", "layer_types", ["full_attention", *["sliding_attention"] * 3, "full_attention"]),
        ("step_3_5_flash", "moe_layers_enum", "2,3,4"),
        ("step_3_5_flash_with_heads", "swiglu_limits", [0.0, 0.0, 0.5, 0.25, 0.5]),
        ("step_3_5_flash", "attention_other_setting", {"num_attention_heads": 12, "head_dim": 4}),
        ("mimo_v2_flash", "hybrid_layer_pattern", [0, 1, 1, 1]),
        ("mimo_v2_flash", "add_swa_attention_sink_bias", False),
        ("ernie4_5_moe", "moe_gate", "top2_fused"),
        ("lfm2", "conv_bias", True),
        ("lfm2_moe", "layer_types", ["conv", "mamba"] * 2),
        ("ernie4_5_moe", "moe_layer_interval", 0),
        ("exaone_moe", "is_moe_layer", [False, True, False, True]),
        ("glm_5_2", "indexer_types", ["full", "shared", "full", "full"]),
        ("glm_5", "indexer_rope_interleave", False),
        ("deepseek_v32", "layer_types", ["full_attention"] * 4),
        ("dots1", "layer_types", ["full_attention"] * 3 + ["sliding_attention"]),
        ("minimax_m2", "attn_type_list", [1, 0, 1, 1]),
        ("minimax_m3", "sparse_attention_config", {"sparse_score_type": "sum"}),
        ("minimax_m3", "sparse_attention_config", {"unheard_of": 1}),
        ("minimax_m3", "mlp_layer_types", ["dense", "dense", "sparse", "sparse"]),
        ("minimax_m3", "layer_types", ["full_attention", *["minimax_m3_sparse"] * 2, "full_attention"]),
        ("minimax_m3", "hidden_act", "gelu"),
        ("minimax_m3", "qk_norm_type", "per_layer"),
        ("qwen3_next", "layer_types", ["full_attention", "linear_attention"] * 2),
        ("nemotron_h", "hybrid_override_pattern", "M-M*X*-M"),
        ("nemotron_nano_v3", "n_shared_experts", 2),
        ("mixtral", "unheard_of", 1),
        ("llama4_scout", "attention_chunk_size", 4096),
        ("nemotron_super", "num_nextn_predict_layers", 2),
    ],
)
def test_a_config_the_table_does_not_cover_is_refused(name: str, key: str, value: Value) -> None:
    config, headers = headers_of(name)
    with pytest.raises(MbxError, match=key):
        plan_headers(table_for(config), (with_key(config, key, value), headers))


def test_headers_of_layout_v5_are_those_that_transformers_writes(checkpoint: Callable[..., Path]) -> None:
    from _moe_cases import fused

    for name in ("mixtral", "qwen3_moe", "minimax_m2", "nemotron_nano_v3"):
        written: dict[str, Header] = headers_in(checkpoint(name, "v5"))
        assert {n: shape for n, (_, shape) in fused(headers_of(name))[1].items()} == {
            n: shape for n, (_, shape) in written.items()
        }


if __name__ == "__main__":
    write_golden(ALL, made)
