"""What ranks do with a live model beside exporting it; each returns findings as JSON."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from _adapters import by_peft, by_sglang, factors_of
from _copier import Part, copy, sent
from _models import build, differing, fill, parameters, read_folder, same_bytes, scramble
from torch import nn

from converters.errors import MbxError
from mbx.live import Live, attach
from mbx.live.exchange import exchange
from mbx.live.shards import Model, Shard
from mbx.models.device import Spread
from mbx.models.megatron.core.training import DistributedDataParallel, DistributedDataParallelConfig, Float16Module
from mbx.models.megatron.processes import process_group

Found = dict[str, object]
BUCKET = 4096


def weights_in(family: str, spread: Spread, work: Path) -> Found:
    """A live model filled in three ways is the one that Megatron Core fills from a converted checkpoint."""
    folder = work / family
    chunks = build(folder, spread)
    fill(chunks, work / f"{family}.mcore")
    oracle, live = parameters(chunks), attach(chunks, folder)
    found: Found = {}
    tensors = list(read_folder(folder).items())
    random.Random(3).shuffle(tensors)
    for name, source in (("folder", folder), ("checkpoint", work / f"{family}.mcore"), ("pairs", tensors)):
        scramble(chunks)
        found[f"scrambled_{name}"] = len(differing(oracle, chunks)) == len(oracle)
        live.load(iter(source) if isinstance(source, list) else source)
        found[name] = differing(oracle, chunks)
    for name, pairs in (
        ("short", tensors[:-1]),
        ("twice", [*tensors, tensors[0]]),
        ("strange", [*tensors, ("x", tensors[0][1])]),
        ("narrow", [(n, t[:1] if t.dim() else t) for n, t in tensors]),
    ):
        found[name] = refusal(lambda pairs=pairs: live.load(iter(pairs)))
    return found


def weights_out(family: str, spread: Spread, work: Path) -> Found:
    """Saved, the folder comes back to the byte; a rank that cannot write leaves none behind."""
    chunks = build(work / family, spread)
    fill(chunks, work / f"{family}.mcore")
    live = attach(chunks, work / family)
    into = work / f"{family}.{'.'.join(f'{k}{v}' for k, v in spread.sizes.items() if v and v > 1)}.saved"
    live.save(into, bucket=BUCKET)
    found: Found = {"again": refusal(lambda: live.save(into)), "left": sorted(p.name for p in work.glob("*.partial"))}
    failing = work / f"{into.name}.failing"
    if torch.distributed.get_rank() == 1:
        from unittest.mock import patch

        from converters.errors import StorageError
        from mbx.formats.files import FileSink

        with patch.object(FileSink, "write", side_effect=StorageError("no room")):
            found["failing"] = refusal(lambda: live.save(failing, bucket=BUCKET))
    else:
        found["failing"] = refusal(lambda: live.save(failing, bucket=BUCKET))
    torch.distributed.barrier()
    found["absent"] = not failing.exists() and not failing.with_name(failing.name + ".partial").exists()
    return found


def wrapped(family: str, spread: Spread, work: Path) -> Found:
    """A model as it is trained, wrapped twice, and offloaded; and what changes in it."""
    chunks = build(work / family, spread)
    fill(chunks, work / f"{family}.mcore")
    config = DistributedDataParallelConfig(use_distributed_optimizer=False)
    trained = [DistributedDataParallel(c.config, config, Float16Module(c.config, c)) for c in chunks]
    live, folder = attach(trained, work / family), read_folder(work / family)
    found: Found = {"odd": unequal(live, folder)}
    rank = torch.distributed.get_rank()
    snapshot = live.snapshot()
    found["unchanged"] = [one.name for one in live.changed_since(snapshot)]
    name, parameter = next((n, p) for n, p in chunks[0].named_parameters() if n.endswith("linear_qkv.weight"))
    before = parameter.detach().view(-1)[7].clone()
    if rank == 0:
        with torch.no_grad():
            parameter.view(-1)[7] += 1
    found["changed"] = [
        (one.name, one.indices.tolist(), one.values.float().tolist()) for one in live.changed_since(snapshot)
    ]
    if rank == 0:
        with torch.no_grad():
            parameter.view(-1)[7] = before
    values = [{n: p.detach().clone() for n, p in [*c.named_parameters(), *c.named_buffers()]} for c in chunks]
    kept = [p.data for c in chunks for p in c.parameters()]
    for chunk in chunks:
        for p in chunk.parameters():
            p.data = p.data.new_empty(0)
    found["offloaded"] = refusal(lambda: next(live.local()))
    found["odd_offloaded"] = unequal(live, folder, values=values)
    for p, data in zip((p for c in chunks for p in c.parameters()), kept, strict=True):
        p.data = data
    found["odd_back"] = unequal(live, folder)
    other = attach(trained, work / family)
    found["other"] = refusal(lambda: list(other.changed_since(snapshot)))
    owner = chunks[0].get_submodule(name.rpartition(".")[0])
    owner.weight = nn.Parameter(parameter.detach().clone())
    found["rebuilt"] = refusal(lambda: list(live.local()))
    return found


def faults(family: str, spread: Spread, work: Path) -> Found:
    """Models that are not what they are attached to as."""
    folder, found = work / family, Found()
    expected = attached(folder, spread, work).digest(bucket=BUCKET)

    chunks = build(folder, spread)
    chunks[-1].decoder.register_parameter("extra", nn.Parameter(torch.ones(2)))
    found["without_a_row"] = refusal(lambda: attach(chunks, folder))

    chunks = build(folder, spread)
    fill(chunks, work / f"{family}.mcore")
    with torch.no_grad():
        for fc1 in (p for n, p in chunks[0].named_parameters() if "linear_fc1.weight" in n):
            fc1.copy_(torch.cat(fc1.chunk(2)[::-1]))
    got = attach(chunks, folder).digest(bucket=BUCKET)
    found["gate_and_up"] = [name for name, digest in got.items() if digest != expected[name]]

    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    chunks = build(folder, spread)
    fill(chunks, work / f"{family}.mcore")
    experts = [p for n, p in chunks[0].named_parameters() if ".experts." in n]
    for parameter in experts:  # those of the next rank
        every = [torch.empty_like(parameter) for _ in range(size)]
        torch.distributed.all_gather(every, parameter.detach())
        parameter.data.copy_(every[(rank + 1) % size])
    got = attach(chunks, folder).digest(bucket=BUCKET)
    found["other_experts"] = [name for name, digest in got.items() if digest != expected[name]]

    def as_rank_0(shard: Shard) -> Shard:
        """A shard that claims to be of the experts of rank 0."""
        if ".experts." not in shard.key:
            return shard
        depth = shard.stacked - 1
        share = shard.shape[depth] // size
        at = (*shard.offsets[:depth], shard.offsets[depth] % share, *shard.offsets[depth + 1 :])
        return replace(shard, offsets=at)

    found["same_experts"] = refusal(lambda: exchange(list(map(as_rank_0, Model(chunks).base)), ""))
    found["other_folder"] = refusal(lambda: attach(chunks, folder if rank else work / "llama"))
    return found


def heads(family: str, spread: Spread, work: Path) -> Found:
    """A model with its multi-token-prediction layer, without, and with one that got lost."""
    folder = work / family
    live = attached(folder, spread, work)
    found: Found = {"odd": unequal(live, read_folder(folder)), "left_with": live.left_out}
    chunks = build(folder, spread)
    chunks[-1].mtp.layers = nn.ModuleList()
    found["dropped"] = refusal(lambda: attach(chunks, folder))
    chunks = build(folder, spread, mtp_num_layers=None)
    live = attach(chunks, folder)
    found["left_without"] = live.left_out
    found["names_without"] = [spec.name for spec in live.spec()]
    live.load(folder)
    found["odd_without"] = unequal(live, read_folder(folder))
    live.save(work / f"{family}.headless")
    return found


def adapted(family: str, spread: Spread, work: Path) -> Found:
    """Adapters of `mbx train`, streamed without the base, and merged; PEFT and the products say what is right."""
    from mbx.train.lora.attach import attach as put_on
    from mbx.train.model.blueprint import blueprint
    from mbx.train.recipe.parse import parse_recipe

    targets = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
    parallel = {"tp": spread.tp, "pp": spread.pp, "ep": spread.ep}
    recipe = parse_recipe(
        {
            "model": {"path": str(work / family), "vocab_divisor": 1},
            "data": {"kind": "pattern", "length": 32},
            "train": {"steps": 1},
            "parallel": parallel,
            "lora": {"rank": 4, "alpha": 8.0, "targets": targets},
            "run": {"dir": str(work / "run"), "device": "cpu"},
        }
    )
    chunks = build(work / family, spread)
    fill(chunks, work / f"{family}.mcore")
    found: Found = {"without": refusal(lambda: list(attach(chunks, work / family).adapters()))}
    for chunk in chunks:
        put_on(chunk, recipe.lora, blueprint(recipe), seed=5)
    live, folder = attach(chunks, work / family), read_folder(work / family)
    given = dict(live.adapters())
    shapes, generator = {name: t.shape for name, t in given.items()}, torch.Generator().manual_seed(1)
    factors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    for held in live.held_adapters():
        held.fill(factors[held.name][held.index])
    found["odd"] = [name for name, tensor in live.adapters(bucket=BUCKET) if not same_bytes(tensor, factors[name])]
    found["names"], found["base"] = list(factors), unequal(live, folder)
    found["vllm"] = [name for name, _ in live.adapters("vllm")]
    merged = dict(live.merged(BUCKET, dtype="fp32"))
    found["sglang"] = by_sglang(dict(live.adapters("sglang")), folder, merged)
    wrong = []
    for name, tensor in folder.items():
        a, b = factors_of(name, factors, experts=8, rank=4)
        total = tensor.float() if a is None or b is None else tensor.float() + (b.float() @ a.float()) * 2.0
        if not torch.allclose(merged[name], total, rtol=1e-6, atol=1e-6):
            wrong.append(name)
    found["wrong"], found["moved"] = wrong, sum(not same_bytes(merged[n], t.float()) for n, t in folder.items())
    if torch.distributed.get_rank() == 0 and family == "llama":
        found["peft"] = by_peft(work, family, factors, merged)
    torch.distributed.barrier()
    return found


def attached(folder: Path, spread: Spread, work: Path) -> Live:
    chunks = build(folder, spread)
    fill(chunks, work / f"{folder.name}.mcore")
    live = attach(chunks, folder)
    live.chunks_kept = chunks  # type: ignore[attr-defined]  # an attachment keeps no model alive
    return live


def boxes_alone(family: str, spread: Spread, work: Path) -> Found:
    """From the given layout to pipeline stages, by what `local` says and nothing else; then back out."""
    from mbx.models.megatron.core.groups import parallel_state

    given = attached(work / family, spread, work)
    parts: list[Part] = sent(given.local())
    every: list[list[Part]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(every, parts)
    parallel_state.destroy_model_parallel()
    other = Spread(pp=2, dtype="bf16")
    parallel_state.initialize_model_parallel(**other.sizes)
    chunks = build(work / family, other)
    live, folder = attach(chunks, work / family), read_folder(work / family)
    before = unequal(live, folder)
    held = list(live.local())
    written = copy([part for own in every for part in own], held)
    wanted = sum(one.view.numel() for one in held)
    return {"before": len(before), "after": unequal(live, folder), "whole": written == wanted}


def unequal(live: Live, folder: dict[str, torch.Tensor], **how: object) -> list[str]:
    return [
        name for name, tensor in live.export(BUCKET, **how) if tensor is None or not same_bytes(tensor, folder[name])
    ]


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except MbxError as error:
        return f"{type(error).__name__}: {error.fact}"
    return ""


JOBS = {job.__name__: job for job in (weights_in, weights_out, wrapped, faults, heads, adapted, boxes_alone)}
__all__ = ["JOBS", "process_group"]
