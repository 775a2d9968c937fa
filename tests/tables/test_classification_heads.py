"""Reward and value models: a decoder whose output layer is `score.weight`, of as many rows as there are labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from converters.errors import UnsupportedError
from converters.mcore.layout import Layout
from mbx.formats.checkpoint import Checkpoint
from mbx.formats.registry import open_checkpoint
from mbx.proof.parity import parity
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run
from mbx.tables import table_for

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=64, pad_token_id=0)  # fmt: skip


SEQUENCE, TOKEN = "ForSequenceClassification", "ForTokenClassification"


@pytest.mark.parametrize(
    ("kind", "ending", "labels"), [("Llama", SEQUENCE, 1), ("Qwen2", SEQUENCE, 3), ("Qwen3", TOKEN, 2)]
)
def test_the_head_goes_there_and_comes_back(tmp_path: Path, kind: str, ending: str, labels: int) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL, num_labels=labels, tie_word_embeddings=kind == "Qwen2")
    getattr(transformers, f"{kind}{ending}")(config).save_pretrained(tmp_path / "hf")
    run(plan_hf_to_mcore(tmp_path / "hf", tmp_path / "mcore", Options(layout=Layout(tp=2, pp=2))))
    with open_checkpoint(tmp_path / "mcore") as opened:
        assert isinstance(opened, Checkpoint)
        head = opened.tensors["output_layer.weight"]
        assert (head.shape, len(head.chunks)) == ((labels, 32), 1)  # whole on every rank, and not padded
        assert ("output_layer.bias" in opened.tensors) == (ending == TOKEN)
    report = parity(tmp_path / "hf", tmp_path / "mcore")
    assert report.passed, [leg for leg in report.legs if leg.status != "passed"]
    run(plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "back", Options()))
    for path in (tmp_path / "hf").iterdir():
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes(), path.name
    assert load_file(tmp_path / "back" / "model.safetensors")["score.weight"].shape == (labels, 32)


def test_a_damaged_head_is_seen(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**SMALL, num_labels=2)
    for name in ("a", "b"):
        transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        assert weights["score.weight"].abs().sum() > 0
    run(plan_hf_to_mcore(tmp_path / "a", tmp_path / "mcore", Options()))
    report = parity(tmp_path / "b", tmp_path / "mcore")
    assert "score.weight" in json.dumps([d.name for d in report.differences]) or any(
        d.name == "output_layer.weight" for d in report.differences
    )


def test_another_head_is_called_uncovered_and_the_decoder_covered() -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForQuestionAnswering"]}
    with pytest.raises(UnsupportedError, match="LlamaForQuestionAnswering") as caught:
        table_for(config)  # type: ignore[arg-type]
    assert "LlamaForCausalLM" in caught.value.fact and "ForSequenceClassification" in caught.value.fact
    assert "mbx models show llama" in (caught.value.hint or "") and "near" not in (caught.value.hint or "")
