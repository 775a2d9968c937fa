"""One cell of a matrix, in a process of its own: `python -m mbx.train.matrix.process SPEC OUT`.

SPEC is a file of JSON with the cell, the recipe's name, its overrides and the number of steps; OUT gets the record:
throughput, losses, predicted and measured memory, and memory over time.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from converters.errors import DeviceError, MbxError, UnsupportedError, spelt
from mbx.train.budget.predict import GIB, predict

#: Steps whose time does not count: kernels are compiled, caches filled.
WARM = 1


class Telemetry:
    """Samples memory from a thread while its block lasts: (seconds, GiB) of the GPU's allocator, or resident."""

    def __init__(self, every_s: float = 0.05) -> None:
        self.every_s, self.samples = every_s, list[tuple[float, float]]()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Telemetry:
        self._began = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(self.every_s):
            self.samples.append((round(time.perf_counter() - self._began, 3), round(_used() / GIB, 4)))


def _used() -> int:
    cuda = sys.modules.get("torch.cuda")  # which the run may be importing just now, and then has no functions yet
    if cuda is not None and hasattr(cuda, "is_initialized") and cuda.is_initialized():
        return int(cuda.memory_allocated())
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def run_cell(spec: Mapping[str, Any]) -> dict[str, object]:
    """The record of a cell; `status` is `ok`, `out of memory`, or `failed` with what was said."""
    began, record = time.perf_counter(), dict[str, object]()
    with Telemetry() as telemetry:
        try:
            record |= {"status": "ok", **_measure(spec)}
        except DeviceError as error:
            kind = "out of memory" if error.fact.startswith("out of memory") else "failed"
            record |= {"status": kind, "said": [spelt(t) for t in (error.fact, error.hint, *error.details) if t]}
        except MbxError as error:
            record |= {"status": "failed", "said": [spelt(t) for t in (error.fact, error.hint) if t]}
    return record | {"seconds": round(time.perf_counter() - began, 2), "memory_over_time": telemetry.samples}


def _measure(spec: Mapping[str, Any]) -> dict[str, object]:
    from mbx.train.recipe.catalogue import load_recipe
    from mbx.train.run.prepare import prepare

    cell = spec["cell"]
    own = [f"train.steps={spec['steps']}", "run.save=false", "run.save_every=0", "train.eval_every=0"]
    own += ["optim.warmup_steps=0", f"run.dir={spec['run_dir']}"]
    if cell["side"] != "recipe":  # one process, whatever the recipe spreads over
        own += [f"parallel.{axis}=1" for axis in ("tp", "pp", "vpp", "cp", "ep", "etp")]
    recipe = load_recipe(spec["recipe"], [*spec["overrides"], *own, *cell["overrides"]])
    prepared = prepare(recipe)
    if cell["side"] == "recipe":
        return _recipe(prepared)
    from mbx.train.matrix.baselines import baseline

    return baseline(prepared, adapted=cell["side"] == "peft")


def _recipe(prepared: Any) -> dict[str, object]:
    from mbx.train.run.log import Step
    from mbx.train.run.loop import train

    steps: list[Step] = []
    train(prepared, live=False, on_step=steps.append)
    timed = steps[WARM:] or steps
    predicted = None
    if prepared.ranks.device == "cuda":
        with contextlib.suppress(UnsupportedError):  # of a model that the budget does not cover
            predicted = predict(prepared.recipe, prepared.plan, prepared.ranks.dp, prepared.looks).total / GIB
    return {
        "tokens_per_s": statistics.median(step.tokens_per_s for step in timed),
        "first_step_s": steps[0].step_s,
        "step_s": statistics.median(step.step_s for step in timed),
        "losses": [step.loss for step in steps],
        "peak_gib": steps[-1].memory_gib,
        "predicted_gib": predicted,
        "device": prepared.ranks.device,
    }


def main() -> None:
    """Run the cell that the command line names; the main rank writes its record."""
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    record = run_cell(spec)
    if int(os.environ.get("RANK", "0")) == 0 or record["status"] != "ok":
        Path(sys.argv[2]).write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main()
