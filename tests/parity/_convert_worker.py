"""Load what mbx wrote into real Megatron Core: `_convert_worker.py RANK WORLD WORKDIR FAMILY…`.

Runs in processes of its own, as process groups are process-wide; rank 0 writes what it saw to `WORKDIR/found.pt`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from mbx.formats.hf import read_config
from mbx.models.device import Spread
from mbx.models.megatron.build import build_model
from mbx.models.megatron.core.cpu import megatron_on_cpu
from mbx.models.megatron.processes import process_group
from mbx.tables import table_for
from tests.judge import load_torch_dist, save_torch_dist
from tests.oracles import hf_logits, mcore_logits

TINY = Path(__file__).resolve().parents[2] / "fixtures" / "tiny"


def pack_plainly(model: torch.nn.Module, groups: int) -> None:
    """Lay q, k and v side by side instead of group by group."""
    for name, weight in model.named_parameters():
        if name.endswith("linear_qkv.weight"):
            per_group = weight.data.reshape(groups, -1, weight.shape[1])
            head = per_group.shape[1] // 4
            parts = per_group.split([2 * head, head, head], 1)
            weight.data = torch.cat([p.reshape(-1, weight.shape[1]) for p in parts])


def swap_halves(model: torch.nn.Module) -> None:
    """Exchange gate and up."""
    for name, weight in model.named_parameters():
        if name.endswith("linear_fc1.weight"):
            weight.data = torch.cat(weight.data.chunk(2)[::-1])


def main(rank: int, world: int, work: Path, families: list[str]) -> None:
    """Compare each family's logits at this tensor parallel size, and on one rank plant three defects."""
    torch.set_num_threads(1)
    found: dict[str, float] = {}
    store = work / "store" if world > 1 else None
    with megatron_on_cpu(), process_group(Spread(tp=world), rank=rank, world_size=world, init_file=store):
        for family in families:
            hf_config = read_config(TINY / family)
            config = table_for(hf_config).config.to_mcore(hf_config)
            vocab, groups = int(str(config["model.vocab_size"])), int(str(config["num_query_groups"]))
            ids = torch.randint(0, vocab, (2, 40), generator=torch.Generator().manual_seed(0))
            reference = hf_logits(TINY / family, ids)
            padded = -(-vocab // world) * world
            model = build_model(config, Spread(tp=world), padded_vocab_size=padded)
            load_torch_dist(model, work / family / "iter_0000000")

            def distance(module: torch.nn.Module, ids=ids, vocab=vocab, reference=reference) -> float:  # type: ignore[no-untyped-def]
                return float((mcore_logits(module, ids, vocab_size=vocab) - reference).abs().max())

            found[family] = distance(model)
            save_torch_dist(model, work / f"{family}.saved" / "iter_0000000")
            if world == 1:
                swap_halves(model)
                found[f"{family}.swapped"] = distance(model)
                swap_halves(model)
                pack_plainly(model, groups)
                found[f"{family}.plain_qkv"] = distance(model)
                wrong = build_model({**config, "model.rotary_base": 500.0}, padded_vocab_size=padded)
                load_torch_dist(wrong, work / family / "iter_0000000")
                found[f"{family}.wrong_theta"] = distance(wrong)
    if rank == 0:
        torch.save(found, work / "found.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
