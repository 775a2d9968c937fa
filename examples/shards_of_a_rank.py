"""Which slice of which tensor each rank of a tensor-parallel group loads: no process group, no model."""

from __future__ import annotations

from pathlib import Path

import mbx

LLAMA = Path(__file__).resolve().parents[1] / "fixtures" / "tiny" / "llama"

job = mbx.plan(LLAMA, "planned", mbx.Options(layout=mbx.Layout(tp=2, pp=2)))
print(f"{job.output_bytes:,} bytes in {len(job.file_sizes)} files; nothing is written by a plan")
for tensor in job.tensors.values():
    print(f"{tensor.name}  {tensor.dtype} {list(tensor.shape)}")
    for chunk in tensor.chunks:
        print(f"    {chunk.file:20} from {list(chunk.offsets)}, {list(chunk.sizes)}")
assert not Path("planned").exists()
