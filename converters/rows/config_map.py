"""Config keys, both ways: every Hugging Face key is mapped, required at a value, or ignored by name.

A Megatron Core config in mbx is flat: TransformerConfig field names, and constructor arguments of the model
behind `model.` (`model.vocab_size`, `model.rotary_base`, …).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

from converters.errors import CoverageError, TableError, UsageError
from converters.rows.config_spelling import GENERIC_KEYS, canonical, is_provenance
from converters.rows.expr import Value, evaluate
from converters.rows.isos import FIELDS, VALUE

#: Megatron Core fields that count something.
WHOLE_NUMBERS = frozenset(
    """num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels num_moe_experts
    moe_ffn_hidden_size moe_router_topk moe_shared_expert_intermediate_size mtp_num_layers q_lora_rank kv_lora_rank
    qk_head_dim qk_pos_emb_head_dim v_head_dim mamba_num_heads mamba_head_dim mamba_num_groups mamba_state_dim
    linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim linear_conv_kernel_dim
    moe_router_num_groups moe_router_group_topk model.vocab_size model.max_sequence_length num_joint_layers
    num_single_layers in_channels out_channels text_dim freq_dim context_dim vec_in_dim""".split()
)
#: Those without which no model can be built, where a table has them: Megatron Core would take its own default.
NEEDED = WHOLE_NUMBERS - set(
    """num_moe_experts moe_ffn_hidden_size moe_router_topk moe_router_num_groups moe_router_group_topk q_lora_rank
    moe_shared_expert_intermediate_size mtp_num_layers model.max_sequence_length""".split()
)
#: Those that a model with experts needs.
NEEDED_BY_EXPERTS = ("moe_ffn_hidden_size", "moe_router_topk")
#: Those that say how often a part repeats; more is a slip of the pen, and would be laid out one by one.
REPEATS = frozenset({"num_layers", "mtp_num_layers", "num_moe_experts", "num_joint_layers", "num_single_layers"})
_MAX_REPEATS = 100_000
#: Those that say which layers do what: every so many, or one flag a layer.
_PATTERNS = frozenset({"moe_layer_freq", "linear_attention_freq", "window_attn_skip_freq", "no_rope_freq"})


@dataclass(frozen=True, slots=True)
class ConfigRow:
    """One Megatron Core field: its Hugging Face key, what holds when the key is absent, its conversion."""

    mcore: str
    hf: str
    otherwise: Value
    via: str | None


@dataclass(frozen=True, slots=True)
class ConfigTable:
    """The `[config]` part of a table.

    `groups`: FIELDS iso → its Hugging Face keys. `fixed`: Megatron Core fields this architecture always has.
    `require`: Hugging Face keys that must have this value when present. `ignore`: keys without effect on the
    weights or the forward pass. `idle`: of these, the ones without effect only while a required key has its value, by
    that key. `waived`: keys that no table knows and a user says have none.
    """

    table: str
    rows: tuple[ConfigRow, ...]
    groups: Mapping[str, tuple[str, ...]]
    fixed: Mapping[str, Value]
    require: Mapping[str, Value]
    ignore: frozenset[str]
    waived: frozenset[str] = frozenset()
    idle: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def extended(self, own: ConfigTable) -> ConfigTable:
        """This part with that of a model around it, which wins where both speak of a field or a key."""
        fields, keys = {row.mcore for row in own.rows}, own.known_keys()
        return ConfigTable(
            own.table,
            (*(row for row in self.rows if row.mcore not in fields), *own.rows),
            {**self.groups, **own.groups},
            {**self.fixed, **own.fixed},
            {**{key: value for key, value in self.require.items() if key not in keys}, **own.require},
            (self.ignore - keys) | own.ignore,
            idle={**self.idle, **own.idle},
        )

    def known_keys(self) -> frozenset[str]:
        """Hugging Face keys this table accounts for."""
        keys = {row.hf.split(".")[0] for row in self.rows} | set(self.require) | self.ignore
        return frozenset(keys | {key for group in self.groups.values() for key in group})

    def unknown_keys(self, config: Mapping[str, Value]) -> list[str]:
        """Keys of a Hugging Face config that may change the forward pass for all this table and its user know."""
        known = self.known_keys() | GENERIC_KEYS | self.waived
        return sorted(key for key in canonical(config) if key not in known and not is_provenance(key))

    def waiving(self, keys: Collection[str]) -> ConfigTable:
        """This table, `keys` that it does not know being without effect."""
        return replace(self, waived=self.waived | frozenset(keys))

    def to_mcore(self, config: Mapping[str, Value], *, allow_unused: Collection[str] = ()) -> dict[str, Value]:
        """Megatron Core config of a Hugging Face one, in either Transformers spelling.

        Raises CoverageError listing every key the table does not know, UsageError on a value it cannot express.
        """
        hf = canonical(config)
        if unknown := [key for key in self.unknown_keys(config) if key not in allow_unused]:
            known = self.known_keys() | GENERIC_KEYS
            raise CoverageError(
                f"config.json has {len(unknown)} key(s) that the table `{self.table}` does not know: "
                + ", ".join(unknown[:10]),
                hint="a key that cannot change the forward pass may be waived with ‹allow-unused-key› NAME",
                details=[f"{key} = {hf[key]!r}{_near(key, known)}" for key in unknown],
            )
        for key, value in self.require.items():
            if key in hf and hf[key] != value:
                raise UsageError(
                    f"config.json: `{key}` is {hf[key]!r}; the table `{self.table}` covers only {value!r}"
                )
        out: dict[str, Value] = dict(self.fixed)
        for row in self.rows:
            value = _get(hf, row.hf)
            if value is None and row.otherwise is not None:
                value = evaluate(row.otherwise, hf) if isinstance(row.otherwise, str) else row.otherwise
            elif row.via is not None:
                value = VALUE[row.via].to_mcore(value, hf)
            elif not _is_like(value, row.otherwise):
                raise UsageError(f"config.json: `{row.hf}` is {value!r}; a value like {row.otherwise!r} was expected")
            _check_whole(row, value, hf)
            out[row.mcore] = value
        for row in self.rows if out.get("num_moe_experts") else ():
            if row.mcore in NEEDED_BY_EXPERTS and out[row.mcore] is None:
                raise UsageError(f"config.json: `{row.hf}` is not there; a model with experts needs it")
        for group in self.groups:
            out |= FIELDS[group].to_mcore(hf)
        return out

    def to_hf(self, mcore: Mapping[str, Value]) -> dict[str, Value]:
        """Hugging Face config, in the v4 spelling, of a Megatron Core one; UsageError where `fixed` disagrees."""
        for name, value in self.fixed.items():
            if name in mcore and mcore[name] != value:
                raise UsageError(
                    f"the checkpoint has `{name}` = {mcore[name]!r}; the table `{self.table}` stands for {value!r}"
                )
        out: dict[str, Value] = dict(self.require)
        for row in self.rows:
            value = mcore.get(row.mcore)
            if row.via is not None:
                value = VALUE[row.via].to_hf(value, mcore)
            _set(out, row.hf, value)
        for group in self.groups:
            out |= FIELDS[group].to_hf(mcore)
        return out


def _is_like(value: Value, otherwise: Value) -> bool:
    """Whether a value is of the kind of what stands for it when it is absent: a switch, or a finite number."""
    if isinstance(otherwise, bool):
        return isinstance(value, bool)
    if isinstance(otherwise, int | float):
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return True


def _check_whole(row: ConfigRow, value: Value, hf: Mapping[str, Value]) -> None:
    """UsageError unless a field that counts something is a whole number, in reason, and there where it must be."""
    part, _, inner = row.mcore.rpartition(".")
    field = row.mcore if part in ("", "model") else inner
    if field not in WHOLE_NUMBERS or value is None and field not in NEEDED:
        return
    _check_count(field, value, f"config.json: `{row.hf}` is {_get(hf, row.hf)!r}")


def _check_count(field: str, value: Value, said: str) -> None:
    """UsageError, which begins with `said`, unless a field of `WHOLE_NUMBERS` is a whole number, in reason."""
    if type(value) is not int or value < 0:
        raise UsageError(f"{said}; a whole number was expected")
    if field in REPEATS and value > _MAX_REPEATS:
        raise UsageError(f"{said}; at most {_MAX_REPEATS} are laid out")


def check_fields(config: Mapping[str, Value], origin: str) -> None:
    """UsageError where a Megatron Core config, as `origin` says it, holds what no such config can."""
    for name, value in config.items():
        if value is None:
            continue
        if name in WHOLE_NUMBERS:
            _check_count(name, value, f"{origin}: `{name}` is {value!r}")
        flags = value if isinstance(value, list) else [value]
        if name in _PATTERNS and not (flags and all(isinstance(flag, int) for flag in flags) and value != 0):
            raise UsageError(f"{origin}: `{name}` is {value!r}; a period, or a number for each layer, was expected")
        if name == "window_size" and not flags:
            raise UsageError(f"{origin}: `{name}` is {value!r}; how far back and ahead was expected")


def environment(mcore: Mapping[str, Value]) -> dict[str, Value]:
    """Names that table expressions see: fields without their `model.` prefix, dots as underscores."""
    return {name.removeprefix("model.").replace(".", "_"): value for name, value in mcore.items()}


def part_of(env: Mapping[str, Value], part: str) -> dict[str, Value]:
    """Names that expressions of a part's rows see: the fields that begin with its name, without that."""
    return {name.removeprefix(f"{part}_"): value for name, value in env.items() if name.startswith(f"{part}_")}


