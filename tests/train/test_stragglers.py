"""A rank that is slow at its own work is named; `make resiliency` brings the extension that scores it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from _trainings import Raw, raw, run_here, run_world

from converters.errors import UsageError
from mbx.installed import core_version
from mbx.train.recipe.parse import parse_recipe
from mbx.train.run import stragglers
from mbx.train.run.log import METRICS
from mbx.train.run.prepare import prepare
from mbx.train.run.report import write_report


def recipe(folder: Path, **parallel: object) -> Raw:
    run = {"save": False, "stragglers": 3}
    return raw(folder, train={"steps": 6}, parallel=parallel, run=run)


def reports(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / METRICS).read_text().splitlines())
    return [record for record in lines if record["kind"] == "stragglers"]


def place() -> str:
    """The folder that the extension lies in; the test is skipped without one."""
    found = pytest.importorskip(stragglers.PACKAGE, reason="not installed: `make resiliency` brings it")
    if core_version() != "0.16.1":
        pytest.skip(f"Megatron Core {core_version()} does not import beside it")
    return str(Path(found.__path__[0]).resolve().parent)


@pytest.mark.slow
def test_the_slow_rank_is_named(tmp_path: Path) -> None:
    """Rank 1 slows down behind the first report. Beside a rank of its stage it is slow; alone on its stage it is only
    slower than it was. What is learned is what was."""
    beside = place()
    jobs: list[dict[str, object]] = [
        {"recipe": recipe(tmp_path / "dp"), "slow": [1, 4, 0.3]},
        {"recipe": recipe(tmp_path / "pp", pp=2), "slow": [1, 4, 0.3]},
    ]
    dp, pp = run_world(2, [{**job, "beside": beside} for job in jobs], tmp_path / "losses.json")
    plain = recipe(tmp_path / "plain")
    assert dp == pytest.approx(run_here({**plain, "run": {**plain["run"], "stragglers": 0}}), rel=1e-4)
    assert pp == pytest.approx(dp, rel=1e-4)

    before, after = reports(tmp_path / "dp")
    assert (before["step"], after["step"]) == (3, 6)
    first, second = after["ranks"]
    assert (
        before["ranks"][1]["forward"]["own_best"] == pytest.approx(1)
        and before["ranks"][1]["forward"]["median_s"] < 0.3
    )
    assert second["forward"]["median_s"] > 0.3 and first["forward"]["relative"] == pytest.approx(1)
    assert second["forward"]["relative"] < 0.5 and second["forward"]["slow"] == ["relative", "individual"]
    want = first["forward"]["median_s"] / second["forward"]["median_s"]
    assert second["forward"]["relative"] == pytest.approx(want, rel=1e-5)
    assert 0 < second["rows"]["median_s"] < 0.3
    assert [text for text in after["slow"] if text.startswith("rank 1 ") and "forward passes take 0.3" in text]

    _, after = reports(tmp_path / "pp")
    assert [rank["forward"]["relative"] for rank in after["ranks"]] == pytest.approx([1, 1])
    assert after["ranks"][1]["forward"]["slow"] == ["individual"]
    assert any("times its own best" in text for text in after["slow"])
    page = write_report(tmp_path / "dp").read_text()
    assert "Slow, step 6: rank 1 (" in page and "of the fastest rank of its stage" in page


def test_a_validation_is_not_timed(tmp_path: Path) -> None:
    place()
    asked = recipe(tmp_path / "run")
    asked["train"] |= {"eval_every": 1, "eval_steps": 1, "steps": 3}
    passes: list[int] = []

    class Counting(stragglers.Stragglers):
        def step(self, number: int) -> None:
            passes.append(len(self._spans[stragglers.FORWARD]))
            super().step(number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mbx.train.run.loop.Stragglers", Counting)
        run_here(asked)
    assert passes == [4, 8, 12]  # four micro-batches a step


def test_without_the_extension_the_key_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stragglers, "install_line", str)
    monkeypatch.setattr(stragglers, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="run.stragglers is set, but nvidia-resiliency-ext is not installed") as error:
        prepare(parse_recipe(recipe(tmp_path / "run")))
    assert error.value.hint == "resiliency"  # the extra


@pytest.mark.parametrize(
    ("release", "strict", "refused"), [("0.4.1", True, True), ("0.4.1", False, False), ("0.6.0", True, False)]
)
def test_an_extension_that_megatron_core_does_not_take_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str, strict: bool, refused: bool
) -> None:
    """Whatever the recipe asks for: Megatron Core 0.19 imports the extension where it finds one, and asserts 0.6."""
    core = tmp_path / "core"
    (core / "dist_checkpointing" / "strategies").mkdir(parents=True)
    (core / "dist_checkpointing" / "strategies" / ("nvrx.py" if strict else "torch.py")).touch()
    monkeypatch.setattr(stragglers, "find_spec", lambda name: SimpleNamespace(origin=str(core / "__init__.py")))
    monkeypatch.setattr(stragglers, "version", lambda name: release)
    plain = parse_recipe(raw(tmp_path / "run"))
    if refused:
        with pytest.raises(UsageError, match=r"0\.4\.1 is installed, beside which .* takes 0\.6 or later"):
            stragglers.check_stragglers(plain)
    else:
        stragglers.check_stragglers(plain)
