"""Adapters of any folder in a run's model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from converters.adapters.sites import Adapted
from converters.adapters.vocabulary import adapts_head
from converters.engine.lowrank import Factors, factors_of
from converters.errors import UsageError
from converters.mcore.keys import HEAD
from converters.rows.pack import slot_rows
from mbx.formats.adapter_folder import Adapter, Base, open_adapter
from mbx.formats.files import FileSource
from mbx.formats.hf import has_weights
from mbx.formats.registry import open_hf
from mbx.models.stored import read_whole
from mbx.run.adapter_vocabulary import is_named, vocabulary
from mbx.train.lora.attach import Placed, adapters
from mbx.train.lora.whole import modules_of
from mbx.train.model.adapted import adapted, key_of
from mbx.train.model.blueprint import Blueprint
from mbx.train.model.trained_whole import whole_layers
from mbx.train.recipe.sections import Lora


def open_for(plan: Blueprint, folder: Path) -> Adapter:
    """An adapter of any kind, matched with a run's model; UsageError where that has no names to match by.

    Where PEFT adapts the output layer it saves the vocabulary's layers as well: copies of the base's are left out.
    """
    if plan.table is None:
        raise UsageError("an adapter is read by the names of a Hugging Face model", hint="model=DIR")
    base = Base(plan.hf or folder, {}, plan.table, plan.config, None)
    sees = plan.hf is not None and plan.table.beside and has_weights(plan.hf)
    adapter = open_adapter(folder, base, open_hf(plan.hf).tensors if sees and plan.hf else ())
    asked = adapter.settings.modules_to_save
    copied = [name for name in adapter.saved if not any(is_named(module, name) for module in asked)]
    if plan.hf is None or not copied or not adapts_head(adapter.adapted):
        return adapter
    same = _of_base(adapter, copied, plan.hf, vocabulary(plan.table, plan.config))
    return replace(adapter, saved={name: tensor for name, tensor in adapter.saved.items() if name not in same})


def _of_base(adapter: Adapter, copied: Sequence[str], base: Path, layers: Mapping[str, tuple[str, ...]]) -> set[str]:
    """Which of an adapter's whole tensors are the base's in the adapter's precision."""
    opened = open_hf(base)
    theirs, mine = opened.source, FileSource(adapter.root)
    try:
        same = set()
        for name in copied:
            alike = next((names for names in layers.values() if name in names), (name,))
            stored = next((opened.tensors[own] for own in alike if own in opened.tensors), None)
            if stored is None or stored.shape != adapter.saved[name].shape:
                continue
            own = read_whole(adapter.saved[name], mine)
            if torch.equal(own, read_whole(stored, theirs).to(own.dtype)):
                same.add(name)
        return same
    finally:
        theirs.close()
        mine.close()


def by_weight(adapter: Adapter) -> dict[str, Adapted]:
    """What an adapter adapts, by the names of the weights."""
    return {found.row.mcore: found for found in adapter.adapted}


def like_adapter(lora: Lora, adapter: Adapter) -> Lora:
    """A recipe's adapters with the ranks and scales of the one that they start from.

    UsageError where the recipe asks for others; patterns that it does not give are the adapter's.
    """
    said = adapter.settings
    asked = {"rank": lora.rank, "alpha": lora.alpha, "dora": lora.dora}
    has = {"rank": said.rank, "alpha": said.alpha, "dora": said.dora}
    if other := [key for key, value in asked.items() if has[key] != value]:
        wanted = ", ".join(f"lora.{key}={str(asked[key]).lower()}" for key in other)
        raise UsageError(
            f"`{adapter.path}` has r={said.rank}, lora_alpha={said.alpha:g}, use_dora={said.dora}; "
            f"the recipe asks for {wanted}",
            hint=" ".join(f"lora.{key}={str(has[key]).lower()}" for key in other),
        )
    return replace(
        lora,
        rslora=said.rslora,
        modules_to_save=lora.modules_to_save or modules_of(adapter),
        rank_pattern=lora.rank_pattern or dict(said.rank_pattern),
        alpha_pattern=lora.alpha_pattern or dict(said.alpha_pattern),
    )


