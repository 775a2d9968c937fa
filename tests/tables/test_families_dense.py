"""Dense families: exact cover, byte-identical round trips, pinned Megatron Core names, and equal logits.

`python tests/tables/test_families_dense.py` writes `fixtures/golden/mcore/` again.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

sys.path[:0] = [str(Path(__file__).parent)]

from _dense_cases import ALL, FORWARD, MUTATED, REMOTE_CODE  # noqa: E402
from _scaffold import (  # noqa: E402
    DEFECT,
    FORWARD_TOLERANCE,
    GOLDEN,
    Case,
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

from converters.errors import MbxError  # noqa: E402
from converters.mcore.layout import Layout  # noqa: E402
from converters.planning.exporter import plan_export  # noqa: E402
from converters.planning.importer import plan_import  # noqa: E402
from converters.rows.config_map import environment  # noqa: E402
from converters.rows.expr import Value  # noqa: E402
from fixtures.families import FAMILIES  # noqa: E402
from fixtures.index import load_index  # noqa: E402
from fixtures.make_tiny import make  # noqa: E402
from mappings import table_text  # noqa: E402
from mbx.run.job import Options, plan_mcore_to_hf, run  # noqa: E402
from mbx.tables import table_for  # noqa: E402

LAYOUTS = [(name, layout) for name in ALL for layout in ("v4", "v5") if layout == "v4" or name not in REMOTE_CODE]
FULL_SIZE = sorted({FAMILIES[name].reference for name in ALL} | {"Qwen2.5-7B", "Qwen1.5-0.5B", "Phi-4-mini-instruct"})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A tiny checkpoint by family and layout, made once."""
    root = tmp_path_factory.mktemp("families")

    @cache
    def made(name: str, layout: str) -> Path:
        return make(name, root / name / layout, layout="v5" if layout == "v5" else "v4")

    return made


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_round_trip_is_byte_identical(
    checkpoint: Callable[[str, str], Path], tmp_path: Path, name: str, layout: str, tp: int
) -> None:
    source = checkpoint(name, layout)
    imported(source, tmp_path / "mcore", tp=tp)
    run(plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "hf", Options(sync=False)))
    same_files(source, tmp_path / "hf")


@pytest.mark.parametrize("reference", FULL_SIZE)
def test_table_covers_the_full_size_model_both_ways(reference: str) -> None:
    config, headers = load_index(reference)
    table = table_for(config)
    plan = plan_import(table, config, stored(headers), Layout())
    assert plan.ledger.consumed == len(headers)
    back = plan_export(table, plan.config, stored({d.name: (d.dtype, d.shape) for d in plan.drafts}))
    expected = {name: header for name, header in headers.items() if name not in plan.ledger.repeated}
    assert {draft.name: (draft.dtype, draft.shape) for draft in back.drafts} == expected


def head_cases(reference: str) -> list[Case]:
    """The full-size model as it is, with an output layer of its own, and with one that repeats the embedding.

    GPT-2's too as its first repositories spell it, and with the causal masks that early files hold, as GPT-NeoX's.
    """
    config, headers = load_index(reference)
    (embedding,) = (
        name for name in headers if name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight"))
    )
    with_head = {**headers, HEADS.get(config["model_type"], "lm_head.weight"): headers[embedding]}
    found: list[Case] = [
        (config, headers),
        ({**config, "tie_word_embeddings": False}, with_head),
        ({**config, "tie_word_embeddings": True}, with_head),
    ]
    if config["model_type"] == "gpt2":
        masked = {**headers, "transformer.h.0.attn.bias": ("F32", (1, 1, 8, 8))}
        found += [(config, masked), (config, {n.removeprefix("transformer."): h for n, h in masked.items()})]
    if config["model_type"] == "gpt_neox":
        buffers = {"bias": ("U8", (1, 1, 8, 8)), "masked_bias": ("F16", ()), "rotary_emb.inv_freq": ("F16", (2,))}
        masked = {f"gpt_neox.layers.0.attention.{name}": header for name, header in buffers.items()}
        renamed = {"lm_head.weight" if n == "embed_out.weight" else n: h for n, h in headers.items()}
        found += [(config, {**headers, **masked}), (config, renamed)]
    return found


#: Output layers by another name, by model type.
HEADS = {"gpt_neox": "embed_out.weight"}


@pytest.mark.parametrize("name", MUTATED)
def test_every_row_is_needed_and_every_name_is_checked(name: str) -> None:
    # Two layers say what eighty do; a family of unlike layers keeps them all.
    cases = head_cases(FAMILIES[name].reference)
    if name != "llama_nemotron":
        cases = [shortened(case) for case in cases]
    table = table_for(cases[0][0])
    assert_every_row_is_needed(table, cases)


