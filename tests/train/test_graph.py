"""When a run's passes are recorded as a CUDA graph, and that experts in one product are the experts one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mbx.train.lora.product import joined_factors, stacked
from mbx.train.model import experts
from mbx.train.model.blueprint import blueprint
from mbx.train.model.graphs import why_not
from mbx.train.model.parallel import Ranks
from mbx.train.recipe.catalogue import load_recipe
from mbx.train.run.graph import with_empty

GPU = Ranks(0, 1, 0, 1, "cuda", te=True)
BASE = ("model.init=random", "data.pack=false", "parallel.ep=1")


def reason(name: str, *overrides: str, ranks: Ranks = GPU) -> str | None:
    recipe = load_recipe(name, [*BASE, *overrides])
    return why_not(recipe, blueprint(recipe).config, ranks)


@pytest.mark.parametrize(
    ("name", "overrides", "word"),
    [
        ("qwen3_8b_lora", ("train.cuda_graph=off",), "cuda_graph"),
        ("gpt_oss_20b_lora", ("data.pack=true", "data.kind=chat"), "packed"),
        ("deepseek_v2_lite_lora", ("data.pack=true", "data.kind=chat"), "packed"),
        ("qwen3_8b_lora", ("parallel.pp=2",), "stages"),
        ("qwen3_8b_lora", ("parallel.cp=2",), "context"),
        ("qwen3_8b_lora", ("lora.dropout=0.1",), "dropout"),
        ("qwen3_8b_lora", ("train.recompute=full",), "recomputation"),
        ("qwen3_8b_lora", ("train.precision=fp16",), "fp16"),
        ("qwen3_8b_lora", ("fp8.recipe=delayed",), "delayed"),
        ("qwen3_8b_lora", ("fp8.recipe=nvfp4",), "at random"),
        ("vanilla_gpt", (), "dropout"),
    ],
)
def test_what_no_graph_holds_is_said(name: str, overrides: tuple[str, ...], word: str) -> None:
    assert word in str(reason(name, *overrides))


def test_the_rest_is_recorded() -> None:
    assert reason("qwen3_8b_lora") is None
    assert reason("qwen3_8b_lora", "data.pack=true", "data.kind=chat") is None
    assert reason("qwen3_8b_sft", "fp8.recipe=tensorwise", "parallel.tp=2") is None
    assert reason("qwen35_9b_lora", "data.pack=true", "data.kind=chat") is None  # its rows hold one example each
    assert reason("qwen3_8b_lora", ranks=replace(GPU, te=False)) and reason("qwen3_8b_lora", ranks=ALONE)
    assert reason("qwen3_30b_a3b_lora") is None
    assert reason("nemotron_h_8b_lora", "parallel.tp=1") is None


def test_a_recording_has_room_for_more_examples_than_a_row_has() -> None:
    """What is beyond them ends where they do: an example of no token each."""
    ends = torch.tensor([0, 3, 7, 8], dtype=torch.int32)
    assert with_empty(ends, 5).tolist() == [0, 3, 7, 8, 8, 8]
    assert torch.equal(with_empty(ends, 3), ends) and with_empty(ends, 5).dtype == torch.int32


ALONE = Ranks(0, 1, 0, 1, "cpu", te=False)


@pytest.mark.parametrize(
    "overrides",
    [("parallel.ep=2",), ("parallel.tp=2",), ("fp8.recipe=tensorwise",), ("lora.rank=0",), ("lora.rank=4",)],
)
def test_experts_that_are_no_single_product_wait(overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "experts" in str(reason("qwen3_30b_a3b_lora", *overrides))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    recipe = load_recipe("qwen3_30b_a3b_lora", list(BASE))
    assert not experts.joins_experts(recipe, blueprint(recipe).config, GPU)


def test_joined_experts_multiply_by_what_their_parameters_hold() -> None:
    """Weights are loaded into the parameters behind the joining; those that moved away are not multiplied."""
    pytest.importorskip("megatron.core")
    if not hasattr(F, "grouped_mm"):
        pytest.skip("this PyTorch has no grouped product on a CPU")
    from mbx.models.megatron.core.experts import Ends, _product, _stacked

    linear = torch.nn.Module()
    linear.num_gemms = 2  # type: ignore[assignment]
    for expert in range(2):
        linear.register_parameter(f"weight{expert}", torch.nn.Parameter(torch.randn(24, 16, dtype=torch.bfloat16)))
    held, ends = _stacked(linear), Ends(torch.tensor([1, 3], dtype=torch.int32))
    linear.bfloat16()
    loaded = [torch.randn(24, 16, dtype=torch.bfloat16) for _ in range(2)]
    for expert, value in enumerate(loaded):
        linear.get_parameter(f"weight{expert}").data.copy_(value)
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    found, _ = _product(linear, held, x, ends)
    assert torch.equal(found, torch.cat((F.linear(x[:1], loaded[0]), F.linear(x[1:], loaded[1]))))
    linear.float()
    with pytest.raises(RuntimeError, match="moved"):
        _product(linear, held, x, ends)


def test_one_product_is_the_experts_one_by_one() -> None:
    """Values and gradients of two chained products, an expert without tokens among them, and of joined factors."""
    pytest.importorskip("megatron.core")
    if not hasattr(F, "grouped_mm"):
        pytest.skip("this PyTorch has no grouped product on a CPU")
    from mbx.models.megatron.core.experts import Ends, grouped

    torch.manual_seed(0)
    counts = [4, 0, 6]
    ends = Ends(torch.tensor(counts).cumsum(0).to(torch.int32))
    assert ends.tolist() is ends
    x = torch.randn(10, 16, dtype=torch.bfloat16)
    a = torch.randn(3, 16, 16, dtype=torch.bfloat16, requires_grad=True)
    factors = [torch.randn(3, 24, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    layout = stacked([factor[0] for factor in factors])
    found = grouped(grouped(x, a, ends), joined_factors(factors, layout), ends)
    grads = torch.autograd.grad(found.float().square().sum(), [a, *factors])
    apart = torch.cat(
        [
            F.linear(F.linear(rows, a[expert]), joined_factors([own[expert] for own in factors], layout))
            for expert, rows in enumerate(torch.split(x, counts))
        ]
    )
    expected = torch.autograd.grad(apart.float().square().sum(), [a, *factors])
    assert torch.equal(found, apart)
    assert all(torch.equal(left, right) for left, right in zip(grads, expected, strict=True))
