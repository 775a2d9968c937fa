"""Behind the original context the limit is what fp32 rotary positions allow, measured in the same run, and no more."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from _planted import copy
from transformers import LlamaConfig, LlamaForCausalLM

from mbx.models.device import Spread
from mbx.models.forward.logits import LogitDiff
from mbx.models.forward.models import TransformersModel
from mbx.models.forward.parity import FORWARD_TOLERANCE, Forward, compare_models
from mbx.models.pictures import Seen
from mbx.models.prompts import Batch, Passes, Prompts, passes
from mbx.models.trace import Trace
from mbx.models.transformers.shallow import PartialTransformers
from mbx.models.transformers.tracing import nudge_frequencies, trace_transformers

VOCAB = 256
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers with the heads and the rotary constants of Llama 3.1, and logits of its size."""
    rope = {**SCALING, "rope_theta": 500000.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
        max_position_embeddings=131072,
        rope_parameters=rope,
        initializer_range=0.08,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def read(folder: Path) -> Passes:
    config = {"rope_scaling": {**SCALING, "original_max_position_embeddings": 8192}}
    return passes(Prompts(num_prompts=1, num_tokens=32), folder, config, vocab_size=VOCAB)


@dataclass(frozen=True, slots=True)
class Rounded:
    """A right library that rounds some frequencies otherwise; `off`: one position's logits are wrong by so much."""

    path: Path
    off: tuple[int, float] = (0, 0.0)
    title: str = field(default="another library", init=False)

    def trace(self, batches: Sequence[Batch], vocab: int, spread: Spread, seen: Sequence[Seen | None] = ()) -> Trace:
        """The pass, with other frequencies: those of `downwards`."""
        found = trace_transformers(self.path, batches, nudged=True)

        def head(first: int, last: int) -> torch.Tensor:
            logits = found.head(first, last)
            logits[self.off[0]] += self.off[1]
            return logits

        return replace(found, head=head)


@pytest.fixture(scope="module")
def floor(llama: Path) -> float:
    """The largest |Δlogit| that one unit in the last place of the frequencies makes."""
    found = compared(llama, Rounded(llama))
    return found.diff.max_abs


def compared(folder: Path, second: object) -> Forward:
    found = compare_models(TransformersModel(folder), second, read(folder), VOCAB)  # type: ignore[arg-type]
    assert found is not None and found.forward is not None
    return found.forward


@pytest.fixture
def downwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second library has every other frequency one unit lower; the floor is measured with all one unit higher."""
    import mbx.models.transformers.tracing as side

    turn = iter([True])

    def nudge(model: torch.nn.Module) -> int:
        if next(turn, False):
            for name, buffer in model.named_buffers():
                if name.endswith("inv_freq"):
                    buffer[::2] = torch.nextafter(buffer, torch.zeros_like(buffer))[::2]
            return 1
        return nudge_frequencies(model)

    monkeypatch.setattr(side, "nudge_frequencies", nudge)


def test_one_unit_of_the_frequencies_is_seen_far_away_and_not_near(llama: Path) -> None:
    batches = read(llama).batches
    plain, moved = trace_transformers(llama, batches), trace_transformers(llama, batches, nudged=True)
    apart = (plain.head(0, VOCAB) - moved.head(0, VOCAB)).abs().amax(-1)
    far = read(llama).far
    assert far.tolist() == [False] * 48 + [True] * 16
    assert float(apart[~far].max()) < FORWARD_TOLERANCE / 4 < FORWARD_TOLERANCE < float(apart[far].max())
    # Frequencies are all there is to nudge, and each is nudged by one unit.
    one = PartialTransformers(llama).frame([0])
    before = {name: buffer.clone() for name, buffer in one.named_buffers()}
    assert nudge_frequencies(one) == sum(buffer.numel() for buffer in before.values()) > 0
    for name, buffer in one.named_buffers():
        assert torch.equal(buffer.view(torch.int32), before[name].view(torch.int32) + 1)


def test_a_library_that_rounds_otherwise_passes_and_the_floor_is_said(llama: Path, downwards: None) -> None:
    found = compared(llama, Rounded(llama))
    assert found.diff.max_abs > FORWARD_TOLERANCE and found.diff.far is not None
    assert found.diff.ok, found.summary
    assert f"{found.diff.far.tolerance:.2e} from position 8192" in found.summary
    assert "the floor of fp32, measured here" in " ".join(found.details)


@pytest.mark.parametrize("position", [5, 40, 63])
def test_a_defect_larger_than_the_floor_fails_wherever_it_is(llama: Path, downwards: None, position: int) -> None:
    """Near positions keep their limit (in the far pass too): there, a hundredth of what is allowed far away fails."""
    size = 0.05 if position == 63 else 3e-4
    found = compared(llama, Rounded(llama, off=(position, size)))
    assert not found.diff.ok
    assert (found.diff.far is None) == (position < 48), "nothing is allowed far away where near positions fail"


@pytest.mark.parametrize(("setting", "value"), [("factor", 8.4), ("high_freq_factor", 4.2), ("rope_theta", 500050.0)])
def test_a_wrong_constant_fails_by_a_wide_margin(
    llama: Path, floor: float, tmp_path: Path, setting: str, value: float
) -> None:
    """Factors off by a twentieth, a base by a ten-thousandth."""
    other = copy(llama, tmp_path / "hf")
    config = json.loads((other / "config.json").read_text())
    config["rope_parameters"][setting] = value
    (other / "config.json").write_text(json.dumps(config))
    found = compared(llama, TransformersModel(other))
    assert not found.diff.ok and found.diff.max_abs > 10 * floor


def test_what_is_not_finite_is_no_rounding(llama: Path) -> None:
    found = compared(llama, Rounded(llama, off=(63, float("nan"))))
    assert not found.diff.ok and found.diff.far is None and found.diff.has_nan


def test_the_limit_counts_beside_the_positions() -> None:
    passed = LogitDiff(5e-5, 0.0, 1.0, None, False, 2, 1e-4, (0.0, 5e-5))
    assert passed.ok and not replace(passed, max_abs=2e-4).ok
