"""Exports in the parts of a codec in this process: what changed, what dtypes, what is kept, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from _folders import rewritten, stacked_fp8
from _models import build, read_folder, same_bytes
from torch import nn

from converters.codecs import Fp8Block
from converters.codecs.fresh import FRESH
from converters.errors import CoverageError, StorageError, UnsupportedError, UsageError
from fixtures.make_tiny import make
from fixtures.wrapped import make_wrapped
from mbx.formats.hf import read_config
from mbx.live import Live, attach, sending
from mbx.live.codes import CODECS
from mbx.models.device import Spread
from mbx.models.megatron.core.cpu import megatron_on_cpu
from mbx.models.megatron.processes import process_group
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run
from tests.formats.test_quantised_kinds import quantised

BF16 = Spread(dtype="bf16")
SCALES = "iter_0000000/hf/mbx_scales.safetensors"


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with megatron_on_cpu(), process_group():
        yield


def loaded(folder: Path, spread: Spread = BF16, *, values: Path | None = None) -> tuple[list[nn.Module], Live]:
    chunks = build(folder, spread)
    live = attach(chunks, folder)
    live.load(values or folder)
    return chunks, live


def converted(folder: Path, into: Path, codec: str, **options: object) -> dict[str, torch.Tensor]:
    """What two conversions make of a folder."""
    run(plan_hf_to_mcore(folder, into / "mcore", Options(sync=False, **options)))  # type: ignore[arg-type]
    run(plan_mcore_to_hf(into / "mcore", into / "hf", Options(sync=False, codec=codec)))
    return read_folder(into / "hf")


def test_blocks_that_changed_get_scales_of_their_own(tmp_path: Path) -> None:
    """A model of other values than its folder: what a conversion writes by the folder's scales."""
    folder = make("deepseek_v3_fp8", tmp_path / "a")
    run(plan_hf_to_mcore(folder, tmp_path / "a.mcore", Options(sync=False)))
    tensors, changed = read_folder(folder), "model.layers.0.self_attn.o_proj.weight"
    tensors[changed].view(torch.uint8)[3:5, 2] ^= 5
    tensors[f"{changed}_scale_inv"][1, 2] *= 1.37
    other = rewritten(folder, tmp_path / "b", tensors)
    run(plan_hf_to_mcore(other, tmp_path / "b.mcore", Options(sync=False)))
    shutil.copy(tmp_path / "a.mcore" / SCALES, tmp_path / "b.mcore" / SCALES)
    run(plan_mcore_to_hf(tmp_path / "b.mcore", tmp_path / "out", Options(sync=False, codec="same")))
    expected, before = read_folder(tmp_path / "out"), read_folder(folder)
    chunks, live = loaded(folder, values=other)
    given = dict(live.export(codec="same"))
    assert given.keys() == expected.keys() and all(same_bytes(given[name], expected[name]) for name in expected)
    odd = {name for name in before if not same_bytes(before[name], expected[name])}
    assert odd == {changed, f"{changed}_scale_inv"}
    assert int((before[f"{changed}_scale_inv"] != expected[f"{changed}_scale_inv"]).sum()) in (1, 2)
    del chunks


def test_codes_are_of_the_values_as_they_are(tiny: Path, tmp_path: Path) -> None:
    """Of fp32 masters, and not of what bf16 keeps of them; other tensors in the dtype that is asked for."""
    plain = {name: tensor.float() * 1.0007 for name, tensor in read_folder(tiny / "llama").items()}
    folder = rewritten(tiny / "llama", tmp_path / "fp32", plain)
    expected = converted(folder, tmp_path, "fp8_block")
    chunks, live = loaded(tiny / "llama", Spread(), values=folder)
    for dtype in (None, "model", "fp16"):
        given = dict(live.export(codec="fp8_block", dtype=dtype))
        assert given.keys() == expected.keys()
        coded = [name for name in given if f"{name.removesuffix('_scale_inv')}_scale_inv" in given]
        assert len(coded) == 2 * 28
        same = given if dtype == "model" else coded
        assert all(same_bytes(given[name], expected[name]) for name in same)
        others = {tensor.dtype for name, tensor in given.items() if name not in coded}
        assert others == {{None: torch.bfloat16, "model": torch.float32, "fp16": torch.float16}[dtype]}
    del chunks


