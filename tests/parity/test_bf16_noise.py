"""Most likely tokens must agree where the reference's margin is over twice what bf16 changes, whatever the limit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from converters.rows.config_spelling import canonical
from fixtures.make_tiny import make
from mbx.cli import main
from mbx.formats.hf import read_config
from mbx.models.device import Spread
from mbx.models.forward.bf16_noise import outside_noise
from mbx.models.forward.logits import LogitTally
from mbx.models.forward.models import TransformersModel
from mbx.models.forward.parity import Forward, compare_models
from mbx.models.pictures import Seen
from mbx.models.prompts import Batch, Passes, Prompts, passes
from mbx.models.trace import Trace
from mbx.models.transformers.tracing import trace_transformers

#: Every kind of layer that bf16 could break: dense, experts, experts with sinks, latent attention, two rotary bases.
FAMILIES = ("llama", "qwen3_moe", "gpt_oss", "deepseek_v3", "gemma3_text")


def planted(other: torch.Tensor, *, step: int = 2) -> tuple[bool, tuple[int, ...], int]:
    """Three tokens at two positions, whose best two are 1.0 and 0.1 apart, under a noise of 0.2."""
    exact = torch.tensor([[3.0, 0.0, 2.0], [3.0, 0.0, 2.9]])
    rounded = exact + torch.tensor([0.2, 0.0, -0.1])
    tally = LogitTally(tolerance=10)
    tally.add(exact, other)
    diff = tally.result()
    noise = outside_noise(
        lambda first, last: exact[:, first:last],
        lambda first, last: rounded[:, first:last],
        list(diff.other_top1),
        [(first, min(3, first + step)) for first in range(0, 3, step)],
    )
    assert noise.largest == pytest.approx(0.2) and noise.num_positions == 2
    return replace(diff, noise=noise).ok, noise.disagreements, noise.outside


@pytest.mark.parametrize("step", [1, 2, 3])
def test_another_token_fails_outside_the_noise_and_not_inside(step: int) -> None:
    assert planted(torch.tensor([[3.0, 0.0, 2.0], [3.0, 0.0, 2.9]]), step=step) == (True, (), 1)
    assert planted(torch.tensor([[3.0, 0.0, 2.0], [2.9, 0.0, 3.0]]), step=step) == (True, (), 1)
    assert planted(torch.tensor([[2.0, 0.0, 3.0], [3.0, 0.0, 2.9]]), step=step) == (False, (0,), 1)


@dataclass(frozen=True, slots=True)
class Turned:
    """A library whose order of the vocabulary is turned at one position."""

    path: Path
    position: int
    title: str = field(default="another library", init=False)

    def trace(self, batches: Sequence[Batch], vocab: int, spread: Spread, seen: Sequence[Seen | None] = ()) -> Trace:
        """The pass of Transformers, with that one position's logits negated."""
        found = trace_transformers(self.path, batches)

        def head(first: int, last: int) -> torch.Tensor:
            logits = found.head(first, last)
            logits[self.position] *= -1
            return logits

        return replace(found, head=head)


def compared(folder: Path, second: object, tolerance: float = 1e-4) -> Forward:
    config = canonical(read_config(folder))
    vocab = int(str(config["vocab_size"]))
    read: Passes = passes(Prompts(num_prompts=1, num_tokens=32), folder, config, vocab_size=vocab)
    found = compare_models(TransformersModel(folder), second, read, vocab, tolerance=tolerance)  # type: ignore[arg-type]
    assert found is not None and found.forward is not None
    return found.forward


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_model_runs_in_bf16(name: str, tmp_path: Path) -> None:
    folder = make(name, tmp_path / "hf")
    found = compared(folder, TransformersModel(folder))
    noise = found.diff.noise
    assert noise is not None and found.diff.ok and noise.largest > 1e-3
    assert noise.num_positions == 32 and 0 < noise.outside < 32 and noise.agreement == 1


def test_a_generous_limit_does_not_excuse_another_token(tiny: Path) -> None:
    seen = set()
    for position in range(4):
        found = compared(tiny / "llama", Turned(tiny / "llama", position), tolerance=1e3)
        assert found.diff.noise is not None and found.diff.other_top1 == (position,)
        assert found.diff.noise.disagreements in ((), (position,))
        assert found.diff.ok == (not found.diff.noise.disagreements)
        seen.add(found.diff.ok)
    assert False in seen


def test_the_figure_is_printed_and_in_the_document(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tiny / "llama")
    assert main(["verify", "parity", folder, folder, "--forward", "--json"]) == 0
    leg = json.loads(capsys.readouterr().out)["legs"]["forward"]
    figures = leg["figures"]
    assert figures["bf16_noise"] > 0 and figures["top1_agreement_outside_noise"] == 1
    assert 0 < figures["outside_noise"] < figures["near_positions"] == 96 <= figures["positions"]
    of = f"(of {figures['outside_noise']} of 96 positions outside bf16 noise {figures['bf16_noise']:.2g})"
    assert f"top-1 100.00% {of}" in leg["summary"]
