"""Kinds of quantised folders that no codec reads: refused by name, with the way out, before a byte is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mbx.cli import main
from tests.formats._quantised import Stored, compressed, stored_as
from tests.formats.test_quantised_kinds import AWQ, awq, fp8_tensor, int4_rows, nvfp4


def with_zeros(weight: torch.Tensor) -> Stored:
    """compressed-tensors' asymmetric codes: zero points beside the scales."""
    parts, value = int4_rows(weight)
    return {**parts, "weight_zero_point": torch.zeros(-(-len(weight) // 8), 1, dtype=torch.int32)}, value


def in_order(weight: torch.Tensor) -> Stored:
    """`actorder: group`: which group an input is of."""
    parts, value = int4_rows(weight)
    return {**parts, "weight_g_idx": torch.zeros(weight.shape[1], dtype=torch.int32)}, value


def llm_int8(weight: torch.Tensor) -> Stored:
    """bitsandbytes in 8 bits: int8 rows, and the largest value of each."""
    largest = weight.float().abs().amax(1)
    codes = (weight.float() / largest[:, None] * 127).round().to(torch.int8)
    return {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}, weight


def mixed(weight: torch.Tensor) -> Stored:
    """ModelOpt, with an algorithm a layer."""
    return nvfp4(weight) if weight.shape[0] % 32 else fp8_tensor("weight_scale", weight)


#: As their libraries store them: how, `quantization_config`, whether it stands apart, and the words of the refusal.
NOT_READ: dict[str, tuple[Callable[[torch.Tensor], Stored], dict[str, object], bool, str]] = {
    "asymmetric INT4": (with_zeros, compressed("pack-quantized", 4, "int", strategy="channel", symmetric=False), False,
                        "symmetric False"),
    "INT4 by activations": (in_order, compressed("pack-quantized", 4, "int", strategy="channel", actorder="group"),
                            False, "actorder group"),
    "bitsandbytes INT8": (llm_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, False,
                          "bitsandbytes in 8 bits"),
    "ModelOpt, mixed": (mixed, {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"model.layers.0.mlp.up_proj": {
                        "quant_algo": "FP8"}}}, True, "quant_algo: MIXED_PRECISION"),
    "AWQ, gemv": (awq, {**AWQ, "version": "gemv"}, False, "version gemv"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_READ)
def test_a_folder_of_a_kind_that_is_not_read_is_refused_by_name(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, quantization, apart, words = NOT_READ[name]
    source = tmp_path / "source"
    stored_as(store, quantization, source, apart=apart)
    for flags in ([], ["--dry-run"]):
        code = main(["convert", "hf-to-mcore", str(source), str(tmp_path / "mcore"), *flags])
        said = " ".join(capsys.readouterr().err.split())
        assert code == 3 and words in said, said
        assert "hint: dequantise it with the library that wrote it" in said and "allow-unused" not in said
    assert sorted(tmp_path.iterdir()) == [source]