def parse_config(table: str, raw: object) -> ConfigTable:
    """`[config]` from parsed TOML; TableError names the key."""
    if not isinstance(raw, dict):
        raise TableError(f"{table}: [config] is not a table")
    sections = {name: raw.get(name, {}) for name in ("fixed", "require", "via", "idle")}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise TableError(f"{table}: [config.{name}] is not a table")
    ignore = raw.get("ignore", [])
    if not isinstance(ignore, list) or not all(isinstance(key, str) for key in ignore):
        raise TableError(f"{table}: [config] `ignore` must be a list of keys")
    rows = tuple(_row(table, key, spec) for key, spec in raw.items() if key not in (*sections, "ignore"))
    groups = {name: _keys(table, f"[config.via] `{name}`", keys) for name, keys in sections["via"].items()}
    if unknown := sorted(set(groups) - set(FIELDS)):
        raise TableError(f"{table}: [config.via] `{unknown[0]}` is not registered; known: {', '.join(sorted(FIELDS))}")
    idle = {name: _keys(table, f"[config.idle] `{name}`", keys) for name, keys in sections["idle"].items()}
    if unknown := sorted(set(idle) - set(sections["require"])):
        raise TableError(f"{table}: [config.idle] `{unknown[0]}` is no key of [config.require]")
    seen: dict[str, str] = {}
    for name, where in [(r.mcore, "a row") for r in rows] + [(f, "[config.fixed]") for f in sections["fixed"]]:
        if name in seen:
            raise TableError(f"{table}: [config] sets `{name}` twice, in {seen[name]} and in {where}")
        seen[name] = where
    ignored = frozenset(ignore).union(*idle.values())
    return ConfigTable(table, rows, groups, sections["fixed"], sections["require"], ignored, idle=idle)


