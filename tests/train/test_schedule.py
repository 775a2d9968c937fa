"""Learning rates are Megatron Core's own scheduler's, at every step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mbx.train.recipe.sections import Optim
from mbx.train.run.schedule import learning_rate, warmup_steps


@pytest.mark.parametrize(
    ("style", "warmup", "decay"),
    [("cosine", 0, 0), ("cosine", 3, 0), ("cosine", 2, 12), ("linear", 4, 0), ("linear", 0, 15), ("constant", 5, 0)],
)
def test_equals_megatron_core(style: str, warmup: int, decay: int) -> None:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    steps = 20
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    for group in optimizer.param_groups:
        group |= {"max_lr": 3e-4, "min_lr": 3e-5, "lr_mult": 1.0, "wd_mult": 1.0}
    oracle = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=3e-4,
        min_lr=3e-5,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay or steps,
        lr_decay_style=style,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )
    optim = Optim(lr=3e-4, min_lr=3e-5, schedule=style, warmup_steps=warmup, decay_steps=decay)
    for step in range(steps):
        assert learning_rate(optim, step, steps) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        oracle.step(1)


def test_warm_up_is_a_share_or_a_number_of_steps() -> None:
    assert warmup_steps(Optim(warmup_fraction=0.04), 500) == 20
    assert warmup_steps(Optim(warmup_fraction=0.04), 4) == 0
    assert warmup_steps(Optim(warmup_fraction=0.04, warmup_steps=3), 500) == 3
    assert warmup_steps(Optim(warmup_fraction=0.04, warmup_steps=0), 500) == 0
    shared, counted = Optim(lr=1.0, warmup_fraction=0.1), Optim(lr=1.0, warmup_steps=10)
    assert [learning_rate(shared, s, 100) for s in range(100)] == [learning_rate(counted, s, 100) for s in range(100)]


def test_wsd_holds_then_falls() -> None:
    optim = Optim(lr=1.0, min_lr=0.1, schedule="wsd", warmup_steps=10, decay_steps=20)
    rates = [learning_rate(optim, step, 100) for step in range(100)]
    assert rates[5] == 0.5
    assert set(rates[10:81]) == {1.0}
    assert rates[90] == pytest.approx(0.55)
    assert rates[99] > 0.1


@given(
    st.sampled_from(["cosine", "linear", "constant", "wsd"]),
    st.integers(1, 200),
    st.integers(0, 50),
    st.integers(0, 300),
)
def test_rates_stay_between_bounds(style: str, steps: int, warmup: int, decay: int) -> None:
    optim = Optim(lr=1.0, min_lr=0.25, schedule=style, warmup_steps=min(warmup, steps), decay_steps=decay)
    rates = [learning_rate(optim, step, steps) for step in range(steps)]
    tail = rates[optim.warmup_steps :]
    assert all(0 <= rate <= 1.0 for rate in rates)
    assert all(rate >= 0.25 - 1e-12 for rate in tail)
    assert tail == sorted(tail, reverse=True)