def test_experts_of_a_stack_are_products_one_by_one(tmp_path: Path) -> None:
    apart = make("qwen3_moe", tmp_path / "apart")
    chunks, live = loaded(make("qwen3_moe", tmp_path / "together", layout="v5"))
    stacked = converted(tmp_path / "together", tmp_path / "1", "fp8_block")
    given = dict(live.export(codec="fp8_block"))
    assert given.keys() == stacked.keys() and all(same_bytes(given[name], stacked[name]) for name in stacked)
    each = converted(apart, tmp_path / "2", "fp8_block")
    given = dict(live.export(codec="fp8_block", experts="each"))
    assert given.keys() == each.keys() and all(same_bytes(given[name], each[name]) for name in each)
    del chunks


def test_stacks_in_codes_have_no_experts_of_their_own(tmp_path: Path) -> None:
    chunks, live = loaded(stacked_fp8(tmp_path / "stack"))
    folder, given = read_folder(tmp_path / "stack"), dict(live.export(codec="same"))
    assert given.keys() == folder.keys() and all(same_bytes(given[name], folder[name]) for name in folder)
    with pytest.raises(CoverageError, match="is no tensor of this stream; the codes stand for"):
        live.spec(codec="same", experts="each")
    del chunks


def test_values_that_are_encoded_are_not_written() -> None:
    """fp32 values by reciprocal scales, whose blocks are views of what is given."""
    values = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    before = values.clone()
    Fp8Block(scale_rule="reciprocal").encode(values)
    assert torch.equal(values, before)


def test_what_was_worked_out_is_kept_by_codec(tiny: Path) -> None:
    chunks, live = loaded(tiny / "llama")
    with patch.object(sending, "course_of", wraps=sending.course_of) as counted:
        for codec, calls in ((None, 1), ("fp8_block", 2), (None, 2), ("fp8_block", 2)):
            list(live.export(codec=codec))  # type: ignore[arg-type]
            assert counted.call_count == calls
    first = dict(live.export(codec="fp8_block"))
    with torch.no_grad():
        chunks[0].decoder.layers[0].mlp.linear_fc2.weight.mul_(2)
    odd = [name for name, tensor in live.export(codec="fp8_block") if not same_bytes(tensor, first[name])]
    assert odd == ["model.layers.0.mlp.down_proj.weight_scale_inv"], "values twice as large have the same codes"


def test_a_tower_beside_the_model_is_named_as_plain(tmp_path: Path) -> None:
    """Engines would read codes where an ignored module has values."""
    folder = make_wrapped("gemma3", tmp_path / "seeing")
    converted(folder, tmp_path, "fp8_block")
    chunks, live = loaded(folder)
    live.save(tmp_path / "saved", codec="fp8_block")
    assert read_config(tmp_path / "saved") == read_config(tmp_path / "hf")
    assert "vision_tower" in str(live.quantization_config("fp8_block"))
    del chunks


def test_refusals(tiny: Path) -> None:
    chunks, live = loaded(tiny / "llama")
    with pytest.raises(UsageError, match="`codec` 'nf4' is not known"):
        live.spec(codec="nf4")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="int4_group: no tensor takes it"):
        live.spec(codec="int4_group")
    with pytest.raises(UsageError, match="the source was not quantised"):
        live.spec(codec="same")
    with torch.no_grad():
        chunks[0].decoder.layers[1].mlp.linear_fc2.weight[3, 4] = torch.nan
    with pytest.raises(StorageError, match="NaN or infinite") as nan:
        list(live.export(codec="fp8_block"))
    assert "`model.layers.1.mlp.down_proj.weight`" in nan.value.details


