"""Every planted defect is found by the leg that should find it, and no correct pair is accused (`make defects`)."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from _defects import DEFECTS, Defect
from _planted import convert
from _stores import changed_hf, changed_mcore, per_layer, read_mcore, write_mcore

from converters.mcore.layout import Layout
from fixtures.make_tiny import make
from mappings import table_text
from mbx.models.prompts import Prompts
from mbx.proof.parity import ParityReport, parity
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run
from mbx.run.reshard import plan_mcore_to_mcore

LEGS = ("cover", "config", "weights", "forward")
SHORT = Prompts(num_prompts=1, num_tokens=24)
#: Forward passes cost a second each: these are always run, the others with `-m slow`.
_ALWAYS = ("row: gate and up", "row: scaling of positions dropped")


def cases() -> list[object]:
    marks = [pytest.mark.slow if d.needs_forward and d.name not in _ALWAYS else () for d in DEFECTS]
    return [pytest.param(d, id=d.name, marks=mark) for d, mark in zip(DEFECTS, marks, strict=True)]


class Confusion:
    """Which leg should have found a defect, and which did."""

    def __init__(self) -> None:
        self.found: Counter[tuple[str, str]] = Counter()
        self.planted: Counter[str] = Counter()
        self.kinds: dict[str, list[bool]] = {}
        self.causes = self.correct = self.accused = 0

    def note(self, defect: Defect, report: ParityReport) -> None:
        leg = defect.leg
        self.planted[leg] += 1
        if defect.kind:
            found = any(one.name == leg and one.status == "failed" for one in report.legs)
            self.kinds.setdefault(defect.kind, []).append(found)
        for found in report.legs:
            self.found[leg, found.name] += found.status == "failed"
        self.causes += any(d.cause for d in report.differences)

    def lines(self) -> Iterator[str]:
        yield "planted for    defects  " + "".join(f"{leg:>9}" for leg in LEGS) + "   missed"
        for leg in LEGS:
            seen = "".join(f"{self.found[leg, other]:>9}" for other in LEGS)
            yield f"{leg:<14}{self.planted[leg]:>8}  {seen}{self.planted[leg] - self.found[leg, leg]:>9}"
        yield f"{'all':<14}{sum(self.planted.values()):>8}   a likely cause was named for {self.causes}"
        yield f"correct pairs {self.correct:>8}   accused: {self.accused}"
        yield f"{'planted in several families':<45}{'planted':>8}{'found':>8}{'missed':>8}"
        for kind, found in self.kinds.items():
            yield f"{kind:<45}{len(found):>8}{sum(found):>8}{len(found) - sum(found):>8}"


@pytest.fixture(scope="module")
def confusion(request: pytest.FixtureRequest) -> Iterator[Confusion]:
    table = Confusion()
    yield table
    plugins = request.config.pluginmanager
    reporter, capture = plugins.get_plugin("terminalreporter"), plugins.get_plugin("capturemanager")
    if reporter is not None and capture is not None and request.config.get_verbosity() >= 0:
        with capture.global_and_fixture_disabled():
            reporter.write_line("")
            for line in table.lines():
                reporter.write_line(line)


class Bases:
    """Tiny checkpoints and their conversions, made when first asked for."""

    def __init__(self, tiny: Path, work: Path) -> None:
        self.tiny, self.work = tiny, work

    def hf(self, name: str) -> Path:
        if (self.tiny / name).is_dir():
            return self.tiny / name
        folder = self.work / name
        if not folder.is_dir():
            if name == "llama_tied_head":  # the same with its output layer stored beside the embedding
                changed_hf(
                    self.hf("llama_tied"),
                    folder,
                    lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
                )
            else:
                make(name, folder)
        return folder

    def mcore(self, name: str) -> Path:
        target = self.work / f"{name}_mcore"
        return target if target.is_dir() else convert(self.hf(name), target)


@pytest.fixture(scope="module")
def bases(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tiny, tmp_path_factory.mktemp("bases"))


def own_table(defect: Defect, folder: Path) -> str:
    """The shipped table with the defect's texts replaced."""
    text = table_text(defect.base)
    for old, new in defect.row:
        assert old in text, f"the table of {defect.base} says {old!r} no more"
        text = text.replace(old, new)
    path = folder / f"own_{defect.base}.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def planted(defect: Defect, bases: Bases, work: Path) -> ParityReport:
    """The report of a check of the defect, by what a user would run."""
    folder, mapping = bases.hf(defect.base), None
    if defect.row:
        mapping = own_table(defect, work)
        checkpoint = convert(folder, work / "mcore", mapping)
    elif defect.beside is not None:
        checkpoint = Path(shutil.copytree(bases.mcore(defect.base), work / "mcore"))
        defect.beside(checkpoint / "iter_0000000")
    else:
        checkpoint = changed_mcore(bases.mcore(defect.base), work / "mcore", defect.change or (lambda t: None))
    if defect.config:
        path = checkpoint / "iter_0000000" / "hf" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **defect.config}))
    if defect.folder is not None:
        folder = changed_hf(folder, work / "hf", defect.folder)
    return parity(folder, checkpoint, forward=defect.needs_forward, mapping=mapping, prompts=SHORT)


