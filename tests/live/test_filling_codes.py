"""Parameters that hold codes, filled with values: what each quantises of the values that a plain one would hold."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from _float8 import CurrentScaling, Float8Quantizer, coded
from _models import build, read_folder, same_bytes, scramble
from torch import nn

from converters.errors import UnsupportedError
from fixtures.make_tiny import make
from mbx.live import attach
from mbx.live.staging import Staging
from mbx.models.device import Spread
from mbx.models.megatron.core.cpu import megatron_on_cpu
from mbx.models.megatron.processes import process_group
from mbx.run.job import Options, plan_hf_to_mcore, run

BF16 = Spread(dtype="bf16")
#: Cut in three by names, in two by Megatron Core, and whole; of experts too.
ENDS = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with megatron_on_cpu(), process_group():
        yield


@pytest.mark.parametrize("way", ["folder", "mcore", "pairs"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_codes_are_of_the_values_that_are_loaded(family: str, way: str, tmp_path: Path) -> None:
    """In place, by the parameter itself, as soon as it has all of them: no second model lies beside."""
    folder = make(family, tmp_path / "hf")
    plain, chunks = build(folder, BF16), build(folder, BF16)
    attach(plain, folder).load(folder)
    scramble(chunks)
    codes = coded(chunks[0], CurrentScaling(), ends=ENDS)
    before = {name: (one.codes.data_ptr(), one.scale.data_ptr(), one.scale.clone()) for name, one in codes.items()}
    drawn = {name: torch.zeros_like(one.codes, dtype=torch.bfloat16) for name, one in codes.items()}
    for name, one in list(codes.items())[1:]:
        one.get_high_precision_init_val = partial(drawn.get, name)  # type: ignore[attr-defined]
    tensors = read_folder(folder)
    if way == "mcore":
        run(plan_hf_to_mcore(folder, tmp_path / "mcore", Options(sync=False)))
    source = {"folder": folder, "mcore": tmp_path / "mcore", "pairs": iter(tensors.items())}[way]
    live, most = attach(chunks, folder), 0
    wrote = Staging.wrote

    def counted(self: Staging, shard: object) -> None:
        nonlocal most
        most = max(most, len(self._staged))
        wrote(self, shard)  # type: ignore[arg-type]

    with patch.object(Staging, "wrote", counted):
        live.load(source)
    assert 0 < most <= 4 + 2, "one for each thread of an engine, and those between two of its pieces"
    values, now = dict(plain[0].named_parameters()), dict(chunks[0].named_parameters())
    assert len(codes) > 8
    for name, one in codes.items():
        assert now[name] is one
        expected = coded(holding(values[name]), CurrentScaling(), ends=("weight",))["weight"]
        assert same_bytes(one.codes, expected.codes) and torch.equal(one.scale, expected.scale), name
        assert one.transposed is not None and same_bytes(one.transposed, one.codes.t())
        assert before[name][:2] == (one.codes.data_ptr(), one.scale.data_ptr())
        assert not torch.equal(before[name][2], one.scale)
        if hasattr(one, "get_high_precision_init_val"):
            assert same_bytes(drawn[name], values[name]), "what an optimizer would begin with"
    odd = [name for name in values if name not in codes and not same_bytes(values[name], now[name])]
    assert odd == []
    given = dict(live.export())
    other = {name for name in tensors if not same_bytes(given[name], tensors[name])}
    assert other and all(".layers." in name and "norm" not in name for name in other)


def holding(values: torch.Tensor) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(values.detach().clone(), requires_grad=False)
    return module


def test_scales_that_do_not_follow_from_values_take_none(tiny: Path) -> None:
    """Before anything is written."""
    chunks = build(tiny / "llama", BF16)
    codes = coded(chunks[0], Float8Quantizer(), ends=("linear_fc1.weight",))
    kept = {name: one.codes.clone() for name, one in codes.items()}
    norms = {name: p.detach().clone() for name, p in chunks[0].named_parameters() if "norm" in name}
    live = attach(chunks, tiny / "llama")
    for source in (tiny / "llama", iter(read_folder(tiny / "llama").items())):
        with pytest.raises(UnsupportedError, match="has delayed scaling, whose scale is of earlier steps"):
            live.load(source)
    for one in codes.values():
        one._quantizer = None
    with pytest.raises(UnsupportedError, match="has no quantiser"):
        live.load(tiny / "llama")
    assert all(same_bytes(kept[name], one.codes) for name, one in codes.items())
    now = dict(chunks[0].named_parameters())
    assert all(same_bytes(value, now[name]) for name, value in norms.items())
