"""Megatron Core itself as the judge: it loads foreign checkpoints and gives Transformers' logits, on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import pytest
import torch
from _mcore_worker import VARIANTS
from _peers import PEERS_ENV, peer_root
from _ranks import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.errors import DifferenceError, MbxError, UsageError
from mbx.models.device import Spread
from mbx.models.megatron.config import transformer_config
from tests.oracles import compare_logits

Found: TypeAlias = dict[str, torch.Tensor]
needs_peers = pytest.mark.skipif(peer_root() is None, reason=f"{PEERS_ENV} names no folder of peer checkpoints")
# fp32 against fp32 on one machine; the two implementations differ in summation order only.
FP32_TOLERANCE = 1e-4
# The stored logits were made on a GPU, whose fp32 products are not IEEE ones; seen: 4.4e-4, 1.4e-3, 1.6e-4.
STORED_TOLERANCE = 5e-3


def run_job(job: str, work: Path, world_size: int = 1) -> Found:
    run_ranks("_mcore_worker.py", world_size, job, work)
    return torch.load(work / f"{job}.pt", weights_only=True)


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run_job("peers", tmp_path_factory.mktemp("peers"))


@pytest.fixture(scope="module")
def peers_tp2(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run_job("peers", tmp_path_factory.mktemp("peers_tp2"), world_size=2)


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run_job("variants", tmp_path_factory.mktemp("variants"))


@needs_peers
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt_oss"])
def test_peer_checkpoint_in_megatron_core_gives_the_logits_of_transformers(peers: Found, name: str) -> None:
    assert compare_logits(peers[f"{name}.mcore"], peers[f"{name}.hf"], tolerance=FP32_TOLERANCE).ok
    assert compare_logits(peers[f"{name}.mcore"], peers[f"{name}.stored"], tolerance=STORED_TOLERANCE).ok


@needs_peers
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt_oss"])
def test_swapped_gate_and_up_fails(peers: Found, name: str) -> None:
    diff = compare_logits(peers[f"{name}.swapped"], peers[f"{name}.hf"], tolerance=STORED_TOLERANCE)
    assert not diff.ok
    assert diff.max_abs > 0.1


@needs_peers
def test_stock_rope_constants_are_not_this_llamas(peers: Found) -> None:
    """Megatron Core's Llama-3 rope assumes 8192 original positions, this checkpoint has 128: parity must see it."""
    diff = compare_logits(peers["llama.stock_rope"], peers["llama.hf"], tolerance=STORED_TOLERANCE)
    assert not diff.ok
    assert diff.first_bad_position is not None and diff.first_bad_position[1] > 0


@needs_peers
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt_oss"])
def test_two_tensor_parallel_ranks_agree_with_one(peers: Found, peers_tp2: Found, name: str) -> None:
    assert compare_logits(peers_tp2[f"{name}.mcore"], peers[f"{name}.hf"], tolerance=FP32_TOLERANCE).ok


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_save_then_load_restores_every_logit(variants: Found, name: str) -> None:
    assert not torch.equal(variants[f"{name}.before"], variants[f"{name}.saved"])
    assert torch.equal(variants[f"{name}.after"], variants[f"{name}.saved"])


def test_latent_attention_on_a_cpu_gives_the_logits_of_transformers(variants: Found) -> None:
    assert compare_logits(variants["deepseek.mcore"], variants["deepseek.hf"], tolerance=FP32_TOLERANCE).ok
    assert variants["deepseek.hf"].std() > 0.5  # not a comparison of two flat outputs


def test_mtp_heads_leave_the_main_logits_alone(variants: Found) -> None:
    assert torch.equal(variants["mtp.with"], variants["mtp.without"])


def test_padding_rows_are_trimmed(variants: Found) -> None:
    assert torch.equal(variants["padded.after"], variants["dense.saved"])


@pytest.mark.parametrize(
    ("attempt", "kind", "says"),
    [
        ("missing_tensor", "StorageError", "linear_qkv.bias"),
        ("unexpected_tensor", "StorageError", "output_layer.weight"),
        ("wrong_shape", "StorageError", "does not accept"),
        ("not_a_checkpoint", "StorageError", "metadata.json"),
        ("save_over", "UsageError", "not empty"),
        ("unknown_field", "UnsupportedError", "`not_a_field`"),
        ("unknown_argument", "UnsupportedError", "`model.not_an_argument`"),
        ("gated_delta_net", "UnsupportedError", "gated_delta_net"),
        ("mla_softmax_scale", "UnsupportedError", "`softmax_scale`"),
        ("latent_experts", "UnsupportedError", "`moe_latent_size`"),
        ("yarn_without_constants", "UnsupportedError", "yarn_rotary_scaling_factor"),
        ("hybrid", "UnsupportedError", "hybrid"),
        ("refused_by_mcore", "UnsupportedError", "moe-router-pre-softmax"),
        ("token_out_of_range", "UsageError", "256"),
    ],
)
def test_what_cannot_be_done_is_said(variants: Found, attempt: str, kind: str, says: str) -> None:
    errors: dict[str, tuple[str, str]] = variants["errors"]  # type: ignore[assignment]
    got_kind, text = errors[attempt]
    assert got_kind == kind
    assert says in text


def test_context_managers_leave_nothing_behind(variants: Found) -> None:
    assert variants["restored"]
    assert not variants["group_left"]


def test_layouts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(MbxError, match="tp 3 does not divide num_attention_heads 8"):
        transformer_config(VARIANTS["dense"], Spread(tp=3))
    with pytest.raises(MbxError, match="pp 3 does not divide num_layers 2"):
        transformer_config(VARIANTS["dense"], Spread(pp=3))


logit_lists = st.lists(st.floats(-50, 50, width=32), min_size=12, max_size=12)


@settings(max_examples=30, deadline=None)
@given(logit_lists)
def test_equal_logits_agree_and_any_moved_logit_is_found(values: list[float]) -> None:
    a = torch.tensor(values).reshape(1, 3, 4)
    same = compare_logits(a, a.clone())
    assert same.ok and same.max_abs == 0 and same.kl == 0 and same.top1_agreement == 1
    b = a.clone()
    b[0, 1, 2] += 1.0
    moved = compare_logits(a, b)
    assert not moved.ok
    assert moved.first_bad_position == (0, 1)
    assert moved.max_abs == pytest.approx(1.0, abs=1e-5)


def test_kl_is_the_mean_over_positions_in_nats() -> None:
    a = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]])
    b = torch.tensor([[[0.0, 0.0], [torch.log(torch.tensor(3.0)), 0.0]]])
    # KL((1/2, 1/2) || (3/4, 1/4)) = ln(2/sqrt(3)) at one of two positions
    assert compare_logits(a, b).kl == pytest.approx(0.5 * 0.14384103622589045, abs=1e-7)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_is_never_a_pass(poison: float) -> None:
    a = torch.zeros(1, 2, 3)
    b = a.clone()
    b[0, 1, 0] = poison
    for left, right in ((a, b), (b, a), (b, b)):
        diff = compare_logits(left, right, tolerance=float("inf"))
        assert diff.has_nan and not diff.ok


def test_unequal_vocab_and_nothing_to_compare_are_errors() -> None:
    with pytest.raises(DifferenceError, match="unequal shape"):
        compare_logits(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))
    with pytest.raises(DifferenceError, match="no logits"):
        compare_logits(torch.zeros(1, 0, 3), torch.zeros(1, 0, 3))
    with pytest.raises(UsageError):
        compare_logits(torch.zeros(2, 3), torch.zeros(2, 3))