@pytest.mark.parametrize("defect", cases())
def test_a_planted_defect_is_found_by_its_leg(
    defect: Defect, bases: Bases, confusion: Confusion, tmp_path: Path
) -> None:
    report = planted(defect, bases, tmp_path)
    confusion.note(defect, report)
    failed = {leg.name for leg in report.legs if leg.status == "failed"}
    assert defect.leg in failed and not report.passed
    if defect.row:
        assert failed == {"forward"}, "a table cannot judge itself: only the other implementation sees this"
    if defect.config or defect.beside:
        assert failed == {"config"}
    named = {found.name for found in report.differences}
    assert bool(named) == (defect.leg == "weights" and defect.folder is None) or defect.leg == "cover"


def test_the_catalogue_is_large_enough_and_reaches_every_leg() -> None:
    assert len(DEFECTS) >= 40 and len({defect.name for defect in DEFECTS}) == len(DEFECTS)
    assert {defect.leg for defect in DEFECTS} == set(LEGS)
    families = Counter(defect.kind for defect in DEFECTS if defect.kind)
    assert len(families) >= 12 and min(families.values()) >= 5


LAYOUTS = (Layout(), Layout(tp=2, vocab_divisor=64), Layout(pp=2), Layout(tp=4, pp=2))
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "llama_tied", "llama_tied_head", "qwen3_moe", "deepseek_v3", "gemma")


@pytest.mark.parametrize("name", FAMILIES)
def test_correct_pairs_are_not_accused(name: str, bases: Bases, confusion: Confusion, tmp_path: Path) -> None:
    folder, reports = bases.hf(name), []
    checkpoints = []
    for number, layout in enumerate(LAYOUTS):
        if name == "deepseek_v3" and layout.pp > 1:  # three layers and a prediction head do not come out even
            continue
        if name in ("qwen2", "gemma") and layout.tp > 1:  # fewer key heads than ranks
            continue
        if name == "qwen2" and layout.pp > 1:  # three layers
            continue
        run(plan_hf_to_mcore(folder, target := tmp_path / f"mcore{number}", Options(layout=layout, sync=False)))
        checkpoints.append(target)
        reports += [parity(folder, target), parity(target, checkpoints[0])]
    run(plan_mcore_to_hf(checkpoints[-1], tmp_path / "back", Options(sync=False)))
    reports.append(parity(folder, tmp_path / "back"))
    apart = write_mcore(
        per_layer(read_mcore(checkpoints[0])), tmp_path / "apart", bases.mcore(name) / "iter_0000000/hf"
    )
    reports += [parity(folder, apart), parity(apart, checkpoints[-1])]
    if name in ("llama", "qwen3"):
        run(plan_mcore_to_mcore(checkpoints[0], tmp_path / "legacy", Options(format="torch", sync=False)))
        reports += [parity(folder, tmp_path / "legacy"), parity(tmp_path / "legacy", apart)]
        reports.append(parity(folder, checkpoints[1], forward=True, loss=True, prompts=SHORT))
    confusion.correct += len(reports)
    confusion.accused += sum(not report.proved for report in reports)
    assert all(report.proved for report in reports), [
        (report.left, report.right, leg) for report in reports for leg in report.legs if leg.status != "passed"
    ]
