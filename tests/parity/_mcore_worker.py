"""Run one rank of a Megatron Core job in a process of its own: `_mcore_worker.py RANK WORLD JOB WORKDIR`.

Process groups and CUDA patches are process-wide, so jobs run outside pytest; each writes its findings to
`WORKDIR/JOB.pt` (rank 0), and the tests judge them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from _deepseek import both_logits
from _mcore_configs import GPT2, GPT_OSS, LLAMA, MLA_MOE_MTP, QWEN3_MOE, SMALL, ZERO_CENTERED_GATED
from _peers import peer_root

from converters.errors import MbxError
from mbx.models.device import Spread
from mbx.models.megatron.build import build_model
from mbx.models.megatron.config import FlatConfig
from mbx.models.megatron.core.cpu import megatron_on_cpu
from mbx.models.megatron.processes import process_group
from mbx.models.megatron.rotary import set_rope_frequencies
from tests.judge import load_torch_dist, save_torch_dist
from tests.oracles import hf_logits, mcore_logits

VARIANTS: dict[str, FlatConfig] = {
    "dense": SMALL,
    "learned_positions": GPT2,
    "mla_moe_mtp": MLA_MOE_MTP,
    "zero_centered_gated": ZERO_CENTERED_GATED,
}
PEERS: dict[str, FlatConfig] = {"llama": LLAMA, "qwen3_moe": QWEN3_MOE, "gpt_oss": GPT_OSS}


def run_peers(root: Path, _work: Path, tp: int) -> dict[str, object]:
    """Load each peer into a fresh model and keep mcore's, Transformers' and the stored logits."""
    found: dict[str, object] = {}
    for name, config in PEERS.items():
        stored = torch.load(root / name / "hf_logits.pt", weights_only=True)
        ids = stored["input_ids"]
        model = build_model(config, Spread(tp=tp))
        load_torch_dist(model, root / name / "mcore" / "iter_0000000")
        if name == "llama":
            found["llama.stock_rope"] = mcore_logits(model, ids, vocab_size=256)
            set_rope_frequencies(model, llama_frequencies(root / name / "hf"))
        found[f"{name}.mcore"] = mcore_logits(model, ids, vocab_size=256)
        found[f"{name}.stored"] = stored["logits_fp32"]
        if tp > 1:
            continue
        found[f"{name}.hf"] = hf_logits(root / name / "hf", ids)
        swap_gate_and_up(model)
        found[f"{name}.swapped"] = mcore_logits(model, ids, vocab_size=256)
    return found


def llama_frequencies(hf_dir: Path) -> torch.Tensor:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.from_pretrained(hf_dir), torch.device("cpu"))[0]


def swap_gate_and_up(model: torch.nn.Module) -> None:
    for name, weight in model.named_parameters():
        if name.endswith("linear_fc1.weight"):
            gate, up = weight.data.chunk(2)
            weight.data = torch.cat([up, gate])


def run_variants(_root: Path, work: Path, tp: int) -> dict[str, object]:
    """Save each variant, load it into a model of other random weights, and keep the logits around that."""
    found: dict[str, object] = {}
    for name, config in VARIANTS.items():
        vocab_size = int(str(config["model.vocab_size"]))
        ids = torch.arange(40).reshape(2, 20) * 5 % vocab_size
        torch.manual_seed(1)
        saved = build_model(config, Spread(tp=tp))
        save_torch_dist(saved, work / name)
        torch.manual_seed(2)
        loaded = build_model(config, Spread(tp=tp))
        found[f"{name}.saved"] = mcore_logits(saved, ids, vocab_size=vocab_size)
        found[f"{name}.before"] = mcore_logits(loaded, ids, vocab_size=vocab_size)
        load_torch_dist(loaded, work / name, strict="raise_all")
        found[f"{name}.after"] = mcore_logits(loaded, ids, vocab_size=vocab_size)
    plain, heads = build_model(SMALL), build_model({**SMALL, "mtp_num_layers": 2})
    heads.load_state_dict(plain.state_dict(), strict=False)
    ids = torch.arange(32).reshape(1, 32)
    found["mtp.without"] = mcore_logits(plain, ids, vocab_size=256)
    found["mtp.with"] = mcore_logits(heads, ids, vocab_size=256)
    padded = build_model(SMALL, padded_vocab_size=320)
    load_torch_dist(padded, work / "dense")
    found["padded.after"] = mcore_logits(padded, torch.arange(40).reshape(2, 20) * 5 % 256, vocab_size=256)
    found["deepseek.mcore"], found["deepseek.hf"] = both_logits()
    found["errors"] = refusals(work)
    return found


def refusals(work: Path) -> dict[str, tuple[str, str]]:
    """Attempts that must fail, with the class and text of what they failed with."""
    one_more: FlatConfig = {**SMALL, "add_qkv_bias": True}
    attempts = {
        "missing_tensor": lambda: load_torch_dist(build_model(one_more), work / "dense"),
        "unexpected_tensor": lambda: load_torch_dist(
            build_model({**SMALL, "model.share_embeddings_and_output_weights": True}),
            work / "dense",
            strict="raise_all",
        ),
        "wrong_shape": lambda: load_torch_dist(build_model({**SMALL, "ffn_hidden_size": 128}), work / "dense"),
        "not_a_checkpoint": lambda: load_torch_dist(build_model(SMALL), work),
        "save_over": lambda: save_torch_dist(build_model(SMALL), work / "dense"),
        "unknown_field": lambda: build_model({**SMALL, "not_a_field": 1}),
        "unknown_argument": lambda: build_model({**SMALL, "model.not_an_argument": 1}),
        "gated_delta_net": lambda: build_model(
            {**SMALL, "experimental_attention_variant": "gated_delta_net", "linear_attention_freq": 2}
        ),
        "mla_softmax_scale": lambda: build_model({**MLA_MOE_MTP, "softmax_scale": 0.5}),
        "latent_experts": lambda: build_model({**QWEN3_MOE, "moe_latent_size": 32}),
        "yarn_without_constants": lambda: build_model({**SMALL, "model.position_embedding_type": "yarn"}),
        "hybrid": lambda: build_model({**SMALL, "model.mcore_model": "hybrid"}),
        "refused_by_mcore": lambda: build_model({**SMALL, "moe_router_topk": 1, "num_moe_experts": 4}),
        "token_out_of_range": lambda: mcore_logits(build_model(SMALL), torch.tensor([[256]]), vocab_size=256),
    }
    seen: dict[str, tuple[str, str]] = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except MbxError as error:
            seen[name] = (type(error).__name__, "\n".join([error.fact, *error.details]))
    return seen


def main(job: str, rank: int, world_size: int, work: Path) -> None:
    torch.set_num_threads(1)
    root = peer_root()
    run = {"peers": run_peers, "variants": run_variants}[job]
    assert root is not None or job != "peers"
    meeting = work / f"{job}.store" if world_size > 1 else None
    before = (torch.cuda.current_device, torch.cuda.synchronize)
    with (
        megatron_on_cpu(),
        process_group(Spread(tp=world_size), rank=rank, world_size=world_size, init_file=meeting),
    ):
        found = run(root or Path(), work, world_size)
    found["restored"] = before == (torch.cuda.current_device, torch.cuda.synchronize)
    found["group_left"] = torch.distributed.is_initialized()
    if rank == 0:
        torch.save(found, work / f"{job}.pt")


if __name__ == "__main__":
    main(sys.argv[3], int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[4]))
