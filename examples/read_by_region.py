"""Read a few rows of a weight under either side's names, whatever lies on the disk."""

from __future__ import annotations

from pathlib import Path

import mbx

LLAMA = Path(__file__).resolve().parents[1] / "fixtures" / "tiny" / "llama"

mbx.convert(LLAMA, "ckpt", mbx.Options(layout=mbx.Layout(tp=2, pp=2), overwrite=True))
with mbx.open(LLAMA) as folder, mbx.open("ckpt") as ckpt:
    print(f"{folder.format} with {folder.architecture}; {ckpt.format}, written by {ckpt.writer}")
    for name in folder.names()[:3]:
        print(f"  {folder.spec(name)}")

    # four rows of queries from the folder, and the same four through the checkpoint's fused, stacked weight
    name = "model.layers.1.self_attn.q_proj.weight"
    rows = folder.read(name, slice(0, 4))
    assert (ckpt.as_hf().read(name, slice(0, 4)) == rows).all()
    print(f"{name}, rows 0 to 3: {rows.shape} {rows.dtype} (bits of bf16), equal on both sides")

    # the other way: Megatron Core's own key, made from three tensors of the folder, without a conversion
    qkv = folder.as_mcore().read("decoder.layers.self_attention.linear_qkv.weight", (1, slice(0, 4)))
    assert (qkv == rows).all()  # the fused weight begins with the first group's queries
    print("linear_qkv of layer 1 begins with the same rows")
