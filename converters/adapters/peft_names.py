"""PEFT's spelling: `base_model.model.MODULE.lora_A.weight` and its companions, read and named.

Adapters on parameters that hold all experts hang on the module that owns them. Where both of a module's are adapted,
the first one lies deeper: `experts.base_layer.lora_A.weight` is gate_up_proj's, `experts.lora_A.weight` down_proj's.
Source: `get_peft_model_state_dict` and `ParamWrapper` of PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from converters.adapters.as_stored import Module, update_of
from converters.adapters.peft_keys import (
    NESTED,
    PREFIX,
    Key,
    Spelling,
    embedding_name,
    parse_keys,
    spelling_of,
    untied,
    weight_beside,
)
from converters.adapters.settings import LoraSettings
from converters.adapters.sites import Adapted, form_of, is_weight, spellings
from converters.engine.lowrank import LowRank, Site
from converters.errors import CoverageError, UnsupportedError
from converters.rows.expr import Env
from converters.rows.ops import Form
from converters.rows.shapes import expected_shape
from converters.rows.table import Row, Table
from converters.tensors import Shape, StoredTensor

_TENSORS = {"a": "lora_A", "b": "lora_B"}
#: Modules that PEFT saves with the adapter where they are adapted or resized.
_VOCABULARY = ("embed_tokens", "lm_head", "embeddings")


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """What `read_peft` found, under the names of the table's rows.

    `saved` are whole tensors that replace the base's, `rows` those that replace some of a tensor's rows, with their
    numbers. `scales` are what each `B A` is multiplied by, by the name and the entry of B. `as_stored` are updates of
    weights that no linear's row carries: the embedding, and modules beside the text model under the base's own names.
    """

    adapted: tuple[Adapted, ...]
    saved: Mapping[str, StoredTensor] = field(default_factory=dict)
    rows: Mapping[str, tuple[StoredTensor, tuple[int, ...]]] = field(default_factory=dict)
    scales: Mapping[tuple[str, Shape], float] = field(default_factory=dict)
    spelling: Spelling = field(default_factory=lambda: Spelling({}))
    as_stored: Mapping[str, LowRank] = field(default_factory=dict)


def _factors_of(
    keys: Mapping[str, Key], tensors: Mapping[str, StoredTensor], settings: LoraSettings
) -> dict[str, dict[str, StoredTensor]]:
    """Factors by the file's name of the module and by part.

    Raises CoverageError where one of a pair is missing, they do not multiply, or PEFT would pass the module over.
    """
    parts: dict[str, dict[str, StoredTensor]] = {}
    for name, key in keys.items():
        if key.part in ("a", "b", "m"):
            parts.setdefault(key.module, {})[key.part] = tensors[name]
    passed = [said for said in parts if not settings.is_target(said)]
    if settings.tied:  # of two that are one, PEFT adapts the other one too
        passed = [said for said in passed if said.rpartition(".")[2] not in _VOCABULARY]
    if passed:
        raise CoverageError(
            f"adapter: {len(passed)} of {len(parts)} adapted modules are no target by adapter_config.json, first "
            f"`{passed[0]}`",
            hint="PEFT would leave their tensors out: correct target_modules, exclude_modules or layers_to_transform, "
            "or remove them",
            details=[f"`{name}`" for name in passed],
        )
    for said, held in parts.items():
        wanted = ("a", "b", "m") if settings.dora else ("a", "b")
        if lacks := [_TENSORS[part] for part in ("a", "b") if part not in held]:
            raise CoverageError(
                f"`{said}`: {' and '.join(lacks)} of the adapter is missing",
                hint="the file is not whole: save the adapter again, on one process where training was sharded",
            )
        if set(held) != set(wanted):
            raise CoverageError(
                f"`{said}` has {', '.join(sorted(held))} of its tensors {', '.join(wanted)} "
                "(lora_A, lora_B, lora_magnitude_vector)",
                hint="adapter_config.json says use_dora, or does not, against what is stored",
            )
        a, b, m = held["a"].shape, held["b"].shape, held.get("m")
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise CoverageError(f"`{said}`: lora_A {list(a)} and lora_B {list(b)} do not multiply")
        if m is not None and m.shape != b[:1]:
            raise CoverageError(f"`{said}`: lora_magnitude_vector has shape {list(m.shape)}")
    return parts


def read_peft(
    table: Table,
    env: Env,
    tensors: Mapping[str, StoredTensor],
    settings: LoraSettings,
    present: Collection[str] = (),
) -> PeftAdapter:
    """Adapters by the rows of `table` at the config of `env`, `present` being the tensors of the base's folder.

    Raises UnsupportedError for factors that are not read, CoverageError for tensors that adapt nothing the table
    knows, and for shapes that do not fit.
    """
    keys, odd = parse_keys(tensors)
    parts = _factors_of(keys, tensors, settings)
    spelling = spelling_of(table, env, parts, present)
    modules = {
        name: Module(name, said, held["a"], held["b"], held.get("m"))
        for said, held in parts.items()
        if (name := spelling.canonical(said)) is not None
    }
    env = untied(env)
    embedding = {key.module for key in keys.values() if key.embeds}
    linears = {name: module for name, module in modules.items() if module.said not in embedding}
    reader = _Reader(table, env, linears, settings)
    adapted = [found for row in table.expand(env, None) if is_weight(row) and (found := reader.match(row))]
    as_stored = reader.as_stored([module for module in modules.values() if module.said in embedding], present)
    if left := [module.said for name, module in modules.items() if name not in reader.used]:
        raise CoverageError(
            f"adapter: {len(left)} of {len(modules)} adapted modules take none by the table `{table.name}`, "
            f"first `{left[0]}`",
            hint="merge it with PEFT itself",
            details=[f"`{name}`" for name in left],
        )
    saved: dict[str, StoredTensor] = {}
    rows: dict[str, tuple[StoredTensor, tuple[int, ...]]] = {}
    for name, key in keys.items():
        module = spelling.canonical(key.module) or key.module
        if key.part == "whole" and _kept(key, settings):
            saved[f"{module}.{key.leaf}"] = tensors[name]
        elif key.part == "rows":
            rows[f"{module}.weight"] = (tensors[name], _tokens(key, tensors[name], settings))
        elif key.part == "whole":
            odd.append(name)
    if odd:
        raise CoverageError(f"adapter: {len(odd)} tensor(s) are no adapter's, first `{odd[0]}`", details=odd)
    return PeftAdapter(tuple(adapted), saved, rows, reader.scales, spelling, as_stored)


def _kept(key: Key, settings: LoraSettings) -> bool:
    """Whether a tensor is the base's, kept whole: by `modules_to_save`, a trained bias, or a vocabulary's, adapted or
    resized."""
    vocabulary = key.leaf == "weight" and key.module.rpartition(".")[2] in _VOCABULARY
    around = key.module.split(".")
    owners = [".".join(around[: depth + 1]) for depth in range(len(around))]
    return (
        vocabulary
        or (key.leaf == "bias" and settings.biases)
        or any(owner.endswith(settings.modules_to_save) for owner in owners)
    )


def _tokens(key: Key, tensor: StoredTensor, settings: LoraSettings) -> tuple[int, ...]:
    """The rows that a tensor of `trainable_token_indices` replaces; CoverageError where it has another number."""
    named = settings.trainable_tokens
    found = next((rows for name, rows in named.items() if f".{key.module}".endswith(f".{name}")), None)
    if found is None or len(tensor.shape) != 2 or tensor.shape[0] != len(found):
        said = "no rows" if found is None else f"{len(found)} rows"
        raise CoverageError(
            f"`{tensor.name}` is {list(tensor.shape)}; trainable_token_indices of adapter_config.json names {said}"
        )
    return found


class _Reader:
    """Matches rows with modules; `used` are modules that a row took."""

    def __init__(self, table: Table, env: Env, modules: Mapping[str, Module], settings: LoraSettings) -> None:
        self.table, self.env, self.modules, self.settings = table, env, modules, settings
        self.num_experts = table.num_experts(env)
        self.used: set[str] = set()
        self.scales: dict[tuple[str, Shape], float] = {}

    def match(self, row: Row) -> Adapted | None:
        for candidate in spellings(self.table, row):
            found = self._together(candidate) if candidate.spec.stacked else self._apart(candidate)
            if found is not None:
                return found
        return None

    def as_stored(self, embeddings: Collection[Module], present: Collection[str]) -> dict[str, LowRank]:
        """Updates of what no linear's row carries, by the name of the weight."""
        found: dict[str, LowRank] = {}
        for module in embeddings:
            if (name := f"{module.name}.weight") != embedding_name(self.table, self.env) or module.m is not None:
                what = "with DoRA" if module.m is not None else "which it is not by the table"
                raise UnsupportedError(
                    f"`{module.said}` is adapted as an embedding, {what}: that is not read",
                    hint="merge it with PEFT itself: `merge_and_unload`, then `save_pretrained`",
                )
            found[name] = self._update(module, embeds=True)
        for module in self.modules.values():
            if module.name not in self.used and (beside := weight_beside(self.table, module.name, present)):
                found[beside] = self._update(module, embeds=False)
        return found

    def _update(self, module: Module, *, embeds: bool) -> LowRank:
        self._claim(module, module.said, module.a.shape[0])
        return update_of(module, self.scales[module.b.name, ()], embeds=embeds)

    def _apart(self, row: Row) -> Adapted | None:
        named = {number: name.removesuffix(".weight") for number, name in enumerate(row.hf)}
        held = {number: self.modules[name] for number, name in named.items() if name in self.modules}
        if not held:
            return None
        form = form_of(
            row, self.table.dims_of(row, self.env), {number: module.b.shape[0] for number, module in held.items()}
        )
        sites = []
        for number, module in held.items():
            self._claim(module, module.said, module.a.shape[0])
            rank, inputs = module.a.shape
            m = None if module.m is None else module.m.name
            pack, members = form.hf_packs()[number], form.hf[number][1]
            sites.append(Site(module.a.name, module.b.name, m, members, pack, rank, inputs))
        self._check_inputs(row, sites)
        return Adapted(row, form, tuple(sites))

    def _together(self, row: Row) -> Adapted | None:
        owner, _, leaf = row.hf[0].rpartition(".")
        levels: list[Module] = []
        while owner + NESTED * len(levels) in self.modules:
            levels.append(self.modules[owner + NESTED * len(levels)])
        module = self._level(row, levels)
        if module is None:
            return None
        if len(module.a.shape) != 2 or module.a.shape[0] % self.num_experts:
            raise CoverageError(
                f"`{row.hf[0]}`: lora_A has {module.a.shape[0]} rows, which {self.num_experts} experts cannot share"
            )
        rank = module.a.shape[0] // self.num_experts
        said = module.said
        while said.endswith(NESTED):
            said = said.removesuffix(NESTED)
        self._claim(module, f"{said}.{leaf}", rank)
        form = form_of(row, self.table.dims_of(row, self.env), {0: module.b.shape[0]})
        assert row.expert is not None
        site = Site(
            module.a.name,
            module.b.name,
            None,
            form.hf[0][1],
            form.hf_packs()[0],
            rank,
            module.a.shape[1],
            expert=row.expert,
            experts=self.num_experts,
        )
        return Adapted(row, form, (site,))

    def _level(self, row: Row, levels: list[Module]) -> Module | None:
        """Which of a module's nested adapters is the row's: by shape, by depth where both parameters have one."""
        wanted = expected_shape(row, self.env)
        assert wanted is not None
        fits = [level for level in levels if (level.b.shape[0], level.a.shape[1]) == wanted]
        if len(fits) == 2:
            return fits[0 if ".linear_fc2." in row.mcore else 1]
        return fits[0] if fits else None

    def _claim(self, module: Module, target: str, rank: int) -> None:
        self.used.add(module.name)
        if (stated := self.settings.rank_of(target)) != rank:
            raise CoverageError(f"`{target}` has rank {rank}; adapter_config.json says {stated}")
        self.scales[module.b.name, ()] = self.settings.scale_of(target, rank)

    def _check_inputs(self, row: Row, sites: Collection[Site]) -> None:
        wanted = expected_shape(row, self.env)
        for site in sites:
            if wanted is not None and wanted[1] not in (None, site.inputs):
                raise CoverageError(
                    f"`{site.a}` has {site.inputs} columns; {wanted[1]} were expected",
                    hint="is this the adapter's base?",
                )


def peft_sites(row: Row, form: Form, adapted: Adapted, experts: int, nested: int) -> tuple[Site, ...]:
    """Sites of the same adapters under PEFT's names; `row` spells the weight as they are to name it, `form` is its.

    `nested` says how many adapters of the same module lie around a parameter's (see the module's text).
    """
    sites = []
    for number, (pack, (_, members)) in enumerate(zip(form.hf_packs(), form.hf, strict=True)):
        source = adapted.site_of(members[0])
        if source is None:
            continue
        if row.spec.stacked and row.expert is not None:
            module = PREFIX + row.hf[0].rpartition(".")[0] + NESTED * nested
            if source.m is not None:
                raise UnsupportedError(f"`{row.hf[0]}`: PEFT has no DoRA on parameters that hold all experts")
        else:
            module, experts = PREFIX + row.hf[number].removesuffix(".weight"), 0
        sites.append(
            Site(
                f"{module}.lora_A.weight",
                f"{module}.lora_B.weight",
                None if source.m is None else f"{module}.lora_magnitude_vector",
                members,
                pack,
                source.rank,
                source.inputs,
                expert=row.expert or 0 if experts else 0,
                experts=experts,
            )
        )
    return tuple(sites)
