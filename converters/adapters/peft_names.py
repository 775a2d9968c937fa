"""PEFT's spelling: `base_model.model.MODULE.lora_A.weight` and its companions, read and named.

Adapters on parameters that hold all experts hang on the module that owns them. Where both of a module's are adapted,
the first one lies deeper: `experts.base_layer.lora_A.weight` is gate_up_proj's, `experts.lora_A.weight` down_proj's.
Source: `get_peft_model_state_dict` and `ParamWrapper` of PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from converters.adapters.settings import LoraSettings
from converters.adapters.sites import Adapted, form_of, is_weight, spellings
from converters.engine.lowrank import Site
from converters.errors import CoverageError, UnsupportedError
from converters.rows.expr import Env
from converters.rows.ops import Form
from converters.rows.shapes import expected_shape
from converters.rows.table import Row, Table
from converters.tensors import Shape, StoredTensor

PREFIX = "base_model.model."
_NESTED = ".base_layer"
#: Modules that PEFT saves with the adapter where they are adapted or resized.
_VOCABULARY = ("embed_tokens", "lm_head")
_KINDS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_magnitude_vector": "m",
    ".lora_magnitude_vector.weight": "m",
}


@dataclass(frozen=True, slots=True)
class Module:
    """The tensors that adapt one module (or parameter) of the base model."""

    name: str
    a: StoredTensor
    b: StoredTensor
    m: StoredTensor | None = None


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """What `read_peft` found; `saved` are whole tensors of `modules_to_save`, by their name in the base model.

    `scales` are what each `B A` is multiplied by, by the name and the entry of B.
    """

    adapted: tuple[Adapted, ...]
    saved: Mapping[str, StoredTensor] = field(default_factory=dict)
    scales: Mapping[tuple[str, Shape], float] = field(default_factory=dict)


def modules_of(tensors: Mapping[str, StoredTensor], settings: LoraSettings) -> tuple[dict[str, Module], list[str]]:
    """Adapted modules by name, and the tensors that are no factor of any.

    Raises UnsupportedError for factors that are not read, CoverageError where one of a pair is missing.
    """
    parts: dict[str, dict[str, StoredTensor]] = {}
    other = []
    for key, tensor in tensors.items():
        suffix = next((suffix for suffix in _KINDS if key.startswith(PREFIX) and key.endswith(suffix)), None)
        if suffix is None:
            other.append(key)
        else:
            parts.setdefault(key[len(PREFIX) : -len(suffix)], {})[_KINDS[suffix]] = tensor
    if odd := [key for key in other if ".lora_" in key]:
        raise UnsupportedError(f"`{odd[0]}` is no factor of a linear: such adapters are not read", details=odd)
    if passed := [name for name in parts if not settings.is_target(name)]:
        raise CoverageError(
            f"adapter: {len(passed)} of {len(parts)} adapted modules are no target by adapter_config.json, first "
            f"`{passed[0]}`",
            hint="PEFT would leave their tensors out: correct target_modules or layers_to_transform, or remove them",
            details=[f"`{name}`" for name in passed],
        )
    found = {}
    for name, held in parts.items():
        wanted = ("a", "b", "m") if settings.dora else ("a", "b")
        if set(held) != set(wanted):
            raise CoverageError(
                f"`{name}` has {', '.join(sorted(held))} of its tensors {', '.join(wanted)} "
                "(lora_A, lora_B, lora_magnitude_vector)",
                hint="adapter_config.json says use_dora, or does not, against what is stored",
            )
        module = found[name] = Module(name, held["a"], held["b"], held.get("m"))
        if len(module.a.shape) != 2 or len(module.b.shape) != 2 or module.a.shape[0] != module.b.shape[1]:
            raise CoverageError(
                f"`{name}`: lora_A {list(module.a.shape)} and lora_B {list(module.b.shape)} do not multiply"
            )
        if module.m is not None and module.m.shape != module.b.shape[:1]:
            raise CoverageError(f"`{name}`: lora_magnitude_vector has shape {list(module.m.shape)}")
    return found, other


def read_peft(table: Table, env: Env, tensors: Mapping[str, StoredTensor], settings: LoraSettings) -> PeftAdapter:
    """Adapters by the rows of `table` at the config of `env`.

    Raises CoverageError for tensors that adapt nothing the table knows, and for shapes that do not fit.
    """
    modules, other = modules_of(tensors, settings)
    reader = _Reader(table, env, modules, settings)
    adapted = [found for row in table.expand(env, None) if is_weight(row) and (found := reader.match(row))]
    if left := [name for name in modules if name not in reader.used]:
        raise CoverageError(
            f"adapter: {len(left)} of {len(modules)} adapted modules are not in the base model, first `{left[0]}`",
            hint=f"the base's table is `{table.name}`: is it the model that the adapter was trained on?",
            details=[f"`{name}`" for name in left],
        )
    kept = [key for key in other if key.startswith(PREFIX) and _kept(key, settings.modules_to_save)]
    saved = {key[len(PREFIX) :].replace(_NESTED, ""): tensors[key] for key in kept}
    if odd := [key for key in other if key not in kept]:
        raise CoverageError(f"adapter: {len(odd)} tensor(s) are no adapter's, first `{odd[0]}`", details=odd)
    return PeftAdapter(tuple(adapted), saved, reader.scales)


def _kept(key: str, modules: Iterable[str]) -> bool:
    """Whether a tensor is the base's, kept whole: by `modules_to_save`, or because a vocabulary's layer is adapted."""
    vocabulary = any(key.endswith((f".{name}.weight", f".{name}{_NESTED}.weight")) for name in _VOCABULARY)
    return vocabulary or any(f".{module}." in key for module in modules)


class _Reader:
    """Matches rows with modules; `used` are modules that a row took."""

    def __init__(self, table: Table, env: Env, modules: Mapping[str, Module], settings: LoraSettings) -> None:
        self.table, self.env, self.modules, self.settings = table, env, modules, settings
        self.dims, self.num_experts = table.dims_at(env), table.num_experts(env)
        self.used: set[str] = set()
        self.scales: dict[tuple[str, Shape], float] = {}

    def match(self, row: Row) -> Adapted | None:
        for candidate in spellings(self.table, row):
            found = self._together(candidate) if candidate.spec.stacked else self._apart(candidate)
            if found is not None:
                return found
        return None

    def _apart(self, row: Row) -> Adapted | None:
        named = {number: name.removesuffix(".weight") for number, name in enumerate(row.hf)}
        held = {number: self.modules[name] for number, name in named.items() if name in self.modules}
        if not held:
            return None
        form = form_of(row, self.dims, {number: module.b.shape[0] for number, module in held.items()})
        sites = []
        for number, module in held.items():
            self._claim(module, module.name, module.a.shape[0])
            rank, inputs = module.a.shape
            m = None if module.m is None else module.m.name
            pack, members = form.hf_packs()[number], form.hf[number][1]
            sites.append(Site(module.a.name, module.b.name, m, members, pack, rank, inputs))
        self._check_inputs(row, sites)
        return Adapted(row, form, tuple(sites))

    def _together(self, row: Row) -> Adapted | None:
        owner, _, leaf = row.hf[0].rpartition(".")
        levels: list[Module] = []
        while owner + _NESTED * len(levels) in self.modules:
            levels.append(self.modules[owner + _NESTED * len(levels)])
        module = self._level(row, levels)
        if module is None:
            return None
        if len(module.a.shape) != 2 or module.a.shape[0] % self.num_experts:
            raise CoverageError(
                f"`{row.hf[0]}`: lora_A has {module.a.shape[0]} rows, which {self.num_experts} experts cannot share"
            )
        rank = module.a.shape[0] // self.num_experts
        self._claim(module, f"{owner}.{leaf}", rank)
        form = form_of(row, self.dims, {0: module.b.shape[0]})
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
            module = PREFIX + row.hf[0].rpartition(".")[0] + _NESTED * nested
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
