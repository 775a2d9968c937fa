"""Feeds a Transformers model in another process with the weights of a live Megatron Core model, bucket by bucket.

    python benchmarks/live_buckets.py FOLDER [--bucket BYTES] [--device cuda]

The trainer holds the model of FOLDER; the engine starts from random weights, and is given one buffer at a time: by
CUDA IPC on a GPU, by shared memory on a CPU. It answers when it has copied, and at the end with the SHA-256 of its
tensors, which must be those that `Live.digest` says.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def engine(folder: str, device: str, inbox: Any, outbox: Any) -> None:
    """A Transformers model that takes whatever buckets come, until None does."""
    import transformers

    from mbx.live import view_of

    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device)
    own = model.state_dict()
    with torch.no_grad():
        while (got := inbox.get()) is not None:
            tensors, data = got
            for spec, at in tensors:
                own[spec.name].copy_(view_of(data, spec, at))
            if device == "cuda":
                torch.cuda.synchronize()
            del data
            outbox.put(len(tensors))
    digests = {
        name: hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes()).hexdigest()
        for name, tensor in own.items()
    }
    outbox.put(digests)


def trained(folder: Path, device: str) -> list[torch.nn.Module]:
    """The trainer's model: here one that was just loaded."""
    from mbx.formats.hf import read_config
    from mbx.models.device import Spread
    from mbx.models.megatron.build import build_model
    from mbx.tables import table_for

    config = read_config(folder)
    spread = Spread(device=device, dtype="bf16")
    return [build_model(table_for(config).config.to_mcore(config), spread, use_te=device == "cuda")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bucket", type=int, default=1 << 30)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = parser.parse_args()

    from mbx.live import attach
    from mbx.models.device import Spread
    from mbx.models.megatron.processes import megatron_on

    context = mp.get_context("spawn")
    inbox, outbox = context.Queue(), context.Queue()
    process = context.Process(target=engine, args=(str(given.folder), given.device, inbox, outbox))
    process.start()
    with megatron_on(Spread(device=given.device)):
        chunks = trained(given.folder, given.device)
        live = attach(chunks, given.folder)
        live.load(given.folder)
        began, sent = time.perf_counter(), 0
        for bucket in live.buckets(given.bucket):
            assert bucket.data is not None
            sent += bucket.data.numel()
            inbox.put((bucket.tensors, bucket.data))
            outbox.get()  # it has copied: the buffer may go
        took = time.perf_counter() - began
        inbox.put(None)
        theirs, ours = outbox.get(), live.digest()
    process.join()
    wrong = [name for name, digest in ours.items() if theirs.get(name) != digest]
    assert not wrong, f"{len(wrong)} tensors differ, first {wrong[0]}"
    print(
        f"{len(ours)} tensors, {sent / 1e6:.1f} MB in {took:.3f} s ({sent / took / 1e9:.2f} GB/s), all digests equal"
    )


if __name__ == "__main__":
    main()