@pytest.mark.parametrize("codec", ["fp8_channel", "fp8_tensor", "mxfp8", "nvfp4", "int8_channel"])
def test_a_folder_of_any_codec_comes_out_as_it_was(tiny: Path, tmp_path: Path, codec: str) -> None:
    """Its scales among it; and after a change, what a conversion of the changed values says of them."""
    expected = converted(tiny / "llama", tmp_path, codec)
    chunks, live = loaded(tmp_path / "hf")
    given = dict(live.export(codec="same"))
    assert given.keys() == expected.keys() and all(same_bytes(given[name], expected[name]) for name in expected)
    assert live.quantization_config("same") == read_config(tmp_path / "hf")["quantization_config"]
    with torch.no_grad():
        chunks[0].decoder.layers[0].mlp.linear_fc2.weight.mul_(3)
    odd = [name for name, tensor in live.export(codec="same") if not same_bytes(tensor, expected[name])]
    assert {name.rpartition(".")[0] for name in odd} == {"model.layers.0.mlp.down_proj"}
    assert any("scale" in name for name in odd)
    del chunks


@pytest.mark.parametrize("kind", ["FP8 blocks", "W8A16 group", "W4A16 channel", "GPTQ", "AWQ"])
def test_folders_of_other_tools_come_out_as_they_were(kind: str, tmp_path: Path) -> None:
    """Zeros and orders of inputs, which no value tells, among them; packed words lie across rows and travel late."""
    quantised(kind, tmp_path / "hf")
    stored, words = read_folder(tmp_path / "hf"), kind in ("GPTQ", "AWQ")
    chunks, live = loaded(tmp_path / "hf", Spread(dtype="fp16" if words else "bf16"))
    given = dict(live.export(codec="same"))
    assert given.keys() == stored.keys() and all(same_bytes(given[name], stored[name]) for name in stored)
    coding = live.coding("same")
    assert [len(coding.early), len(coding.late)] == ([0, 28] if words else [28, 0])
    del chunks


def test_a_config_says_what_an_export_is(tiny: Path, tmp_path: Path) -> None:
    converted(tiny / "llama", tmp_path, "nvfp4")
    chunks, live = loaded(tiny / "llama")
    assert live.quantization_config("nvfp4") == read_config(tmp_path / "hf")["quantization_config"]
    assert set(CODECS) == {"same", *FRESH}
    del chunks


def test_refusals_of_a_quantised_folder(tmp_path: Path) -> None:
    folder = make("deepseek_v3_fp8", tmp_path / "a")
    chunks, _ = loaded(folder)
    with pytest.raises(UsageError, match="nothing says which tensors"):
        attach(chunks, read_config(folder)).spec(codec="same")
    scale = {"model.layers.0.mlp.up_proj.input_scale": torch.ones(())}
    other = rewritten(folder, tmp_path / "b", {**read_folder(folder), **scale})
    with pytest.raises(
        UnsupportedError, match="has activation scales, first `model.layers.0.mlp.up_proj.input_scale`"
    ):
        attach(chunks, other).spec(codec="same")


def test_a_folder_saved_plainly_says_nothing_of_codes(tmp_path: Path) -> None:
    """Neither in config.json nor in ModelOpt's file beside it, by which engines would decode plain weights."""
    folder = make("deepseek_v3_fp8", tmp_path / "source")
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8_PB_WO"}}')
    chunks, live = loaded(folder)
    live.save(tmp_path / "plain")
    live.save(tmp_path / "coded", codec="same")
    assert "quantization_config" not in read_config(tmp_path / "plain")
    assert not (tmp_path / "plain" / "hf_quant_config.json").exists()
    assert read_config(tmp_path / "coded") == read_config(folder)
    assert (tmp_path / "coded" / "hf_quant_config.json").exists()
    del chunks