def shortened(case: Case) -> Case:
    config, headers = case
    numbers = {name: re.search(r"\b(?:layers|h)\.(\d+)\.", name) for name in headers}
    keep = {name: headers[name] for name, found in numbers.items() if found is None or int(found[1]) < 2}
    lists = {key: value[:2] for key, value in config.items() if key in ("layer_types", "no_rope_layers")}
    return {**config, **lists, "n_layer" if "n_layer" in config else "num_hidden_layers": 2}, keep


@pytest.mark.parametrize("name", ALL)
def test_megatron_core_names_are_the_pinned_ones(
    checkpoint: Callable[[str, str], Path], tmp_path: Path, name: str
) -> None:
    assert golden(checkpoint(name, "v4"), tmp_path / "mcore") == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


def reference(source: Path, work: Path) -> Path:
    """The folder itself; MiMo, whose code lies on the hub, as the Qwen2 that its main path is."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "mimo":
        return source
    twin = shutil.copytree(source, work / "twin")
    del config["auto_map"]
    names = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (twin / "config.json").write_text(json.dumps({**config, **names}), encoding="utf-8")
    return Path(twin)


def edited(source: Path, work: Path, keys: Config) -> Path:
    """A copy of a checkpoint with `keys` over its config.json."""
    copy = Path(shutil.copytree(source, work / "edited"))
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps({**config, **keys}), encoding="utf-8")
    return copy


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
PROPORTIONAL = {"rope_type": "proportional", "factor": 2.0, "partial_rotary_factor": 0.5}
#: Config variants of the families above that take another path through the forward pass.
VARIANTS: list[tuple[str, Config]] = [
    *((name, {}) for name in FORWARD),
    ("granite", {"logits_scaling": 0.5}),
    ("mistral", {"sliding_window": 8}),
    ("phi3", {"sliding_window": 8}),
    ("phi3", {"partial_rotary_factor": 0.5}),
    ("pythia", {"use_parallel_residual": False}),
    *(("qwen2", {"rope_scaling": {"rope_type": kind, "factor": 2.0}}) for kind in ("linear", "dynamic")),
    ("qwen3", {"rope_scaling": YARN, "max_position_embeddings": 64}),
    *((name, {"rope_scaling": YARN, "max_position_embeddings": 64}) for name in ("llama", "mistral")),
    ("smollm3", {"no_rope_layers": [0, 1, 0, 1]}),
    ("qwen3", {"rope_scaling": PROPORTIONAL}),
    ("llama2", {"rope_scaling": {"rope_type": "proportional"}}),
    *((name, {"rope_scaling": YARN}) for name in ("llama2", "mistral", "seed_oss", "starcoder2", "smollm3")),
]


@pytest.mark.parametrize(("name", "keys"), VARIANTS)
def test_logits_are_those_of_transformers(
    checkpoint: Callable[[str, str], Path], tmp_path: Path, name: str, keys: Config
) -> None:
    source = edited(checkpoint(name, "v4"), tmp_path, keys)
    assert logits_differ(source, tmp_path, {}, reference=reference(source, tmp_path)) <= FORWARD_TOLERANCE


GATE_UP = ('"mlp.gate_proj.weight", "mlp.up_proj.weight"', '"mlp.up_proj.weight", "mlp.gate_proj.weight"')
QK_NORMS = (
    'self_attn.q_norm.weight" }\n"self_attention.k_layernorm.weight" = { norm = "self_attn.k_norm.weight',
    'self_attn.k_norm.weight" }\n"self_attention.k_layernorm.weight" = { norm = "self_attn.q_norm.weight',
)
BIASES = ('"self_attn.k_proj.bias", "self_attn.v_proj.bias"', '"self_attn.v_proj.bias", "self_attn.k_proj.bias"')


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("mistral", GATE_UP),
        ("qwen2", BIASES),
        ("qwen3", QK_NORMS),
        ("seed_oss", BIASES),
        ("nemotron", ('hf = "zero"', 'hf = "one"')),
        ("glm", ("glu_fused", "glu_zip")),
        ("phi3", ("qkv_fused", "col")),
        ("smollm3", GATE_UP),
        ("mimo", GATE_UP),
    ],
)
def test_a_wrong_row_passes_every_check_but_the_forward_one(
    checkpoint: Callable[[str, str], Path], tmp_path: Path, name: str, wrong: tuple[str, str]
) -> None:
    text = table_text(name)
    assert wrong[0] in text
    (tmp_path / "wrong.toml").write_text(text.replace(*wrong), encoding="utf-8")
    source = checkpoint(name, "v4")
    mapping = str(tmp_path / "wrong.toml")
    assert logits_differ(source, tmp_path, {}, mapping, reference=reference(source, tmp_path)) > DEFECT


@pytest.mark.parametrize(
    ("name", "keys", "wrong"),
    [
        ("mistral", {"sliding_window": 8}, {"window_size": [8, 0]}),
        ("nemotron", {}, {"model.rotary_percent": 1.0}),
        ("glm", {}, {"rotary_interleaved": False}),
        ("phi3", {"partial_rotary_factor": 0.5}, {"model.rotary_percent": 1.0}),
        ("qwen3", {"rope_scaling": YARN, "max_position_embeddings": 64}, {"yarn_rotary_scaling_factor": 2.0}),
        ("smollm3", {}, {"no_rope_freq": None}),
        ("qwen3", {"rope_scaling": PROPORTIONAL}, {"rope_proportion": 1.0}),
        ("qwen3", {"rope_scaling": PROPORTIONAL}, {"model.seq_len_interpolation_factor": None}),
        ("ernie4_5", {}, {"rotary_interleaved": False}),
        ("starcoder2", {}, {"window_size": None}),
        ("gemma2", {"attn_logit_softcapping": 0.25}, {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": 1.0}, {"final_logit_softcapping": None}),
        ("granite", {"logits_scaling": 0.5}, {"residual_multiplier": 1.0}),
        ("olmo3", {}, {"model.rotary_base_local": None}),
        ("pythia", {}, {"model.parallel_residual": False}),
        ("command_r7b", {}, {"no_rope_freq": None}),
        ("command_r7b", {}, {"logit_scale": 1.0}),
        ("exaone4_32b", {}, {"no_rope_freq": None}),
    ],
)
def test_a_wrong_config_field_fails_the_forward_check(
    checkpoint: Callable[[str, str], Path], tmp_path: Path, name: str, keys: Config, wrong: Config
) -> None:
    assert logits_differ(edited(checkpoint(name, "v4"), tmp_path, keys), tmp_path, wrong) > DEFECT


def test_mimo_prediction_head_sees_the_embedding_first(checkpoint: Callable[[str, str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    source = checkpoint("mimo", "v4")
    imported(source, tmp_path / "mcore")
    hf = load_file(source / "model.safetensors")["model.mtp_layers.0.input_proj.weight"]
    state = {"mtp.layers.0.eh_proj.weight": torch.empty_like(hf)}
    dcp.load(state, storage_reader=dcp.FileSystemReader(tmp_path / "mcore" / "iter_0000000"), no_dist=True)
    hidden, embedding = hf.chunk(2, dim=1)
    assert torch.equal(state["mtp.layers.0.eh_proj.weight"], torch.cat((embedding, hidden), dim=1))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("qwen2", "use_sliding_window", True),
        ("qwen3", "attention_bias", True),
        ("nemotron", "hidden_act", "silu"),
        ("gemma", "hidden_activation", "silu"),
        ("seed_oss", "attention_out_bias", True),
        ("qwen3", "rope_scaling", {"rope_type": "proportional", "factor": 2.0, "beta_fast": 32}),
        ("mistral", "unheard_of", 1),
        ("phi3", "rope_scaling", YARN),
    ],
)
def test_a_config_the_table_does_not_cover_is_refused(name: str, key: str, value: Value) -> None:
    config, headers = load_index(FAMILIES[name].reference)
    with pytest.raises(MbxError, match=key if key != "hidden_activation" else "silu"):
        plan_headers(table_for(config), ({**config, key: value}, headers))


def test_each_layer_has_its_own_query_groups(checkpoint: Callable[[str, str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    source = checkpoint("llama_nemotron", "v4")
    imported(source, tmp_path / "mcore")
    hf = load_file(source / "model.safetensors")
    blocks = json.loads((source / "config.json").read_text(encoding="utf-8"))["block_configs"]
    seen = set()
    for layer, block in enumerate(blocks):
        if block["attention"]["no_op"]:
            continue
        groups = 8 // block["attention"]["n_heads_in_group"]
        parts = [hf[f"model.layers.{layer}.self_attn.{p}_proj.weight"].reshape(groups, -1, 32) for p in "qkv"]
        expected = torch.cat(parts, dim=1).reshape(-1, 32)
        state = {f"decoder.layers.{layer}.self_attention.linear_qkv.weight": torch.empty_like(expected)}
        dcp.load(state, storage_reader=dcp.FileSystemReader(tmp_path / "mcore" / "iter_0000000"), no_dist=True)
        assert torch.equal(*state.values(), expected)
        seen.add(groups)
    assert seen == {2, 4, 8}


def test_layers_without_attention_or_mlp_have_no_tensors() -> None:
    config, _ = load_index("Llama-3_3-Nemotron-Super-49B-v1")
    table = table_for(config)
    env = environment(table.config.to_mcore(config))
    names = {row.mcore for row in table.expand(env, None)}
    for layer, block in enumerate(config["block_configs"]):
        assert (f"decoder.layers.{layer}.self_attention.linear_qkv.weight" in names) != block["attention"]["no_op"]
        assert (f"decoder.layers.{layer}.mlp.linear_fc1.weight" in names) != block["ffn"]["no_op"]


if __name__ == "__main__":
    write_golden(ALL, make)
