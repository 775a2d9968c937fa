"""What people type who come from another tool, and what it is called here: data for hints."""

from __future__ import annotations

_SIZES = {
    "tensor": "--tp",
    "pipeline": "--pp",
    "expert": "--ep",
    "expert-tensor": "--etp",
    "virtual-pipeline": "--vpp",
}
_SPELLINGS = ("--{}-parallel", "--{}-parallel-size", "--{}-model-parallel-size", "--target-{}-parallel-size")

#: Option of Megatron-LM, vLLM or Megatron-Bridge → ours.
OPTIONS = {spelling.format(axis): ours for axis, ours in _SIZES.items() for spelling in _SPELLINGS} | {
    "--num-virtual-stages-per-pipeline-rank": "--vpp",
    "--load": "the source, the first word",
    "--save": "the target, the second word",
    "--torch-dtype": "--dtype",
    "--params-dtype": "--dtype",
    "--force": "--overwrite",
    "--config": "--recipe",
}

#: Value as libraries spell it → ours.
VALUES = {
    **dict.fromkeys(("bfloat16", "torch.bfloat16", "BF16"), "bf16"),
    **dict.fromkeys(("float16", "torch.float16", "half", "FP16"), "fp16"),
    **dict.fromkeys(("float32", "torch.float32", "float", "FP32"), "fp32"),
    **dict.fromkeys(("mcore", "megatron", "dist", "dcp", "torch-dist"), "torch_dist"),
    **dict.fromkeys(("legacy", "mp_rank"), "torch"),
}

#: Group of commands → what a word that is none of them may have meant.
GROUPS = {
    "mbx convert": "`mbx convert hf-to-mcore HF CKPT`, `mbx convert mcore-to-hf CKPT HF`",
    "mbx verify": "`mbx verify parity A B` compares any two checkpoints, `mbx verify integrity CKPT` one with its "
    "manifest",
    "mbx models": "`mbx models list` names the tables, `mbx models show NAME` prints one",
}
