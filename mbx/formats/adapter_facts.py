"""What an adapter is, from its headers alone: no base model is needed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from converters.adapters.megatron import MARKS
from converters.adapters.peft_keys import NESTED, parse_key
from converters.tensors import Shape
from mbx.formats.adapter_folder import BESIDE, stated
from mbx.formats.checkpoint import Checkpoint
from mbx.formats.peft import CONFIG
from mbx.untrusted.small_files import read_json

_A = re.compile(r"^(.+?)\.(?:adapter\.(?:adapter_(\w+)\.)?linear_in\.weight|lora_a)$")


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """An adapter's method, the ranks of its factors, its alpha, what it adapts, and the base it names.

    `ranks` are those of single factors; a factor that holds several is not taken apart.
    """

    method: str
    ranks: tuple[int, ...]
    alpha: float | None
    targets: tuple[str, ...]
    base: str | None


def describe(opened: Checkpoint) -> AdapterFacts | None:
    """Facts of a PEFT folder, or of the adapters in a Megatron checkpoint; None where it holds none.

    StorageError for a config that cannot be read, or where nothing says an adapter's alpha.
    """
    shapes = {name: tensor.shape for name, tensor in opened.tensors.items()}
    if opened.spelling == "peft":
        config = read_json(opened.home / CONFIG)
        targets, ranks = _of_peft(config, shapes)
    elif any(mark in name for name in shapes for mark in MARKS):
        beside = opened.home / BESIDE / CONFIG
        config = read_json(beside) if beside.is_file() else stated(opened)
        targets, ranks = _of_megatron(shapes)
    else:
        return None
    dora = any("magnitude" in name or ".lora_m" in name for name in shapes)
    alpha, base = config.get("lora_alpha"), config.get("base_model_name_or_path")
    return AdapterFacts(
        "DoRA" if dora else "LoRA",
        tuple(sorted(ranks)),
        alpha if isinstance(alpha, int | float) else None,
        tuple(sorted(targets)),
        str(base) if base else None,
    )


def _of_peft(config: Mapping[str, object], shapes: Mapping[str, Shape]) -> tuple[set[str], set[int]]:
    """What a PEFT folder adapts, and the ranks."""
    found = [key for name in shapes if (key := parse_key(name)) and key.part in ("a", "b", "m")]
    pattern, parameters = config.get("rank_pattern") or {}, config.get("target_parameters")
    ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, Mapping) else ())]
    named = {str(name).rpartition(".")[2] for name in parameters} if isinstance(parameters, list) else set[str]()
    modules = {key.module.replace(NESTED, "").rpartition(".")[2] for key in found} - ({"experts"} if named else set())
    return modules | named, {rank for rank in ranks if isinstance(rank, int)}


def _of_megatron(shapes: Mapping[str, Shape]) -> tuple[set[str], set[int]]:
    """What the adapters of a Megatron checkpoint adapt, and the ranks."""
    targets, ranks = set[str](), set[int]()
    for name, shape in shapes.items():
        if match := _A.match(name):
            targets.add(match[1].rpartition(".")[2] + (f" ({match[2]})" if match[2] else ""))
            apart = [own for key, own in shapes.items() if key.startswith(f"{match[1]}.lora_b")]
            ranks |= {own[-1] for own in apart} or {shape[-2]}
    return targets, ranks