def check_adapter(lora: Lora, plan: Blueprint, adapter: Adapter) -> None:
    """UsageError where an adapter adapts, or holds whole, what the recipe leaves out, or replaces single rows."""
    towers = plan.table.beside if plan.table is not None and lora.tower_targets else ()
    if names := sorted({*adapter.rows, *(name for name in adapter.as_stored if not name.startswith(towers))}):
        what = "replaces rows of" if adapter.rows else "adapts"
        raise UsageError(
            f"`{adapter.path}` also {what} `{names[0]}`, which no training takes",
            hint=f"merge it into the base and start from that: `mbx convert merge BASE {adapter.path} DST`",
            details=names,
        )
    whole = whole_layers(lora, plan).names
    if lost := sorted(set(adapter.saved) - {name for names in whole.values() for name in names}):
        raise UsageError(f"`{adapter.path}` holds `{lost[0]}`, which lora.modules_to_save leaves out", details=lost)
    held = by_weight(adapter)
    taken = adapted(lora, plan, held)
    left = []
    for weight, found in held.items():
        linear = taken.get(key_of(weight))
        atoms = {atom for part in linear.parts for atom in part.atoms} if linear else set[int]()
        sites = [site for site in found.sites if not set(site.atoms) & atoms]
        left += [f"`{name}`" for site in sites for name in found.modules_of(found.row, site)]
    if left:
        raise UsageError(f"`{adapter.path}` adapts modules that lora.targets does not: {left[0]}", details=left)


def load_peft(model: nn.Module, adapter: Adapter) -> None:
    """Fill the adapters of a bare model from a PEFT folder or an adapter checkpoint, each rank its own part."""
    source, held = FileSource(adapter.root), by_weight(adapter)
    try:
        factors = Factors(source, adapter.tensors)
        with torch.no_grad():
            for placed in adapters(model):
                if (found := held.get(placed.weight)) is None:
                    raise UsageError(f"`{adapter.path}` has no adapter of `{placed.weight}`, and of other experts")
                _check(placed, found, adapter)
                _fill(placed, found, factors)
    finally:
        source.close()


def _check(placed: Placed, found: Adapted, adapter: Adapter) -> None:
    """UsageError where an adapter's rank or scale is not the recipe's."""
    slots = placed.layer.slots
    for name, (_, _, part) in zip(slots.names, slots.places, strict=True):
        site = found.site_of(int(name or 0))
        assert site is not None
        rank, scale = slots.ranks[part], slots.scales[part]
        has = site.rank, adapter.scales[site.b, site.index], site.m is not None
        if has != (wanted := (rank, scale, placed.layer.dora)):
            raise UsageError(
                f"`{adapter.path}` has (rank, scale, use_dora) {has} on `{placed.weight}`; "
                f"the recipe asks for {wanted}"
            )


def _fill(placed: Placed, found: Adapted, factors: Factors) -> None:
    layer, slots = placed.layer, placed.layer.slots
    for n, (name, (_, _, part)) in enumerate(zip(slots.names, slots.places, strict=True)):
        atoms = (int(name),) if name else tuple(found.form.order())
        first = found.site_of(atoms[0])
        assert first is not None
        a, _ = factors_of(factors, first)
        start = slots.first(part)
        placed.a[start : start + slots.ranks[part]].copy_(_mine(a, layer.row_parallel, 1, placed))
        b, m = _rows(found, atoms, factors)
        cut = not layer.row_parallel and not layer.whole
        if placed.weight == HEAD:  # rows that pad the vocabulary
            missing = len(placed.b[n]) * layer.group.size() - len(b)
            b = torch.cat((b, b.new_zeros(missing, b.shape[1])))
        placed.b[n].copy_(_mine(b, cut, 0, placed, len(atoms)))
        if placed.m and m is not None:
            placed.m[n].copy_(_mine(m, cut, 0, placed, len(atoms)))


def _rows(found: Adapted, atoms: tuple[int, ...], factors: Factors) -> tuple[torch.Tensor, torch.Tensor | None]:
    """B and m of some atoms: as they are for one, in Megatron Core's order for all of a weight."""
    order = dict(zip(found.form.order(), found.form.mcore_pack().slots(), strict=True))
    sites = [(site, atom) for atom in atoms if (site := found.site_of(atom)) is not None]
    parts = [(site, torch.from_numpy(slot_rows(site.rows()[atom]))) for site, atom in sites]
    b, m = torch.cat([factors_of(factors, site)[1][rows] for site, rows in parts]), None
    if sites[0][0].m is not None:
        m = torch.cat([factors.matrix(site.m or "", site.index)[rows, 0] for site, rows in parts])
    if len(atoms) > 1:
        back = torch.argsort(torch.cat([torch.from_numpy(slot_rows(order[atom])) for atom in atoms]))
        b, m = b[back], None if m is None else m[back]
    return b, m


def _mine(tensor: torch.Tensor, cut: bool, dim: int, placed: Placed, atoms: int = 1) -> torch.Tensor:
    """This rank's part of a tensor; gate and up that lie together are cut one by one."""
    group = placed.layer.group
    if not cut or group.size() == 1:
        return tensor
    if atoms > 1 and placed.layer.slots.gated:
        return torch.cat([part.chunk(group.size(), dim)[group.rank()] for part in tensor.chunk(2, dim)])
    return tensor.chunk(group.size(), dim)[group.rank()]
