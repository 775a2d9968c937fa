"""Megatron Core's hybrid models with mixers against Transformers, on a CPU: the recurrence in torch is lent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fixtures.make_tiny import make
from mbx.models.megatron.core.cpu import megatron_on_cpu
from mbx.models.megatron.processes import process_group
from mbx.proof.parity import parity
from mbx.run.job import Options, plan_hf_to_mcore, run
from mbx.torchfile.dcp import read_dcp
from tests.judge import asked_keys
from tests.mamba_on_cpu import mamba_on_cpu
from tests.oracles import compare_logits, hf_logits, loaded_model, mcore_logits

IDS = torch.arange(40).reshape(2, 20) * 5 % 251


@pytest.mark.parametrize("family", ["nemotron_h", "nemotron_nano_v3"])
def test_a_hybrid_model_passes_and_a_wrong_mixer_is_found(family: str, tmp_path: Path) -> None:
    source = make(family, tmp_path / "hf")
    job = plan_hf_to_mcore(source, tmp_path / "mcore", Options(sync=False))
    run(job)
    written = tmp_path / "mcore" / "iter_0000000"
    with mamba_on_cpu():
        legs = {leg.name: leg for leg in parity(source, tmp_path / "mcore", forward=True).legs}
        assert legs["forward"].status == "passed" and dict(legs["forward"].figures)["max_abs"] <= 1e-4
        with megatron_on_cpu(), process_group():
            model = loaded_model(job.plan.config, written)
            assert asked_keys(model)[0] == read_dcp(written).tensors.keys()
            in_proj = next(p for name, p in model.named_parameters() if name.endswith("mixer.in_proj.weight"))
            in_proj.data.copy_(in_proj.data.flip(0))
            logits = mcore_logits(model, IDS, vocab_size=251)
    assert not compare_logits(logits, hf_logits(source, IDS)).ok


def test_the_norms_of_mixers_have_the_model_s_epsilon(tmp_path: Path) -> None:
    source = make("nemotron_h", tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 1e-3}))
    run(plan_hf_to_mcore(source, tmp_path / "mcore", Options(sync=False)))
    with mamba_on_cpu():
        legs = {leg.name: leg for leg in parity(source, tmp_path / "mcore", forward=True).legs}
    assert legs["forward"].status == "passed" and dict(legs["forward"].figures)["max_abs"] <= 1e-4
