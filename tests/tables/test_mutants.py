"""No wrong table passes: rows exchanged, config entries, `fixed`, `ignore` and `when` changed, family by family.

What no leg finds is printed, and is in the list below with the reason why it cannot matter there (`make mutants`).
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent)]

from _mutants import SAME_PLAN, SURVIVED, Court, tower_mutants, tower_verdict, tried  # noqa: E402

from fixtures.families import FAMILIES  # noqa: E402
from fixtures.index import load_config  # noqa: E402
from fixtures.make_tiny import make  # noqa: E402
from fixtures.wrapped import make_wrapped  # noqa: E402
from mappings import table_names, table_text  # noqa: E402
from mbx.formats.registry import open_hf  # noqa: E402
from mbx.installed import core_release  # noqa: E402
from mbx.tables import shipped, table_for  # noqa: E402
from tests.mamba_on_cpu import mamba_on_cpu  # noqa: E402

#: Families that Transformers and Megatron Core both run on a CPU; the others need a GPU, or have no forward leg.
RUN = (
    *("llama", "llama2", "llama_nemotron", "mistral", "qwen2", "qwen3", "nemotron", "gemma", "gemma3_text", "glm"),
    *("glm4", "phi3", "smollm3", "seed_oss", "mimo", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "moonlight"),
    *("deepseek_v3", "glm4_moe", "gpt_oss", "llama4_maverick", "sarvam_moe", "dots1", "ernie4_5", "glm_4_7_flash"),
    *("starcoder2", "gemma2", "granite", "ministral3", "minimax_m2", "olmo2", "olmo3", "olmoe", "exaone4_1_2b"),
    *("internlm3", "hy3", "exaone_moe", "gpt2", "pythia", "command_r7b", "bailing_moe_v2", "deepseek"),
    *("ernie4_5_moe", "mimo_v2_flash", "gemma4_31b", "gemma4_e2b", "gemma4_26b", "step_3_5_flash"),
    *("minimax_m3", "falcon_h1_0_5b"),
    *(("deepseek_v32", "glm_5_2") if core_release().sparse_attention else ()),
)
#: Families with mixers, whose kernels a CPU lacks.
WITH_MAMBA = ("falcon_h1_0_5b",)
#: Tables that a GPU alone runs, or a newer Megatron Core; of one that is `unsupported` no forward leg runs, and no
#: comparison is called proved.
ELSEWHERE = ("nemotron_h", "qwen3_next", "qwen3_5", "qwen3_5_moe")
ELSEWHERE += () if core_release().sparse_attention else ("deepseek_v32", "glm_moe_dsa")
#: Models whose towers a table arranges by rows of its own; the others travel with their names and bytes as they are.
WITH_TOWER_ROWS = ("gemma3", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "nemotron_nano_v2_vl")
WITH_TOWER_ROWS += ("nemotron_nano_omni",)
_LATENT = "(deepseek_v2|deepseek_v3|moonlight|glm_4_7_flash|deepseek_v32|glm_5_2)"
_NOT_STRETCHED = "no frequency of the tiny head is one that Llama 3 stretches"
_IDLE_YARN = "the tiny head turns with two frequencies, of which either length and slope take the same"
#: Mutants, as their names begin, and why no pass depends on them; of one family where one is named.
REASONS = {
    r"(config|fixed) (init_method_std|moe_aux_loss_coeff):": "of training alone",
    r"(config|fixed) (attention|hidden)_dropout:": "no dropout outside training",
    r"config model\.max_sequence_length:": "bounds prompts, and changes no position",
    r"config fp32_residual_connection:": "of 16 bits alone",
    r"fixed model\.gate_by_head:": "rows of a gate are alike until they are trained",
    r"fixed moe_grouped_gemm:": "how experts are multiplied, not what they give",
    r"gemma4_26b via gemma4_experts: moe_router_pre_softmax:": "shares of the chosen experts sum to 1 either way",
    r"(config mtp_num_layers:|rows of mtp\.)": "prediction layers, which the report names as not reached",
    r"(rows of lightning_indexers|minimax_m3 via minimax_layers: index_)": "Megatron Core chooses no keys",
    r"pythia rows of .* attention\.dense\.bias ↔ mlp\.dense_4h": "both are added to the same sum",
    r"internlm3 via yarn: rope_dynamic_factor:": "sets in behind the context's end, where no position is",
    r"via \w+: model\.rope_scaling_factor:": "read with Llama 3's scaling alone",
    r"gemma4_(31b|26b) (config per_layer_vocab_size|via gemma4_sharing: use_double_wide_mlp):": "E2B's alone",
    r"(llama2|nemotron|pythia|command_r7b|deepseek|gemma4_\w+) via \w+: model\.rope_scaling:": _NOT_STRETCHED,
    r"step_3_5_flash via \w+: model\.rope_scaling:": _NOT_STRETCHED,
    r"(gpt_oss|phi3|ministral3|olmo3|olmoe) via \w+: model\.rope_scaling:": "read of plain positions alone",
    r"(qwen2_moe|qwen3_moe|mixtral|gpt_oss|olmoe|minimax_m2) config ffn_hidden_size:": "no layer without experts",
    r"gemma4_26b config ffn_hidden_size:": "no layer without experts",
    r"deepseek_v32 via \w+: dsa_indexer_skip_topk_offset:": "read where layers share choices",
    r"fixed dsa_indexer_k_norm_epsilon:": "moves scores by less than those of two tokens are apart",
    rf"{_LATENT} config num_query_groups:": "latent attention has no groups",
    rf"{_LATENT} fixed model\.position_embedding_type:": "latent attention has its own turn",
    r"(deepseek_v2|deepseek_v3|deepseek_v32) via mla_rope: (beta_|original_)": _IDLE_YARN,
    r"(olmo2|olmo3|olmoe|minimax_m2) fixed qk_layernorm:": "norms that span all heads take their place",
    r"(ministral3|olmo3) via yarn: yarn_(beta_|original_|correction_)": "rounds to the tiny head's same frequencies",
    r"falcon_h1_0_5b config norm_before_gate:": "there is no such norm",
    r"starcoder2 fixed add_qkv_bias:": "with `add_bias_linear` every projection has a bias, that one too",
    r"(moonlight|glm_4_7_flash|glm_5_2) via mla_rope: (mscale|rotary_scal)": "read with YaRN, beyond a factor of 1",
}
#: Where a condition does not hold its tensors are absent, and the cover refuses rows without tensors.
SAME_PLAN_REASONS = (
    r"when \w+: dropped",
    r"row .*: when .*: dropped",
    r"rows of .*(self_attn\.k_proj\.weight) ↔ \1",  # one tensor, which is keys and values
)


def test_every_table_is_mutated_or_says_why_not() -> None:
    shown = {table_for(load_config(FAMILIES[name].reference)).name for name in RUN}
    tables = {name: shipped(name) for name in table_names()}
    aside = {name for name, table in tables.items() if table.unsupported or "[text]" in table_text(name)}
    assert shown | aside | set(ELSEWHERE) == set(tables) and not shown & aside
    kinds = {table_for(json.loads(wrapped_config(kind))).name for kind in WITH_TOWER_ROWS}
    assert kinds == {name for name, table in tables.items() if table.towers}


def wrapped_config(kind: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return (make_wrapped(kind, Path(folder) / kind) / "config.json").read_text()


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "qwen3_vl" else pytest.mark.slow) for kind in WITH_TOWER_ROWS]
)
def test_a_wrong_row_of_a_tower_is_found_by_its_bytes(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = open_hf(make_wrapped(kind, tmp_path / "hf"))
    table = table_for(folder.config)
    flavours = [name for name, own in table.flavours.items() if own.sites]
    tried = [(name, mutant) for name in flavours for mutant in tower_mutants(table, folder, name)]
    found = {mutant.name: tower_verdict(mutant, folder, name, tmp_path) for name, mutant in tried}
    with capsys.disabled():
        sys.stdout.write(f"\n{kind}, towers: {dict(Counter(found.values()))}\n")
    assert bool(found) == (kind != "gemma3"), "a projector of two rows, of which no two have one shape"
    assert [name for name, verdict in found.items() if verdict == SURVIVED] == []


def explained(name: str, family: str, verdict: str) -> bool:
    if verdict == SAME_PLAN:
        return any(re.match(pattern, name) for pattern in SAME_PLAN_REASONS)
    return any(re.match(pattern, name) or re.match(pattern, f"{family} {name}") for pattern in REASONS)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name == "llama2" else pytest.mark.slow) for name in RUN]
)
def test_a_wrong_table_is_found(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mamba_on_cpu() if family in WITH_MAMBA else nullcontext():
        found_by_a_leg(family, tmp_path, capsys)


def found_by_a_leg(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = open_hf(make(family, tmp_path / "hf"))
    court = Court(folder, table_for(folder.config), tmp_path)
    found: Counter[str] = Counter()
    survivors = []
    for mutant, verdict in tried(court):
        found[verdict] += 1
        if verdict in (SURVIVED, SAME_PLAN):
            survivors.append((mutant.name, verdict))
    lines = [f"{family}: {', '.join(f'{verdict} {count}' for verdict, count in found.most_common())}"]
    lines += [f"  {verdict}: {name}" for name, verdict in survivors]
    with capsys.disabled():
        sys.stdout.write("\n".join(("", *lines, "")))
    assert found["forward"] >= 5 and found["refused"] >= 5
    assert [name for name, verdict in survivors if not explained(name, family, verdict)] == []
