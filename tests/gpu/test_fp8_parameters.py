"""Transformer Engine's FP8 parameters, filled by a live model: the codes that Megatron Core's own loading makes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from converters.errors import UnsupportedError
from converters.rows.expr import Value
from mbx.live import attach
from mbx.live.shards import is_quantised
from mbx.models.device import Spread
from mbx.models.megatron.processes import process_group
from tests.live._models import build, read_folder, same_bytes

HAVE_TE = importlib.util.find_spec("transformer_engine") is not None
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() and HAVE_TE), reason="needs a GPU with Transformer Engine"),
]
ON_GPU = Spread(device="cuda", dtype="bf16")
#: What its tensors keep as codes, by rows and by columns; of scales some elements are room that nobody writes.
CODES = ("_data", "_rowwise_data", "_columnwise_data")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Widths of whole blocks of 128."""
    torch.manual_seed(1)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512}
    config = LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, head_dim=64, tie_word_embeddings=False)
    made = tmp_path_factory.mktemp("fp8") / "hf"
    LlamaForCausalLM(config).bfloat16().save_pretrained(made)
    return made


def coded(folder: Path, scaling: str) -> tuple[list[nn.Module], dict[str, nn.Parameter]]:
    """A model whose products are held in FP8 alone, and those."""
    fields: dict[str, Value] = {"fp8": "hybrid", "fp8_recipe": scaling, "fp8_param": True}
    chunks = build(folder, ON_GPU, **fields)
    held = {name: p for name, p in chunks[0].named_parameters() if is_quantised(p)}
    assert len(held) == 2 * 4
    return chunks, held


def tensors_of(parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """Codes, and the values that they stand for with their scales."""
    found = {name: getattr(parameter, name, None) for name in CODES}
    codes = {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}
    return {**codes, "values": parameter.dequantize()}


@pytest.mark.parametrize("way", ["folder", "pairs"])
@pytest.mark.parametrize("scaling", ["blockwise", "tensorwise"])
def test_a_load_is_what_megatron_core_loads(folder: Path, scaling: str, way: str) -> None:
    with process_group(ON_GPU):
        plain = build(folder, ON_GPU)
        attach(plain, folder).load(folder)
        state = {name: p.detach() for name, p in plain[0].named_parameters()}
        theirs, expected = coded(folder, scaling)
        with torch.no_grad():
            for name, parameter in theirs[0].named_parameters():
                parameter.copy_(state[name])
        chunks, held = coded(folder, scaling)
        before = {name: p.dequantize().clone() for name, p in held.items()}
        live = attach(chunks, folder)
        live.load(folder if way == "folder" else iter(read_folder(folder).items()))
        now = dict(chunks[0].named_parameters())
        for name, parameter in held.items():
            assert now[name] is parameter
            mine, other = tensors_of(parameter), tensors_of(expected[name])
            assert mine.keys() == other.keys() and len(mine) >= 2
            assert all(same_bytes(mine[part], other[part]) for part in mine), name
            assert not torch.equal(parameter.dequantize(), before[name])
            drawn = parameter.get_high_precision_init_val()  # Core keeps it on the host until an optimizer takes it
            assert drawn is not None and same_bytes(drawn.to("cuda"), state[name])
            error = (parameter.dequantize() - state[name]).abs().max() / state[name].abs().max()
            assert 0 < float(error) < 0.07  # half a step of E4M3 of the largest
        given = dict(live.export())
        for name, tensor in read_folder(folder).items():
            assert torch.allclose(
                given[name].cpu().float(), tensor.float(), rtol=0.07, atol=0.07 * float(tensor.abs().max())
            ), name


def test_delayed_scaling_is_refused(folder: Path) -> None:
    with process_group(ON_GPU):
        chunks, _ = coded(folder, "delayed")
        with pytest.raises(UnsupportedError, match="delayed scaling"):
            attach(chunks, folder).load(folder)
