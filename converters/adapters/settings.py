"""What a PEFT `adapter_config.json` says, key by key: a key that nobody knows may change the forward pass.

Source: `LoraConfig` and `get_pattern_key` of PEFT 0.21.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from converters.errors import UnsupportedError, UsageError
from converters.rows.config_spelling import is_provenance
from converters.rows.expr import Value

#: Keys that say where an adapter came from, or how it was trained; and `fan_in_fan_out`, set by PEFT itself where the
#: base stores its weights the other way round (GPT-2), as its table says.
_HARMLESS = frozenset(
    """auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config inference_mode lora_dropout
    lora_ga_config megatron_core peft_type peft_version qalora_group_size revision runtime_config task_type
    loftq_config fan_in_fan_out""".split()
)
_READ = frozenset(
    """r lora_alpha use_rslora use_dora rank_pattern alpha_pattern modules_to_save init_lora_weights
    target_modules target_parameters exclude_modules layers_to_transform layers_pattern trainable_token_indices
    ensure_weight_tying bias""".split()
)
#: Starting points that change the base weights: the adapter alone is then not what was trained.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
#: Which of the base's biases are trained beside the factors: PEFT stores them whole.
_BIASES = (None, "none", "all", "lora_only")

_MERGE = "merge it with PEFT itself: `merge_and_unload`, then `save_pretrained`"


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Ranks and scales of an adapter; patterns are regular expressions on the end of a module's name.

    `targets` are the ends of the names of the modules that it is put on, or one expression for whole names, None where
    any is taken; `excluded` likewise what it is kept off, and `layers` the numbers of their layers, None for all.
    `trainable_tokens` are rows of an embedding that are replaced, by the end of its name; `tied` says that embedding
    and head stay one, `biases` that some of the base's are trained.
    """

    rank: int
    alpha: float
    rslora: bool = False
    dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    targets: tuple[str, ...] | str | None = None
    layers: tuple[int, ...] | None = None
    excluded: tuple[str, ...] | str | None = None
    trainable_tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tied: bool = False
    biases: bool = False

    def is_target(self, module: str) -> bool:
        """Whether PEFT puts the adapter on `module`: the tensors of one that it passes over are never applied."""
        if self.excluded is not None and _names(self.excluded, module):
            return False
        if self.targets is None or isinstance(self.targets, str):
            return self.targets is None or _names(self.targets, module)
        if module in self.targets:
            return True
        number = re.match(r".*?\.[^.]*\.(\d+)\.", module)
        in_layers = self.layers is None or number is not None and int(number[1]) in self.layers
        return in_layers and any(module.endswith(f".{target}") for target in self.targets)

    def rank_of(self, module: str) -> int:
        """Rank of the adapter on `module`, named as in the base model."""
        return next((rank for key, rank in self.rank_pattern.items() if _fits(key, module)), self.rank)

    def alpha_of(self, module: str) -> float:
        """Alpha of the adapter on `module`."""
        return next((value for key, value in self.alpha_pattern.items() if _fits(key, module)), self.alpha)

    def scale_of(self, module: str, rank: int) -> float:
        """What `B A` is multiplied by at a rank: alpha / r, or alpha / √r (arXiv 2312.03732)."""
        alpha = self.alpha_of(module)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def _names(names: tuple[str, ...] | str, module: str) -> bool:
    """Whether an expression is all of a module's name, or one of several names is it or its end."""
    if isinstance(names, str):
        return _matches(names, module)
    return any(module == name or module.endswith(f".{name}") for name in names)


def _fits(pattern: str, module: str) -> bool:
    """PEFT's match of a pattern on the end of a module's name, or of the name of its weight where that is adapted as a
    parameter."""
    return any(_matches(rf"(.*\.)?({pattern})", name) for name in (module, f"{module}.weight"))


def _matches(pattern: str, module: str) -> bool:
    """Whether an expression is all of a module's name, in time linear in both: it is a stranger's."""
    import re2

    try:
        return re2.fullmatch(pattern, module) is not None
    except re2.error as error:
        said = error.args[0].decode() if error.args and isinstance(error.args[0], bytes) else str(error)
        raise UsageError(
            f"adapter_config.json: {pattern!r} is no regular expression that is matched in linear time: {said}",
            hint="look-around and back references are not; PEFT writes plain names",
        ) from error


