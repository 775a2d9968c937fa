"""Sparse attention in the forward leg: Megatron Core's own modules on a CPU, held against Transformers' classes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from _planted import convert
from _stores import changed_hf

from converters.errors import LayoutError
from fixtures.make_tiny import make
from mbx.installed import core_release, core_version
from mbx.models.device import Spread
from mbx.models.megatron.config import transformer_config
from mbx.models.megatron.core.cpu import megatron_on_cpu
from mbx.models.megatron.processes import process_group
from mbx.models.megatron.specs import gpt_block_spec
from mbx.proof.parity import ParityReport, parity
from mbx.run.job import Options, plan_hf_to_mcore, run
from tests.oracles import compare_logits, hf_logits, loaded_model, mcore_logits

SPARSE = core_release().sparse_attention
with_it = pytest.mark.skipif(
    not SPARSE, reason=f"Megatron Core {core_version()} builds no such sparse attention: `make test-core`"
)
FAMILIES = ("deepseek_v32", "glm_5", "glm_5_2")
INDEXER = ("linear_wq_b.weight", "linear_wk.weight", "k_norm.weight", "k_norm.bias", "linear_weights_proj.weight")
IDS = torch.arange(80).reshape(2, 40) * 5 % 251
WQ_B = "model.layers.0.self_attn.indexer.wq_b.weight"


def forward(report: ParityReport) -> tuple[str, str]:
    leg = next(leg for leg in report.legs if leg.name == "forward")
    return leg.status, "\n".join((leg.summary, *leg.details))


def exchange(tensor: torch.Tensor) -> None:
    tensor[[0, 1]] = tensor[[1, 0]]


@with_it
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_that_every_weight_of_an_indexer_chooses_are_those_of_transformers(
    family: str, tmp_path: Path
) -> None:
    """40 tokens, of which each attends to 16; some layers of glm_5_2 take another's choice."""
    source = make(family, tmp_path / "hf")
    job = plan_hf_to_mcore(source, tmp_path / "mcore", Options(sync=False))
    run(job)
    logits = partial(mcore_logits, input_ids=IDS, vocab_size=251)
    expected = hf_logits(source, IDS)
    with megatron_on_cpu(), process_group():
        model = loaded_model(job.plan.config, job.target / "iter_0000000")
        assert compare_logits(expected, logits(model)).ok
        for name in INDEXER:
            weight = model.get_parameter(f"decoder.layers.0.self_attention.core_attention.indexer.{name}").data
            before = weight.clone()
            weight.copy_(before.roll(1, 0))
            assert compare_logits(expected, logits(model)).max_abs > 1e-2, name
            weight.copy_(before)


@with_it
def test_a_choice_of_more_tokens_than_prompts_have_is_reached_and_a_wrong_one_found(tmp_path: Path) -> None:
    source = changed_hf(make("glm_5", tmp_path / "made"), tmp_path / "hf", config={"index_topk": 256})
    checkpoint = convert(source, tmp_path / "mcore")
    status, said = forward(parity(source, checkpoint, forward=True))
    assert status == "passed" and "a choice of 256 tokens, made 47 on both sides" in said
    other = changed_hf(source, tmp_path / "other", lambda tensors: exchange(tensors[WQ_B]))
    assert forward(parity(other, checkpoint, forward=True))[0] == "failed"


@with_it
def test_a_stage_that_begins_with_another_s_choice_is_refused_on_every_rank(tmp_path: Path) -> None:
    """Layers 1 and 2 of four take the choice of layer 0."""
    config = plan_hf_to_mcore(make("glm_5_2", tmp_path / "hf"), tmp_path / "mcore", Options()).plan.config
    with megatron_on_cpu(), process_group():  # rank 0 of two
        built = transformer_config(config, Spread(pp=2))
        with pytest.raises(LayoutError, match="layer 2, which takes the tokens that layer 0 chose"):
            gpt_block_spec(built, use_te=False)


@pytest.mark.skipif(SPARSE, reason="of releases without it")
def test_a_release_without_it_is_named_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make("glm_5", tmp_path / "hf")
    checkpoint = convert(source, tmp_path / "mcore")
    monkeypatch.setattr("mbx.models.forward.models.TransformersModel.trace", lambda *_, **__: pytest.fail("it ran"))
    status, said = forward(parity(source, checkpoint, forward=True))
    assert status == "not run" and said.startswith(
        f"megatron-core {core_version()} cannot build this model's sparse attention"
    )
