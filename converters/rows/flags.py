"""Megatron Core fields that bring parameters: a table that fixes one has a row for them, and one with rows says so."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from converters.rows.expr import Value
from converters.rows.table import Table

_POST = "mlp.linear_fc2.post_layernorm.weight"
_LATENT = ("self_attention.linear_q_up_proj.layer_norm_weight", "self_attention.linear_kv_up_proj.layer_norm_weight")
#: What Megatron-Bridge calls these in a class of its own (Kimi K3).
_OWN_LATENT = ("self_attention.kv_a_layernorm.weight", "self_attention.kv_a_proj_with_mqa.weight")
#: Field → parameters of a decoder layer of which it brings one at least.
BRINGS: Mapping[str, tuple[str, ...]] = {
    "add_qkv_bias": ("self_attention.linear_qkv.bias", "full_self_attention.linear_qkv.bias"),
    "add_bias_linear": ("self_attention.linear_proj.bias", "mlp.linear_fc2.bias", "mlp.experts.linear_fc2.bias{E}"),
    "qk_layernorm": (
        *("self_attention.q_layernorm.weight", "full_self_attention.q_layernorm.weight", "q_layernorm.weight"),
        *_LATENT,
        *_OWN_LATENT,
    ),
    "model.qk_layernorm_over_heads": ("self_attention.q_layernorm.weight",),
    "model.post_layernorms": (_POST, "post_mlp_layernorm.weight"),
    "model.post_layernorms_only": (_POST,),
    "multi_latent_attention": ("self_attention.linear_kv_down_proj.weight", *_OWN_LATENT),
    "moe_router_enable_expert_bias": ("mlp.router.expert_bias",),
    "moe_shared_expert_gate": ("mlp.shared_experts.gate_weight",),
}
#: Parameter → fields of which it needs one at least.
NEEDS: Mapping[str, tuple[str, ...]] = {
    "self_attention.linear_qkv.bias": ("add_qkv_bias", "add_bias_linear"),
    "self_attention.q_layernorm.weight": ("qk_layernorm",),
    _POST: ("model.post_layernorms", "model.post_layernorms_only"),
    "mlp.router.expert_bias": ("moe_router_enable_expert_bias",),
    "mlp.shared_experts.gate_weight": ("moe_shared_expert_gate",),
}
GATED = "gated_linear_unit"


def idle_flags(fixed: Mapping[str, Value], rows: Mapping[str, Collection[str]]) -> list[str]:
    """Fields of `fixed` that are on while none of their parameters has a row; `rows` are ops by parameter."""
    wanted = [field for field, brought in BRINGS.items() if fixed.get(field) and not any(p in rows for p in brought)]
    ops = [op for param, of in rows.items() if "linear_fc1.weight" in param for op in of]
    return wanted + ([GATED] if fixed.get(GATED) and ops and not any(op.startswith("glu") for op in ops) else [])


def contradictions(table: Table) -> list[str]:
    """What a table's fields say of its rows that is not so, and the other way round, a line each."""
    blocks = [table.blocks[name] for site in table.sites if not site.part for name in site.blocks]
    rows: dict[str, set[str]] = {}
    for spec in (spec for block in blocks for alternatives in block for spec in alternatives):
        rows.setdefault(spec.param, set()).add(spec.op)
    found = [
        f"field    `{field}` is on, and no row has what it brings" for field in idle_flags(table.config.fixed, rows)
    ]
    told = {row.mcore for row in table.config.rows} | {field for field, value in table.config.fixed.items() if value}
    for param, fields in NEEDS.items():
        if table.family == "gpt" and param in rows and told.isdisjoint(fields):
            found.append(f"row      `{param}` needs {' or '.join(f'`{field}`' for field in fields)}")
    gated = {op for param, ops in rows.items() if "linear_fc1.weight" in param for op in ops if op.startswith("glu")}
    if gated and GATED not in told:
        found.append(f"row      op {min(gated)} needs `{GATED}`")
    return found