def parse_settings(config: Mapping[str, Value]) -> LoraSettings:
    """Settings of an `adapter_config.json`; UnsupportedError names every key that cannot be honoured."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(
            f"adapter_config.json: peft_type is {kind!r}; LORA (with or without DoRA) is read", hint=_MERGE
        )
    refused = [
        f"`{key}` = {value!r}"
        for key, value in sorted(config.items())
        if key not in _HARMLESS and key not in _READ and not is_provenance(key) and value
    ]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        refused.append(f"`init_lora_weights` = {start!r}, which changes the base weights")
    if config.get("bias") not in _BIASES:
        refused.append(f"`bias` = {config['bias']!r}")
    if config.get("fan_in_fan_out") and config.get("use_dora"):
        refused.append("`fan_in_fan_out` with `use_dora`")
    if refused:
        raise UnsupportedError(
            f"adapter_config.json: {refused[0]} is not supported",
            hint=_MERGE,
            details=refused,
        )
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list):
        raise UsageError(f"adapter_config.json: `modules_to_save` = {saved!r}; a list was expected")
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise UsageError(f"adapter_config.json: `r` = {rank!r}; a whole number of at least 1 was expected")
    return LoraSettings(
        rank,
        _number("lora_alpha", alpha),
        bool(config.get("use_rslora")),
        bool(config.get("use_dora")),
        {key: _whole(key, value) for key, value in _pattern(config, "rank_pattern").items()},
        {key: _number(key, value) for key, value in _pattern(config, "alpha_pattern").items()},
        tuple(map(str, saved)),
        _targets(config),
        _layers(config),
        _excluded(config),
        _trainable_tokens(config),
        bool(config.get("ensure_weight_tying")),
        config.get("bias") in ("all", "lora_only"),
    )


def _targets(config: Mapping[str, Value]) -> tuple[str, ...] | str | None:
    """Ends of module names, or an expression; None for "all-linear", and beside adapted parameters."""
    modules = config.get("target_modules")
    if config.get("target_parameters") or modules == "all-linear":
        return None
    if isinstance(modules, str):
        return modules if _is_linear(modules) else None
    return tuple(map(str, modules)) if isinstance(modules, list) else None


def _excluded(config: Mapping[str, Value]) -> tuple[str, ...] | str | None:
    """Ends of the names of modules that are passed over, or an expression."""
    modules = config.get("exclude_modules")
    if isinstance(modules, str) and modules:
        return modules
    return tuple(map(str, modules)) if isinstance(modules, list) and modules else None


def _is_linear(pattern: str) -> bool:
    """Whether an expression can be matched in linear time: trainers write look-aheads, of which the tensors speak."""
    try:
        _matches(pattern, "")
    except UsageError:
        return False
    return True


def _trainable_tokens(config: Mapping[str, Value]) -> dict[str, tuple[int, ...]]:
    """Rows by the end of the embedding's name; PEFT's name where a list alone is given."""
    said = config.get("trainable_token_indices")
    named = said if isinstance(said, Mapping) else {} if said is None else {"embed_tokens": said}
    out = {}
    for name, rows in named.items():
        whole = [row for row in rows if type(row) is int and row >= 0] if isinstance(rows, list) else []
        if not isinstance(rows, list) or len(set(whole)) != len(rows):
            raise UsageError(
                f"adapter_config.json: `trainable_token_indices` of {name} = {rows!r}"[:300]
                + "; a list of different token ids was expected"
            )
        out[str(name)] = tuple(whole)
    return out


def _layers(config: Mapping[str, Value]) -> tuple[int, ...] | None:
    """Numbers of the adapted layers; None for all, and for layers that are counted under a name of their own."""
    said = config.get("layers_to_transform")
    listed = said if isinstance(said, list) else [said]
    if said is None or said == [] or config.get("layers_pattern"):
        return None
    if any(isinstance(layer, bool) or not isinstance(layer, int) for layer in listed):
        raise UsageError(f"adapter_config.json: `layers_to_transform` = {said!r}; numbers of layers were expected")
    return tuple(layer for layer in listed if isinstance(layer, int))


def _pattern(config: Mapping[str, Value], key: str) -> Mapping[str, Value]:
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise UsageError(f"adapter_config.json: `{key}` = {value!r}; an object was expected")
    return value


def _number(key: str, value: Value) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"adapter_config.json: `{key}` = {value!r}; a number was expected")
    return value


def _whole(key: str, value: Value) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"adapter_config.json: rank_pattern `{key}` = {value!r}; a whole number was expected")
    return value
