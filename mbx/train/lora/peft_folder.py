"""Adapters of any folder in a run's model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from converters.adapters.sites import Adapted
from converters.engine.lowrank import Factors, factors_of
from converters.errors import UsageError
from converters.rows.pack import slot_rows
from mbx.formats.adapter_folder import Adapter, Base, open_adapter
from mbx.formats.files import FileSource
from mbx.train.lora.attach import Placed, adapters
from mbx.train.model.blueprint import Blueprint


def load_peft(model: nn.Module, plan: Blueprint, folder: Path) -> None:
    """Fill the adapters of a bare model from a PEFT folder or an adapter checkpoint, each rank its own part.

    Raises UsageError where it adapts other modules, or has another rank, scale or method, than the recipe.
    """
    from mbx.models.megatron.core.groups import parallel_state

    if plan.table is None:
        raise UsageError("an adapter is read by the names of a Hugging Face model", hint="model=DIR")
    adapter = open_adapter(folder, Base(plan.hf or folder, {}, plan.table, plan.config, None))
    by_weight = {found.row.mcore: found for found in adapter.adapted}
    source = FileSource(adapter.root)
    try:
        factors, used = Factors(source, adapter.tensors), set()
        with torch.no_grad():
            own = list(adapters(model))
            for placed in own:
                if placed.weight in by_weight:
                    _check(placed, by_weight[placed.weight], adapter)
            for placed in own:
                used.add(placed.weight)
                _fill(placed, by_weight.get(placed.weight), adapter, factors)
    finally:
        source.close()
    alone = parallel_state.get_pipeline_model_parallel_world_size() * (
        parallel_state.get_expert_model_parallel_world_size()
    )
    if alone == 1 and (extra := sorted(set(by_weight) - used)):
        over = [by_weight[weight] for weight in extra]
        modules = [f"`{name}`" for one in over for site in one.sites for name in one.modules_of(one.row, site)]
        raise UsageError(f"`{folder}` adapts modules that lora.targets does not: {modules[0]}", details=modules)


def _check(placed: Placed, found: Adapted, adapter: Adapter) -> None:
    """UsageError where an adapter's rank, method or scale is not the recipe's."""
    layer = placed.layer
    for site in found.sites:
        if (site.rank, site.m is not None) != (layer.rank, layer.dora):
            raise UsageError(
                f"`{adapter.path}` has r={site.rank}, use_dora={site.m is not None} on `{placed.weight}`; the recipe "
                f"asks for lora.rank={layer.rank}, lora.dora={str(layer.dora).lower()}"
            )
        if (scale := adapter.scales[site.b, site.index]) != layer.scale:
            raise UsageError(
                f"`{adapter.path}` scales by {scale:g}, the recipe by lora.alpha/lora.rank = {layer.scale:g}"
            )


def _fill(placed: Placed, found: Adapted | None, adapter: Adapter, factors: Factors) -> None:
    layer, rank = placed.layer, placed.layer.rank
    if found is None or any(found.site_of(atom) is None for atom in found.form.order()):
        raise UsageError(
            f"`{adapter.path}` has no adapter on all of `{placed.weight}`", hint="name its modules in lora.targets"
        )
    if len(placed.b) == 1 and len(found.form.atoms) > 1:
        if len(found.sites) > 1:
            raise UsageError(f"`{adapter.path}` adapts parts of `{placed.weight}` apart, which is one tensor here")
        groups = [tuple(found.form.order())]
    else:
        groups = [(atom,) for atom in range(len(placed.b))]
    for n, atoms in enumerate(groups):
        first = found.site_of(atoms[0])
        assert first is not None
        a, _ = factors_of(factors, first)
        placed.a[n * rank : (n + 1) * rank].copy_(_mine(a, layer.row_parallel, 1, placed))
        b, m = _rows(found, atoms, factors)
        cut = not layer.row_parallel and not layer.whole
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