def _keys(table: str, place: str, keys: object) -> tuple[str, ...]:
    listed = [keys] if isinstance(keys, str) else keys
    if not isinstance(listed, list) or not all(isinstance(key, str) for key in listed):
        raise TableError(f"{table}: {place} must be a key or a list of keys")
    return tuple(listed)


def _row(table: str, field: str, spec: object) -> ConfigRow:
    if isinstance(spec, str):
        return ConfigRow(field, spec, None, None)
    if not isinstance(spec, dict) or not isinstance(spec.get("hf"), str) or set(spec) - {"hf", "else", "via"}:
        raise TableError(f"{table}: [config] `{field}` must be a key or {{ hf = …, else = …, via = … }}, got {spec!r}")
    via = spec.get("via")
    if via is not None and via not in VALUE:
        raise TableError(
            f"{table}: [config] `{field}`: via `{via}` is not registered; known: {', '.join(sorted(VALUE))}"
        )
    return ConfigRow(field, spec["hf"], spec.get("else"), via)


def _get(config: Mapping[str, Value], path: str) -> Value:
    value: Value = config
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _set(config: dict[str, Value], path: str, value: Value) -> None:
    *parents, leaf = path.split(".")
    for part in parents:
        child = config.setdefault(part, {})
        if not isinstance(child, dict):
            return
        config = child
    config[leaf] = value


def _near(key: str, known: Collection[str]) -> str:
    close = get_close_matches(key, known, n=1)
    return f" (near `{close[0]}`)" if close else ""
