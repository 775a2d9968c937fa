"""What a PEFT `adapter_config.json` says, key by key: a key that nobody knows may change the forward pass.

Source: `LoraConfig` and `get_pattern_key` of PEFT 0.21.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from converters.errors import UnsupportedError, UsageError
from converters.rows.expr import Value

#: Keys that say where an adapter came from, or how it was trained.
_HARMLESS = frozenset(
    """auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config inference_mode lora_dropout
    lora_ga_config megatron_core peft_type peft_version qalora_group_size revision runtime_config task_type
    loftq_config""".split()
)
_READ = frozenset(
    """r lora_alpha use_rslora use_dora rank_pattern alpha_pattern modules_to_save init_lora_weights
    target_modules target_parameters exclude_modules layers_to_transform layers_pattern""".split()
)
#: Starting points that change the base weights: the adapter alone is then not what was trained.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Ranks and scales of an adapter; patterns are regular expressions on the end of a module's name.

    `targets` are the ends of the names of the modules that it is put on, None where any is taken; `layers` the numbers
    of their layers, None for all.
    """

    rank: int
    alpha: float
    rslora: bool = False
    dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    targets: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None

    def is_target(self, module: str) -> bool:
        """Whether PEFT puts the adapter on `module`: the tensors of one that it passes over are never applied."""
        if self.targets is None or module in self.targets:
            return True
        number = re.match(r".*?\.[^.]*\.(\d+)\.", module)
        in_layers = self.layers is None or number is not None and int(number[1]) in self.layers
        return in_layers and any(module.endswith(f".{target}") for target in self.targets)

    def rank_of(self, module: str) -> int:
        """Rank of the adapter on `module`, named as in the base model."""
        return next((rank for key, rank in self.rank_pattern.items() if _fits(key, module)), self.rank)

    def scale_of(self, module: str, rank: int) -> float:
        """What `B A` is multiplied by at a rank: alpha / r, or alpha / √r (arXiv 2312.03732)."""
        alpha = next((value for key, value in self.alpha_pattern.items() if _fits(key, module)), self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def _fits(pattern: str, module: str) -> bool:
    """PEFT's match of a pattern on the end of a module's name, in time linear in both: it is a stranger's."""
    import re2

    try:
        return re2.match(rf"(.*\.)?({pattern})$", module) is not None
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
        raise UnsupportedError(f"adapter_config.json: peft_type is {kind!r}; LORA (with or without DoRA) is read")
    refused = [
        f"`{key}` = {value!r}"
        for key, value in sorted(config.items())
        if key not in _HARMLESS and key not in _READ and not _neutral(key, value)
    ]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        refused.append(f"`init_lora_weights` = {start!r}, which changes the base weights")
    if refused:
        raise UnsupportedError(
            f"adapter_config.json: {refused[0]} is not supported", hint="merge it with PEFT itself", details=refused
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
    )


def _targets(config: Mapping[str, Value]) -> tuple[str, ...] | None:
    """Ends of module names; None for "all-linear", for an expression, and beside adapted parameters."""
    modules = config.get("target_modules")
    if not isinstance(modules, list) or config.get("target_parameters"):
        return None
    return tuple(map(str, modules))


def _layers(config: Mapping[str, Value]) -> tuple[int, ...] | None:
    """Numbers of the adapted layers; None for all, and for layers that are counted under a name of their own."""
    said = config.get("layers_to_transform")
    listed = said if isinstance(said, list) else [said]
    if said is None or said == [] or config.get("layers_pattern"):
        return None
    if any(isinstance(layer, bool) or not isinstance(layer, int) for layer in listed):
        raise UsageError(f"adapter_config.json: `layers_to_transform` = {said!r}; numbers of layers were expected")
    return tuple(layer for layer in listed if isinstance(layer, int))


def _neutral(key: str, value: Value) -> bool:
    return not value or (key == "bias" and value == "none")


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
