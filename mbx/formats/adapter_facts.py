"""What an adapter is, from its headers alone: no base model is needed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from converters.adapters.megatron import MARKS
from converters.rows.expr import Value
from converters.tensors import Shape
from mbx.formats.adapter_folder import BESIDE, CONFIG, read_json, stated
from mbx.formats.checkpoint import open_any

_PEFT = re.compile(r"^base_model\.model\.(.+?)((?:\.base_layer)*)\.lora_(A|B|magnitude_vector)(?:\.weight)?$")
_A = re.compile(r"^(.+?)\.(?:adapter\.(?:adapter_(\w+)\.)?linear_in\.weight|lora_a)$")


@dataclass(frozen=True, slots=True)
class Facts:
    """An adapter's method, the ranks of its factors, its alpha, what it adapts, and the base it names.

    `ranks` are those of single factors; a factor that holds several is not taken apart.
    """

    method: str
    ranks: tuple[int, ...]
    alpha: float | None
    targets: tuple[str, ...]
    base: str | None


def describe_peft(path: Path, shapes: Mapping[str, Shape]) -> Facts:
    """Facts of a PEFT folder whose tensors have `shapes`; StorageError for a config that cannot be read."""
    config = read_json(path / CONFIG)
    found = [match for name in shapes if (match := _PEFT.match(name))]
    pattern = config.get("rank_pattern") or {}
    ranks = {config.get("r"), *(pattern.values() if isinstance(pattern, Mapping) else ())}
    parameters = config.get("target_parameters")
    named = {str(name).rpartition(".")[2] for name in parameters} if isinstance(parameters, list) else set[str]()
    modules = {match[1].rpartition(".")[2] for match in found} - ({"experts"} if named else set())
    return _facts(config, _dora(shapes), (rank for rank in ranks if isinstance(rank, int)), modules | named)


def describe_megatron(iteration: Path, shapes: Mapping[str, Shape]) -> Facts | None:
    """Facts of the adapters in a Megatron checkpoint; None where it holds none."""
    if not any(mark in name for name in shapes for mark in MARKS):
        return None
    beside = iteration / BESIDE / CONFIG
    config = read_json(beside) if beside.is_file() else stated(open_any(iteration))
    targets, ranks = set[str](), set[int]()
    for name, shape in shapes.items():
        if match := _A.match(name):
            targets.add(match[1].rpartition(".")[2] + (f" ({match[2]})" if match[2] else ""))
            parts = sum(f"{match[1]}.lora_b{n}" in shapes for n in range(3)) or 1
            ranks.add(shape[-2] // parts)
    return _facts(config, _dora(shapes), ranks, targets)


def _dora(names: Iterable[str]) -> bool:
    return any("magnitude" in name or ".lora_m" in name for name in names)


def _facts(config: Mapping[str, Value], dora: bool, ranks: Iterable[int], targets: Iterable[str]) -> Facts:
    alpha, base = config.get("lora_alpha"), config.get("base_model_name_or_path")
    return Facts(
        "DoRA" if dora else "LoRA",
        tuple(sorted(set(ranks))),
        alpha if isinstance(alpha, int | float) else None,
        tuple(sorted(targets)),
        str(base) if base else None,
    )
