"""A quantised folder computes what its conversion computes: decoded as declared, by Transformers or by mbx."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _planted import convert
from _stores import changed_hf, changed_mcore
from safetensors.torch import load_file, save_file

from converters.codecs import Fp8Block
from converters.errors import MbxError, UsageError
from fixtures.make_tiny import make
from mbx.proof.parity import Leg, ParityReport, parity
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run
from tests.formats._quantised import FOLDERS, quantised
from tests.formats.test_quantised_kinds import KINDS
from tests.formats.test_quantised_kinds import quantised as published

BLOCKS = (16, 32)
FC2 = "decoder.layers.mlp.linear_fc2.weight"
#: Folders by the name of what stores them; and those that are compared on every run.
MAKERS: dict[str, Callable[[str, Path], object]] = {
    **dict.fromkeys(FOLDERS, quantised),
    **dict.fromkeys(KINDS, published),
}
ALWAYS = ("fp8_tensor", "ModelOpt NVFP4")


def forward(report: ParityReport) -> Leg:
    return next(leg for leg in report.legs if leg.name == "forward")


def even_blocks(out: Path) -> Path:
    """FP8 in blocks that divide every weight, with scales that are no powers of two, as DeepSeek's."""
    make("qwen3", out)
    codec = Fp8Block(block=BLOCKS)
    stored: dict[str, torch.Tensor] = {}
    for key, tensor in load_file(out / "model.safetensors").items():
        if "_proj" in key:
            parts = codec.encode(tensor.float() * 1.0123)
            stored |= {part: parts[role] for role, part in codec.part_names(key).items()}
        else:
            stored[key] = tensor
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    said = {"quantization_config": {"quant_method": "fp8", "weight_block_size": list(BLOCKS)}}
    (out / "config.json").write_text(json.dumps({**json.loads((out / "config.json").read_text()), **said}))
    return out


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in MAKERS]
)
def test_every_kind_computes_what_it_is_decoded_to(name: str, tmp_path: Path) -> None:
    source, target, plain = (tmp_path / part for part in ("hf", "mcore", "plain"))
    MAKERS[name](name, source)
    run(plan_hf_to_mcore(source, target, Options(sync=False)))
    run(plan_mcore_to_hf(target, plain, Options(sync=False)))
    for sides in ((source, target), (plain, source)):
        found = forward(parity(*sides, forward=True))
        assert found.status == "passed", found
        assert ("decoded by mbx" in found.details[0]) == (name not in ("fp8_block_ue8m0", "mxfp4"))


def test_blocks_that_transformers_decodes_are_rounded_as_the_conversion_rounds_them(tmp_path: Path) -> None:
    source = even_blocks(tmp_path / "hf")
    run(plan_hf_to_mcore(source, tmp_path / "mcore", Options(sync=False)))
    found = forward(parity(source, tmp_path / "mcore", forward=True))
    assert found.status == "passed" and "decoded by mbx" not in found.details[0], found


def test_a_scale_that_is_read_wrongly_is_found_where_transformers_decodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The codec judges itself in the weights leg; Transformers' own decoding does not."""
    source = even_blocks(tmp_path / "hf")
    plain = Fp8Block.decode

    def slanted(self: Fp8Block, parts: dict[str, torch.Tensor], **how: torch.dtype) -> torch.Tensor:
        return plain(self, {**parts, "scale": parts["scale"] * 1.02}, **how)

    monkeypatch.setattr(Fp8Block, "decode", slanted)
    run(plan_hf_to_mcore(source, tmp_path / "mcore", Options(sync=False)))
    report = parity(source, tmp_path / "mcore", forward=True)
    assert {leg.name for leg in report.legs if leg.status == "failed"} == {"forward"}


@pytest.mark.parametrize("dtype", ["fp16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_a_cast_that_was_declared_of_codes_is_applied_to_them(dtype: str, tmp_path: Path) -> None:
    source = even_blocks(tmp_path / "hf")
    run(plan_hf_to_mcore(source, tmp_path / "mcore", Options(sync=False, dtype=dtype)))
    assert parity(source, tmp_path / "mcore", forward=True, dtype=dtype).proved


@pytest.fixture(scope="module")
def reexported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint that was trained on from a quantised folder, and its export with `--codec same`."""
    work = tmp_path_factory.mktemp("reexported")
    source = even_blocks(work / "hf")
    trained = changed_mcore(convert(source, work / "mcore"), work / "trained", lambda t: t[FC2].mul_(1.01))
    run(plan_mcore_to_hf(trained, work / "folder", Options(sync=False, codec="same")))
    return trained, work / "folder"


def test_an_export_that_encodes_again_is_held_to_its_codes(reexported: tuple[Path, Path], tmp_path: Path) -> None:
    trained, folder = reexported
    assert statuses(parity(trained, folder, forward=True))["weights"] == "failed", "a code stands for a rounded value"
    for sides in ((trained, folder), (folder, trained)):
        assert parity(*sides, forward=True, codec="same").proved
    name = "model.layers.1.mlp.down_proj.weight"
    for part, bit in ((name, 1), (f"{name}_scale_inv", 1 << 12)):
        wrong = changed_hf(folder, tmp_path / part, lambda t, part=part, bit=bit: flip(t[part], bit))
        report = parity(trained, wrong, codec="same")
        assert statuses(report)["weights"] == "failed" and report.first is not None and report.first.name == part
    missing = changed_hf(folder, tmp_path / "missing", lambda t: t.pop(f"{name}_scale_inv"))
    with pytest.raises(MbxError, match="scale"):
        parity(trained, missing, codec="same")


def test_a_codec_of_two_sides_of_one_kind_is_refused(reexported: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="one kind"):
        parity(reexported[1], reexported[1], codec="same")


def statuses(report: ParityReport) -> dict[str, str]:
    return {leg.name: leg.status for leg in report.legs}


def flip(tensor: torch.Tensor, bits: int) -> None:
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    tensor.view(kind).flatten()[5] ^= bits
