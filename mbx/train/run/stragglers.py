"""Ranks that are slow at their own work, which NVIDIA's resiliency extension scores (extra `resiliency`).

A rank that waits is as slow as the one that it waits for, so what is timed is what a rank does by itself: making a
micro-batch, and passing it forward. Stages of a pipeline have other layers, so a rank is compared with those of its
own stage, and with its own past. The extension's scores of kernels need CUPTI; its report of sections does not.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from converters.errors import UsageError
from mbx.extras import install_line
from mbx.live.exchange import gather_objects
from mbx.train.model.build import unwrap
from mbx.train.recipe.sections import Recipe
from mbx.train.run.log import STRAGGLERS, Log

if TYPE_CHECKING:
    from torch import nn

PACKAGE, _DISTRIBUTION = "nvidia_resiliency_ext", "nvidia-resiliency-ext"
#: What is timed, and how a message calls it.
ROWS, FORWARD = "rows", "forward"
_SAID = {ROWS: "making micro-batches", FORWARD: "forward passes"}
#: A module of Megatron Core that imports an older extension to its end, and the first release that it takes.
_STRICT, _TAKEN = Path("dist_checkpointing", "strategies", "nvrx.py"), (0, 6)
_T = TypeVar("_T")


def check_stragglers(recipe: Recipe, dry: bool = False) -> None:
    """UsageError where the extension is asked for and not installed, or does not suit the Megatron Core that is;
    `dry`: nothing will be trained."""
    if not dry and (recipe.run.stragglers or find_spec(PACKAGE) is not None):
        check_extension("run.stragglers is set")


def check_extension(why: str) -> None:
    """UsageError where the extension is not installed, `why` it should be, or does not suit Megatron Core."""
    if find_spec(PACKAGE) is None:
        raise UsageError(f"{why}, but {_DISTRIBUTION} is not installed", hint=install_line("resiliency"))
    core = find_spec("megatron.core")
    strict = core is not None and core.origin is not None and (Path(core.origin).parent / _STRICT).is_file()
    if strict and (found := _release()) < _TAKEN:
        raise UsageError(
            f"{_DISTRIBUTION} {'.'.join(map(str, found))} is installed, beside which this Megatron Core does not "
            f"import: it takes {'.'.join(map(str, _TAKEN))} or later",
            hint=f"pip uninstall {_DISTRIBUTION}, or a release of it that Megatron Core takes",
        )


def _release() -> tuple[int, ...]:
    try:
        text = version(_DISTRIBUTION)
    except PackageNotFoundError:  # a copy without its metadata
        return (0,)
    return tuple(int(part) for part in text.split(".") if part.isdigit())


class Stragglers:
    """Times this rank's work on the `chunks` of a run, and reports on it every `run.stragglers` steps; collective."""

    def __init__(self, recipe: Recipe, chunks: Sequence[nn.Module], log: Log, *, cuda: bool) -> None:
        from nvidia_resiliency_ext.straggler import Statistic  # type: ignore[import-not-found,import-untyped,unused-ignore]
        from nvidia_resiliency_ext.straggler.reporting import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
            ReportGenerator,
        )

        from mbx.models.megatron.core.groups import parallel_state as ps

        self.every, self.log = recipe.run.stragglers, log
        self._median, self._read = Statistic.MED, _event if cuda else time.perf_counter
        self._spans: dict[str, list[tuple[Any, Any]]] = {ROWS: [], FORWARD: []}
        self._scores = ReportGenerator(
            ["relative_perf_scores", "individual_perf_scores"],
            gather_on_rank0=False,
            pg=ps.get_tensor_and_data_parallel_group(with_context_parallel=True),
            node_name=socket.gethostname(),
        )
        for chunk in map(unwrap, chunks):
            began: list[Any] = []
            chunk.register_forward_pre_hook(partial(self._begin, began))
            chunk.register_forward_hook(partial(self._end, began))

    def _begin(self, began: list[Any], chunk: nn.Module, given: object) -> None:
        began[:] = [self._read()]

    def _end(self, began: list[Any], chunk: nn.Module, given: object, output: object) -> None:
        if chunk.training:  # and not a validation's
            self._spans[FORWARD].append((began[0], self._read()))

    def rows(self, batches: Iterator[_T]) -> Iterator[_T]:
        """The same micro-batches, the making of each timed on the processor."""
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._spans[ROWS].append((began, time.perf_counter()))
            yield batch

    def step(self, number: int) -> None:
        """Report behind step `number`, where it is time: a record of all ranks' medians and scores, and the slow."""
        if number % self.every:
            return
        summaries = {
            name: {self._median: median(seconds)}
            for name, spans in self._spans.items()
            if (seconds := [_seconds(*span) for span in spans])
        }
        for spans in self._spans.values():
            spans.clear()
        report = self._scores.generate_report(summaries, {})
        found = report.identify_stragglers()
        mine = {
            name: {
                "median_s": summary[self._median],
                "relative": _own(report.section_relative_perf_scores[name]),
                "own_best": _own(report.section_individual_perf_scores[name]),
                "slow": [kind for kind in ("relative", "individual") if name in found[f"straggler_sections_{kind}"]],
            }
            for name, summary in summaries.items()
        }
        self._tell(number, gather_objects((socket.gethostname(), mine)))

    def _tell(self, number: int, ranks: Sequence[tuple[str, Mapping[str, Mapping[str, Any]]]]) -> None:
        slow = []
        for rank, (host, sections) in enumerate(ranks):
            for name, own in sections.items():
                who = f"rank {rank} ({host}): {_SAID[name]} take {own['median_s']:.3g} s"
                if "relative" in own["slow"]:
                    slow.append(f"{who}, {1 / own['relative']:.1f} times those of the fastest rank of its stage")
                elif "individual" in own["slow"]:
                    slow.append(f"{who}, {1 / own['own_best']:.1f} times its own best")
        for text in slow:
            self.log.message(f"step {number}: {text}")
        scores = [{"rank": rank, "host": host, **sections} for rank, (host, sections) in enumerate(ranks)]
        self.log.note(kind=STRAGGLERS, step=number, slow=slow, ranks=scores)


def _own(scores: Mapping[int, float]) -> float:
    (score,) = scores.values()
    return score


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _seconds(began: Any, ended: Any) -> float:
    """Between two readings: of the processor's clock, or of events on a GPU, which the step has waited for."""
    return float(ended - began if isinstance(began, float) else began.elapsed_time(ended) / 1000)
