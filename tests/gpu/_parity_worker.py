"""Measures one model at one tensor-parallel size in several precisions: logits against Transformers in fp32.

`python -m torch.distributed.run --nproc-per-node TP tests/gpu/_parity_worker.py HF MCORE TP DEVICE RESULT`
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
# Before torch: cuBLAS reads the first when it starts, Transformer Engine the second at each call.
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"

#: Name → dtype and Megatron Core fields. FP8 is E4M3 forward; `tensorwise` scales by the tensor at hand.
PRECISIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("fp32", {}),
    "bf16": ("bf16", {}),
    "fp8 tensorwise": ("bf16", {"fp8": "hybrid", "fp8_recipe": "tensorwise"}),
    "fp8 blockwise": ("bf16", {"fp8": "e4m3", "fp8_recipe": "blockwise"}),
    "fp8 delayed": ("bf16", {"fp8": "hybrid", "fp8_recipe": "delayed"}),
}


def main() -> None:
    hf, mcore, tp, device, result = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
    if device == "cuda":
        import transformer_engine.pytorch  # noqa: F401  # before any CUDA op
    import torch

    from converters.errors import MbxError
    from converters.rows.config_spelling import canonical
    from mbx.formats.hf import read_config
    from mbx.formats.registry import open_megatron as open_torch_dist
    from mbx.models.device import Spread
    from mbx.models.forward.divergence import compare_traces
    from mbx.models.forward.models import MegatronModel, TransformersModel
    from mbx.models.forward.parity import read_prompts
    from mbx.models.megatron.processes import megatron_on
    from mbx.models.prompts import Prompts
    from mbx.tables import table_for

    torch.set_num_threads(1 if device == "cpu" else 4)
    raw = read_config(hf)
    config, hf_config = table_for(raw).config.to_mcore(raw), canonical(raw)
    vocab = int(str(config["model.vocab_size"]))
    opened = open_torch_dist(mcore)
    read = read_prompts(Prompts(), config, hf, hf_config)
    found: dict[str, Any] = {}
    with megatron_on(Spread(tp=tp, device=device)):
        reference = TransformersModel(hf).trace(read.batches, vocab, Spread(tp, device=device))
        for name, (dtype, extra) in PRECISIONS.items():
            if device == "cpu" and extra:
                continue
            try:
                changed = {**config, **extra}
                model = MegatronModel(changed, opened.iteration, opened.tensors, True, hf, hf_config)
                trace = model.trace(read.batches, vocab, Spread(tp, device=device, dtype=dtype))
                compared = compare_traces(reference, trace, vocab, 1e-4)
            except (MbxError, RuntimeError, ValueError, AssertionError, TypeError, KeyError) as error:
                found[name] = {"reason": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
                continue
            if compared is None:
                continue
            diff, borders = compared
            found[name] = {
                "max_abs": None if diff.has_nan else diff.max_abs,
                "mean_kl_nats": None if diff.has_nan else max(diff.kl, 0.0),
                "top1_agreement": diff.top1_agreement,
                "positions": diff.num_positions,
                "relative_final_norm": borders[-1].relative if borders else None,
                "layers": len(borders) - 2,
            }
            Path(result).write_text(json.dumps(found), encoding="utf-8")
    if os.environ.get("RANK", "0") == "0":
        Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
