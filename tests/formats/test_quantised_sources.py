"""Quantised Hugging Face folders: decoded on import, exported plainly, equal to what Transformers would compute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.errors import CoverageError
from converters.mcore.layout import Layout
from fixtures.make_tiny import make
from mbx.cli.plan_view import document
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def fp8_blocks(weight: torch.Tensor, scale: torch.Tensor, block: int) -> torch.Tensor:
    """Block-wise product written out; sizes need not be multiples of the block."""
    wide = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return (weight.float() * wide[: weight.shape[0], : weight.shape[1]]).bfloat16()


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    """What the folder's tensors stand for, without mbx."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stored, out = tensors(folder), {}
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    for name, tensor in stored.items():
        if name + "_scale_inv" in stored:
            out[name] = fp8_blocks(tensor, stored[name + "_scale_inv"], quantization["weight_block_size"][0])
        elif name.endswith("_blocks"):
            logical = name.removesuffix("_blocks")
            out[logical] = convert_moe_packed_tensors(tensor, stored[logical + "_scales"])
        elif not name.endswith(("_scale_inv", "_scales")):
            out[name] = tensor
    return out


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", ["deepseek_v3_fp8", "gpt_oss_mxfp4"])
def test_a_quantised_folder_comes_back_decoded(tmp_path: Path, name: str, tp: int) -> None:
    source = make(name, tmp_path / "source", shards=3)
    job = plan_hf_to_mcore(source, tmp_path / "mcore", Options(layout=Layout(tp=tp)))
    shown = document(job)["dtypes"]
    codec = "mxfp4" if "mxfp4" in name else "fp8_block"
    assert shown["changes"] == [{"from": codec, "to": "BF16", "count": len(job.plan.encoded)}]
    assert shown["source"].keys() - {"BF16", "F32"} == {"U8" if "mxfp4" in name else "F8_E4M3"}
    run(job)
    back = plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "hf", Options())
    assert any("quantization_config" in note for note in back.plan.notes)
    run(back)
    wanted, got = decoded(source), tensors(tmp_path / "hf")
    assert got.keys() == wanted.keys()
    assert [n for n in got if got[n].dtype != wanted[n].dtype or not torch.equal(got[n], wanted[n])] == []
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    original = json.loads((source / "config.json").read_text())
    del original["quantization_config"]
    assert config == original


def test_a_scale_may_lie_in_another_shard(tmp_path: Path) -> None:
    source = make("deepseek_v3_fp8", tmp_path / "source")
    whole = load_file(source / "model.safetensors")
    scales = {n: t for n, t in whole.items() if n.endswith("_scale_inv")}
    rest = {n: t for n, t in whole.items() if n not in scales}
    (source / "model.safetensors").unlink()
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for file, part in zip(names, (rest, scales), strict=True):
        save_file(part, source / file, metadata={"format": "pt"})
    weight_map = {n: names[n in scales] for n in whole}
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    run(plan_hf_to_mcore(source, tmp_path / "mcore", Options()))
    run(plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "hf", Options()))
    wanted, got = decoded(source), tensors(tmp_path / "hf")
    assert {n for n in wanted if not torch.equal(got[n], wanted[n])} == set()


def test_a_weight_without_its_scale_is_refused(tmp_path: Path) -> None:
    source = make("deepseek_v3_fp8", tmp_path / "source")
    whole = load_file(source / "model.safetensors")
    lost = next(n for n in whole if n.endswith("_scale_inv"))
    del whole[lost]
    save_file(whole, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CoverageError):
        plan_hf_to_mcore(source, tmp_path / "mcore", Options())


def test_a_repeated_tensor_may_be_stored_by_a_codec(tmp_path: Path) -> None:
    """The multi-token prediction head's embedding repeats the model's: codes and scales must be the same."""
    source = make("deepseek_v3_fp8", tmp_path / "source")
    held = tensors(source)
    repeats = [name for name in held if name.endswith("embed_tokens.weight")]
    assert len(repeats) == 2
    for name in repeats:
        held[name] = (held[name].float() / 0.01).clamp(-448, 448).to(torch.float8_e4m3fn)
        held[name + "_scale_inv"] = torch.full((16, 2), 0.01)
    save_file(held, source / "model.safetensors", {"format": "pt"})
    run(plan_hf_to_mcore(source, tmp_path / "mcore", Options()))
    run(plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "same", Options(codec="same")))
    same = tensors(tmp_path / "same")
    assert same.keys() == held.keys()
    assert all(torch.equal(same[n].view(torch.uint8), t.view(torch.uint8)) for n, t in held.items() if t.dim())
    held[repeats[1] + "_scale_inv"][3, 1] = 0.02
    save_file(held, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CoverageError, match="should repeat `model.embed_tokens.weight`, and does not"):
        run(plan_hf_to_mcore(source, tmp_path / "other", Options()))
    assert not (tmp_path / "other").exists()
