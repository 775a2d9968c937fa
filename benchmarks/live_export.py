"""How long a live model's weights take out of it, and in how much memory: one JSON line, from rank 0.

    torchrun --nproc-per-node 2 benchmarks/live_export.py FOLDER --ep 2 [--device cuda] [--bridge]

FOLDER is a Hugging Face folder, or one with config.json alone; values are random. `peak_bytes` is what the second of
two exports took beside the model, at most (GPUs only). `--bridge` times Megatron-Bridge's `export_hf_weights` of the
same model behind it, where it is installed. It has not been run on GPUs yet.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

BUCKET = 1 << 30


def timed(call: Callable[[], object], cuda: bool) -> float:
    """Seconds of a collective call, until all ranks are done."""
    torch.distributed.barrier()
    began = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize()
    torch.distributed.barrier()
    return time.perf_counter() - began


def drain(pairs: Iterator[tuple[str, torch.Tensor | None]]) -> int:
    """Bytes of what this rank received."""
    return sum(0 if tensor is None else tensor.nbytes for _, tensor in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for axis in ("tp", "pp", "ep", "etp"):
        parser.add_argument(f"--{axis}", type=int, default=1)
    parser.add_argument("--bucket", type=int, default=BUCKET)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--bridge", action="store_true")
    given = parser.parse_args()

    from converters.mcore.layout import Layout
    from mbx.formats.hf import read_config
    from mbx.live import attach
    from mbx.models.device import Spread
    from mbx.models.megatron.build import build_model
    from mbx.models.megatron.processes import megatron_on
    from mbx.tables import table_for

    cuda = given.device == "cuda"
    spread = Spread(given.tp, given.pp, given.ep, given.device, "bf16", given.etp)
    config = read_config(given.folder)
    with megatron_on(spread):
        fields = table_for(config).config.to_mcore(config)
        padded = Layout(given.tp).padded_vocab(int(str(fields["model.vocab_size"])))
        chunks = [build_model(fields, spread, use_te=cuda, padded_vocab_size=padded)]
        found: dict[str, object] = {"model": given.folder.name, "ranks": torch.distributed.get_world_size()}
        began = time.perf_counter()
        live = attach(chunks, given.folder)
        found["attach_s"] = time.perf_counter() - began
        found["tensors"], found["bytes"] = len(live.spec()), sum(spec.nbytes for spec in live.spec())
        for name in ("first_s", "export_s"):
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
            found[name] = timed(lambda: drain(live.export(given.bucket)), cuda)
        if cuda:
            found["peak_bytes"] = torch.cuda.max_memory_allocated() - held
        found["one_s"] = timed(lambda: drain(live.export(given.bucket, to=0)), cuda)
        found["stage_s"] = timed(lambda: drain(live.export(given.bucket, to="stage")), cuda)
        snapshot = live.snapshot()
        found["changed_s"] = timed(lambda: list(live.changed_since(snapshot)), cuda)
        if given.bridge:
            from megatron.bridge import AutoBridge

            bridge = AutoBridge.from_hf_pretrained(given.folder)
            found["bridge_s"] = timed(lambda: drain(bridge.export_hf_weights(chunks, show_progress=False)), cuda)
        if torch.distributed.get_rank() == 0:
            print(json.dumps(found))


if __name__ == "__main__":
    main()
