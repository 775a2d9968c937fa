"""Models run a layer at a time compute what the whole models compute, bit for bit, and say where two models part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _planted import Bits, convert, copy, edit
from _ranks import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from converters.errors import DifferenceError, StorageError
from converters.mcore.layout import Layout
from converters.rows.config_spelling import canonical
from fixtures.make_tiny import make
from mbx.formats.files import FileSource
from mbx.formats.hf import read_config
from mbx.formats.registry import open_megatron as open_torch_dist
from mbx.models.device import ONE_PROCESS
from mbx.models.forward.divergence import BorderDiff, first_divergence
from mbx.models.forward.logits import LogitTally
from mbx.models.forward.parity import read_prompts
from mbx.models.megatron.dcp_weights import TorchDistWeights
from mbx.models.megatron.processes import megatron_on
from mbx.models.megatron.tracing import trace_megatron
from mbx.models.megatron.weights import StoredWeights
from mbx.models.prompts import Prompts
from mbx.models.stored import read_box, read_rows, row_runs
from mbx.models.transformers.tracing import trace_transformers
from mbx.proof.parity import Leg, ParityReport, parity
from mbx.run.job import Options, plan_hf_to_mcore, run
from tests.oracles import compare_logits, load_transformers, loaded_model, mcore_passes, transformers_passes

NAME = "qwen3"
SHORT = Prompts(num_prompts=1, num_tokens=16)
FC1 = "decoder.layers.mlp.linear_fc1.weight"
#: One of each kind: scaled rope, tied, biases, two rotary bases, experts, experts with biases, latent attention, YaRN.
FAMILIES = ("llama", "qwen3_tied", "qwen2", "gemma3_text", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "glm4")


@pytest.fixture(scope="module")
def good(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tiny / NAME, tmp_path_factory.mktemp("good") / "mcore")


def forward(report: ParityReport) -> Leg:
    return next(leg for leg in report.legs if leg.name == "forward")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_at_a_time_is_the_whole_model_bit_for_bit(name: str, tmp_path: Path) -> None:
    source = make(name, tmp_path / "hf")
    job = plan_hf_to_mcore(source, tmp_path / "mcore", Options(sync=False))
    run(job)
    config, opened = dict(job.plan.config), open_torch_dist(tmp_path / "mcore")
    read = read_prompts(SHORT, config, source, canonical(read_config(source)))
    vocab, padded = int(str(config["model.vocab_size"])), opened.tensors["embedding.word_embeddings.weight"].shape

    theirs = trace_transformers(source, read.batches)
    assert torch.equal(theirs.head(0, vocab), transformers_passes(load_transformers(source), read.batches)[0])
    with megatron_on(ONE_PROCESS):
        whole = mcore_passes(loaded_model(config, opened.iteration, padded_vocab=padded[0]), read.batches, vocab)[0]
        given = opened.tensors, FileSource(opened.iteration)
        for weights in (TorchDistWeights(opened.iteration, *given), StoredWeights(*given)):
            ours = trace_megatron(config, weights, read.batches, vocab=vocab, spread=ONE_PROCESS)
            assert torch.equal(ours.head(0, vocab), whole)
            half = vocab // 2
            parts = torch.cat((ours.head(0, half), ours.head(half, vocab)), dim=1)
            assert torch.allclose(parts, whole, rtol=0, atol=1e-5)
    assert list(theirs.hidden) == list(ours.hidden) and len(theirs.hidden) == config["num_layers"] + 2


def test_a_swap_in_layer_3_is_found_behind_layer_3(tiny: Path, good: Path, tmp_path: Path) -> None:
    def swap(bits: Bits, at: tuple[int, ...]) -> Bits:
        if at[0] == 3:
            half = bits.shape[1] // 2
            bits = bits.copy()
            bits[0] = list(bits[0, half:]) + list(bits[0, :half])
        return bits

    hurt = copy(good, tmp_path / "hurt")
    edit(hurt, FC1, swap)
    report = parity(tiny / NAME, hurt, forward=True, prompts=SHORT)
    assert forward(report).status == "failed"
    assert "the first to diverge is layer 3:" in " ".join(forward(report).details)
    by_name = {border.name: border.relative for border in report.borders}
    assert by_name["layer 2"] < 1e-6 < 1e-3 < by_name["layer 3"]


def test_a_wrong_rotary_base_is_found_behind_the_first_layer(tiny: Path, good: Path, tmp_path: Path) -> None:
    other = copy(tiny / NAME, tmp_path / "hf")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": config["rope_theta"] / 100}))
    report = parity(other, good, forward=True, prompts=SHORT)
    # The folder's config is what Megatron Core is built from too, so the two agree; config is the leg that differs.
    assert forward(report).status == "passed" and report.legs[1].status == "failed"
    report = parity(tiny / NAME, other, forward=True, prompts=SHORT)
    assert "the first to diverge is layer 0:" in " ".join(forward(report).details)


def test_a_wrong_embedding_and_a_wrong_output_layer_are_told_apart(tiny: Path, good: Path, tmp_path: Path) -> None:
    for name, says in (
        ("embedding.word_embeddings.weight", "the first to diverge is embedding:"),
        ("decoder.final_layernorm.weight", "the first to diverge is final norm:"),
        ("output_layer.weight", "no border diverges"),
    ):
        wrong = copy(good, tmp_path / name)
        edit(wrong, name, lambda bits, _: bits[::-1] if bits.ndim > 1 else bits + 16)
        leg = forward(parity(tiny / NAME, wrong, forward=True, prompts=SHORT))
        assert leg.status == "failed" and says in " ".join(leg.details), name


def test_any_two_sides_are_run(tiny: Path, good: Path, tmp_path: Path) -> None:
    """Folder and folder, checkpoint and checkpoint, legacy ones: each by the library that it belongs to."""
    legacy = tmp_path / "legacy"
    run(plan_hf_to_mcore(tiny / NAME, legacy, Options(format="torch", layout=Layout(tp=2, pp=2), sync=False)))
    for first, second, titles in (
        (tiny / NAME, tiny / NAME, "KL(Transformers ‖ Transformers)"),
        (good, legacy, "KL(Megatron Core ‖ Megatron Core)"),
        (legacy, tiny / NAME, "KL(Transformers ‖ Megatron Core)"),
    ):
        report = parity(first, second, forward=True, loss=True, prompts=SHORT)
        assert report.passed and forward(report).details[0].startswith(titles), report
        assert len(report.borders) == 6


def test_two_folders_that_differ_are_seen(tiny: Path, tmp_path: Path) -> None:
    other = copy(tiny / NAME, tmp_path / "hf")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.self_attn.o_proj.weight"] *= 2
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    report = parity(tiny / NAME, other, forward=True, loss=True, prompts=SHORT)
    assert "the first to diverge is layer 1:" in " ".join(forward(report).details)
    assert report.legs[-1].status == "failed"


def test_weights_that_transformers_would_invent_are_no_pass(tiny: Path, tmp_path: Path) -> None:
    other = copy(tiny / NAME, tmp_path / "hf")
    weights = load_file(other / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    found = forward(parity(tiny / NAME, other, forward=True, prompts=SHORT))
    assert found.status == "not run" and "would invent" in found.summary
    assert found.details == ("model.layers.2.mlp.up_proj.weight",)


def holds_over_processes(printed: str, *, axis: str) -> None:
    """A report in JSON of a proof over two processes, which share `axis` out."""
    report = json.loads(printed[printed.index("{") :])
    assert report["legs"]["loss"]["status"] == "passed"
    leg = report["legs"]["forward"]
    assert report["passed"] and leg["status"] == "passed"
    assert f"{axis} 2" in leg["details"][0]
    assert [border["name"] for border in report["borders"]][1] == "layer 0" and len(report["borders"]) == 6


def proof_of(name: str, folder: Path) -> list[str]:
    """The words that prove a conversion of the family."""
    source = make(name, folder / "hf")
    target = convert(source, folder / "mcore")
    return ["verify", "parity", str(source), str(target), "--forward", "--loss", "--json"]


def test_processes_share_megatron_core(tmp_path: Path) -> None:
    words = [*proof_of("qwen3_moe", tmp_path), "--tp", "2", "--ep", "2"]
    run_ranks("_command_worker.py", 2, tmp_path, *words)
    holds_over_processes((tmp_path / "printed.0").read_text(), axis="tp")
    assert (tmp_path / "printed.1").read_text() == ""


@pytest.mark.slow
def test_torchrun_spreads_megatron_core_over_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "mbx", *proof_of("llama_tied", tmp_path), "--pp", "2"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    holds_over_processes(done.stdout, axis="pp")


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 2**31))
def test_logits_may_be_compared_in_parts(rows: int, sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(rows, sum(sizes), generator=generator) * 8 for _ in range(2))
    tally = LogitTally(1e-4)
    for left, right in zip(a.split(sizes, 1), b.split(sizes, 1), strict=True):
        tally.add(left, right)
    found, whole = tally.result(), compare_logits(a[None], b[None])
    log_p, log_q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    assert found.kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-9, abs=1e-12)
    assert found.kl == pytest.approx(whole.kl, rel=1e-9, abs=1e-12)
    assert found.max_abs == float((a.double() - b.double()).abs().max())
    assert found.top1_agreement == float((a.argmax(-1) == b.argmax(-1)).double().mean())
    assert found.first_bad_position == whole.first_bad_position


def test_no_logits_are_no_agreement() -> None:
    with pytest.raises(DifferenceError, match="no logits"):
        LogitTally(1e-4).result()


def test_slow_growth_is_rounding_and_a_jump_is_not() -> None:
    def borders(*relative: float) -> list[BorderDiff]:
        return [BorderDiff(f"layer {n}", value, value) for n, value in enumerate(relative)]

    assert first_divergence(borders(0.0, 4e-7, 2e-6, 6e-6, 1e-5)) is None
    found = first_divergence(borders(0.0, 4e-7, 8e-7, 3e-3, 5e-3))
    assert found is not None and found.name == "layer 3"
    broken = first_divergence(borders(0.0, float("inf"), 1.0))
    assert broken is not None and broken.name == "layer 1"


def test_rows_and_boxes_are_what_the_tensor_holds(tiny: Path, tmp_path: Path) -> None:
    """Across the chunks of a checkpoint at tensor-parallel 2, which cut rows of one matrix and columns of another."""
    run(plan_hf_to_mcore(tiny / NAME, tmp_path / "two", Options(layout=Layout(tp=2, pp=2), sync=False)))
    run(plan_hf_to_mcore(tiny / NAME, tmp_path / "one", Options(sync=False)))
    two, one = (open_torch_dist(tmp_path / name) for name in ("two", "one"))
    for name in (FC1, "decoder.layers.mlp.linear_fc2.weight", "decoder.layers.self_attention.linear_proj.weight"):
        shape = one.tensors[name].shape[1:]
        for layer in (0, 3):
            whole = read_rows(one.tensors[name], FileSource(one.iteration), [(0, shape[0])], (layer,))
            box = read_box(
                two.tensors[name],
                FileSource(two.iteration),
                (layer,),
                (3, shape[1] // 2 - 5),
                (shape[0] - 7, 11),
            )
            assert torch.equal(box, whole[3 : shape[0] - 4, shape[1] // 2 - 5 : shape[1] // 2 + 6])
    assert row_runs([1, 2, 3, 7, 9, 10]) == [(1, 3), (7, 1), (9, 2)]
    with pytest.raises(StorageError, match="are stored"):
        read_rows(one.tensors[FC1], FileSource(one.iteration), [(0, 1)], (99,))
