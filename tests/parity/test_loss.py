"""The loss leg, held against what the two libraries' own loss code says of whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from converters.mcore.layout import Layout
from mbx.formats.hf import read_config
from mbx.formats.registry import open_megatron as open_torch_dist
from mbx.models.device import ONE_PROCESS
from mbx.models.forward.loss import CrossEntropy
from mbx.models.megatron.processes import megatron_on
from mbx.models.prompts import Prompts
from mbx.proof.parity import Leg, parity
from mbx.run.job import Options, plan_hf_to_mcore, run
from mbx.tables import shipped
from tests.oracles import load_transformers, loaded_model

IDS = (3, 1, 4, 1, 5, 9, 2, 6)


def loss_leg(first: Path, second: Path, prompts: Prompts) -> Leg:
    (found,) = (leg for leg in parity(first, second, loss=True, prompts=prompts).legs if leg.name == "loss")
    return found


@pytest.mark.parametrize("divisor", [1, 64])
def test_it_is_what_each_library_says(tiny: Path, tmp_path: Path, divisor: int) -> None:
    """Where the embedding is padded, Megatron Core's own loss is the one that training shows."""
    source, mcore = tiny / "llama", tmp_path / "mcore"
    run(plan_hf_to_mcore(source, mcore, Options(layout=Layout(vocab_divisor=divisor), sync=False)))
    ids = torch.tensor([IDS])
    theirs: Any = load_transformers(source)
    expected = float(theirs(ids, labels=ids).loss)
    opened = open_torch_dist(mcore)
    rows = opened.tensors["embedding.word_embeddings.weight"].shape[0]
    with megatron_on(ONE_PROCESS):
        config = shipped("llama").config.to_mcore(read_config(source))
        ours = loaded_model(config, opened.iteration, padded_vocab=rows)
        places = torch.arange(ids.shape[1] - 1).expand(len(ids), -1)
        with torch.no_grad():
            trained = float(ours(ids[:, :-1].contiguous(), places, None, labels=ids[:, 1:].contiguous()).mean())

    found = loss_leg(source, mcore, Prompts(token_ids=(IDS,)))
    assert found.status == "passed" and "mean over 7 tokens" in found.summary
    said = [float(word) for word in found.summary.replace(",", " ").split() if word.count(".") == 1 and len(word) == 8]
    assert said == pytest.approx([expected, expected], abs=2e-6)
    if divisor == 1:
        assert found.details == () and trained == pytest.approx(expected, abs=1e-5)
    else:
        assert trained > expected + 1e-3 and found.details[0].startswith(f"training shows {trained:.5f}")


def test_a_batch_that_predicts_nothing_is_no_pass(tiny: Path, tmp_path: Path) -> None:
    run(plan_hf_to_mcore(tiny / "llama", tmp_path / "mcore", Options(sync=False)))
    report = parity(tiny / "llama", tmp_path / "mcore", forward=True, loss=True, prompts=Prompts(token_ids=((3,),)))
    legs = {leg.name: leg for leg in report.legs}
    assert legs["loss"].status == "failed" and "predicts nothing" in legs["loss"].summary
    assert legs["forward"].status == "passed" and not report.passed


def test_parts_of_the_vocabulary_add_up() -> None:
    ids, logits = torch.tensor([[0, 4, 2], [3, 3, 1]]), torch.randn(8, 5)  # two positions of a later batch behind
    entropy = CrossEntropy(ids)
    for first, last in ((0, 2), (2, 3), (3, 5)):
        entropy.add(logits[:, first:last], first)
    wanted = torch.nn.functional.cross_entropy(logits[[0, 1, 3, 4]].double(), torch.tensor([4, 2, 3, 1]))
    assert entropy.mean() == pytest.approx(float(wanted), abs=1e-12)


def test_a_token_without_a_logit_is_no_number() -> None:
    entropy = CrossEntropy(torch.tensor([[0, 4]]))
    entropy.add(torch.zeros(2, 4), 0)
    assert entropy.mean() != entropy.mean()
