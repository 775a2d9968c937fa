"""Megatron Core's HybridModel as the judge, on a CPU: it loads what mbx writes, and mbx reads what it saves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from converters.errors import StorageError
from converters.mcore.hybrid_form import hybrid_config
from converters.mcore.releases import written_by
from fixtures.make_tiny import make
from mbx.formats.architecture import architecture_of
from mbx.formats.registry import open_megatron
from mbx.installed import core_release, core_version
from mbx.models.megatron.build import build_model
from mbx.models.megatron.core.cpu import megatron_on_cpu
from mbx.models.megatron.processes import process_group
from mbx.proof.parity import parity
from mbx.run.job import Options, plan_hf_to_mcore, run
from mbx.torchfile.dcp import read_dcp
from tests.judge import asked_keys, load_torch_dist, save_torch_dist
from tests.oracles import compare_logits, hf_logits, mcore_logits

pytestmark = pytest.mark.skipif(
    not core_release().hybrid_without_te,
    reason=f"Megatron Core {core_version()} builds hybrid models with Transformer Engine only: `make test-core`",
)
FAMILIES = ("mistral", "qwen2", "qwen3_moe")
IDS = torch.arange(40).reshape(2, 20) * 5 % 251


@pytest.mark.parametrize("family", FAMILIES)
def test_megatron_core_s_hybrid_model_and_mbx_read_one_another(family: str, tmp_path: Path) -> None:
    source = make(family, tmp_path / "hf")
    run(plan_hf_to_mcore(source, tmp_path / "gpt", Options(sync=False, dtype="fp32")))
    run(plan_hf_to_mcore(source, tmp_path / "hybrid", Options(sync=False, dtype="fp32", model_class="hybrid")))
    found = architecture_of(open_megatron(tmp_path / "hybrid"))
    config = hybrid_config(found.table.config.to_mcore(found.config))
    written, saved = tmp_path / "hybrid" / "iter_0000000", tmp_path / "saved" / "iter_0000000"
    with megatron_on_cpu(), process_group():
        torch.manual_seed(1)
        model = build_model(config)
        tensors, objects = asked_keys(model)
        stored = read_dcp(written)
        assert tensors == stored.tensors.keys()
        assert objects <= stored.objects.keys()
        load_torch_dist(model, written)
        logits = mcore_logits(model, IDS, vocab_size=251)
        save_torch_dist(model, saved)
        with pytest.raises(StorageError, match="does not accept"):  # the other form's keys are not its own
            load_torch_dist(model, tmp_path / "gpt" / "iter_0000000")
    assert compare_logits(logits, hf_logits(source, IDS)).ok
    assert open_megatron(saved).model_class == "hybrid"
    assert open_megatron(saved).core == written_by(core_release().common_file or "")
    for other in ("gpt", "hybrid"):
        report = parity(tmp_path / other, saved)
        assert {leg.name: leg.status for leg in report.legs if leg.name in ("cover", "weights")} == {
            "cover": "passed",
            "weights": "passed",
        }


def test_a_prediction_head_has_the_names_of_megatron_core(tmp_path: Path) -> None:
    source = make("glm4_moe", tmp_path / "hf")
    run(plan_hf_to_mcore(source, tmp_path / "hybrid", Options(sync=False, dtype="fp32", model_class="hybrid")))
    found = architecture_of(open_megatron(tmp_path / "hybrid"))
    config = hybrid_config(found.table.config.to_mcore(found.config))
    assert config["model.hybrid_override_pattern"] == "*-*E*E*E/*E"
    written = tmp_path / "hybrid" / "iter_0000000"
    with megatron_on_cpu(), process_group():
        model = build_model(config)
        assert asked_keys(model)[0] == read_dcp(written).tensors.keys()
        load_torch_dist(model, written)
