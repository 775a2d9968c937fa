"""What a run says: one line and one JSON record a step, TensorBoard and W&B where installed, a live view on a TTY."""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import os
import re
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from converters.errors import UsageError, spelt
from mbx.formats.torch_dist import TRACKER
from mbx.text import human_time
from mbx.train.checkpoints.best import BEST
from mbx.train.checkpoints.claim import START
from mbx.train.checkpoints.state import STATE
from mbx.train.recipe.sections import Recipe
from mbx.untrusted.names import writable

if TYPE_CHECKING:
    from rich.live import Live

METRICS = "metrics.jsonl"
#: The kind of a record on ranks that are slow.
STRAGGLERS = "stragglers"
#: The folder of a run that has a trace of some of its steps.
PROFILE = "profile"
#: What a run leaves in its folder beside checkpoints, drafts included.
_BESIDE = (
    *(METRICS, PROFILE, "tensorboard", "report.html", BEST, START),
    *(f"{Path(name).stem}.tmp" for name in (BEST, START, TRACKER)),
)
#: Figures of a step that TensorBoard and W&B draw.
_DRAWN = ("loss", "lr", "grad_norm", "tokens_per_s", "tflops", "memory_gib")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: A first step that is worth a word.
_SLOW_S = 5.0
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Step:
    """One step's figures. `step` counts from 1; `tflops` and `mfu` are per GPU; `memory_gib` is this rank's peak.

    `mfu` is against the dense peak of the GPU at the run's precision, 0 where it is not known. `beside`: losses that
    are learned beside `loss`, those of prediction layers and the router's, by name.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    step_s: float
    tokens_per_s: float
    tflops: float
    mfu: float
    memory_gib: float
    beside: Mapping[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, object]:
        """As a line of the metrics file has it, losses beside the main one under their own names."""
        return {**{k: v for k, v in asdict(self).items() if k != "beside"}, **self.beside}


class _Writer(Protocol):
    def add_scalar(self, tag: str, value: float, step: int) -> None: ...

    def close(self) -> None: ...


class Log:
    """The main rank's log; other ranks' calls do nothing. Without `messages` it records and says nothing.

    Records that cannot be written wait for the next one; `finish` raises where some still do.
    """

    def __init__(self, recipe: Recipe, *, main: bool, live: bool = True, messages: bool = True) -> None:
        self._speaks = main and messages
        self.main, self.total, self.name = main, recipe.train.steps, recipe.name
        self.path = recipe.run_dir / METRICS
        self._writers: list[_Writer] = []
        self._losses: deque[float] = deque(maxlen=60)
        self._first_s = 0.0
        self._live: Live | None = None
        self._waiting: list[str] = []
        self._is_there = False
        if not main:
            return
        self._made = not recipe.run_dir.exists()
        recipe.run_dir.mkdir(parents=True, exist_ok=True)
        writable(recipe.run_dir, METRICS)
        if self.path.is_file():  # a record that was being written when its process ended: the next has its own line
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)
            self._is_there = True
        if recipe.run.tensorboard:
            self._writers.append(_tensorboard(recipe.run_dir))
        if recipe.run.wandb:
            self._writers.append(_Wandb(recipe))
        if live and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), refresh_per_second=4, transient=False)
            self._live.start()

    def message(self, text: str) -> None:
        """A line for the reader."""
        if self._speaks:
            try:
                sys.stderr.write(spelt(text) + "\n")
                sys.stderr.flush()
            except OSError as error:
                if error.errno not in _FULL:
                    raise  # where messages go to a file on a full disk there is nobody to tell

    def step(self, s: Step) -> None:
        """Record one step everywhere."""
        if not self.main:
            return
        self._record({"kind": "step", **s.record()})
        figures = {name: getattr(s, name) for name in _DRAWN} | dict(s.beside)
        for name, value in figures.items():
            self._draw_elsewhere(f"train/{name}", value, s.step)
        self._losses.append(s.loss)
        if len(self._losses) == 1:
            self._first_s = s.step_s
        elif len(self._losses) == 2 and self._first_s > max(_SLOW_S, 3 * s.step_s):
            self.message(f"the first step took {self._first_s:.1f} s, this one {s.step_s:.1f}: kernels were compiled")
        if self._live is not None:
            self._draw(s)
        else:
            self.message(line(s, self.total))

    def evaluation(self, step: int, loss: float) -> None:
        """Record a validation loss."""
        if not self.main:
            return
        self._record({"kind": "eval", "step": step, "loss": loss})
        self._draw_elsewhere("eval/loss", loss, step)
        self.message(f"step {step}: validation loss {loss:.4f}")

    def note(self, **record: object) -> None:
        """Record something that is not a step, such as predicted memory."""
        if self.main:
            self._record(record)

    def _record(self, record: dict[str, object]) -> None:
        self._waiting.append(json.dumps(record) + "\n")
        try:
            self._write()
        except OSError as error:
            if len(self._waiting) == 1:
                self.message(
                    f"`{self.path}` could not be written: {error.strerror}; its records wait, the run goes on"
                )

    def _write(self) -> None:
        """Append what waits, or nothing of it. Where a mount is gone, no file is made below it."""
        made = 0 if self._is_there and not (self.path.parent / START).exists() else os.O_CREAT
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | made, 0o644)
        try:
            self._is_there = True
            size, data = os.fstat(file).st_size, "".join(self._waiting).encode()
            try:
                while data:
                    data = data[os.write(file, data) :]
            except OSError:
                os.ftruncate(file, size)
                raise
        finally:
            os.close(file)
        self._waiting.clear()

    def finish(self) -> None:
        """Write what waits; OSError where that fails still."""
        if self._waiting:
            try:
                self._write()
            except OSError as error:
                error.filename = str(self.path)
                raise

    def _draw_elsewhere(self, name: str, value: float, step: int) -> None:
        """A figure for TensorBoard and W&B; one that cannot be written to any more is left out."""
        for writer in list(self._writers):
            try:
                writer.add_scalar(name, value, step)
            except OSError as error:
                self._writers.remove(writer)
                self.message(f"{type(writer).__name__} writes no more: {error}; the run goes on")

    def close(self) -> None:
        """Close writers and the live view; the folder of a run that ended before its first step goes."""
        if not self.main:
            return
        if self._live is not None:
            self._live.stop()
        for writer in self._writers:
            try:
                writer.close()
            except OSError as error:
                self.message(f"{type(writer).__name__} could not be closed: {error}")
        run = self.path.parent
        if run.is_dir() and [path.name for path in run.iterdir()] == [START]:
            (run / START).unlink()
        if self._made and run.is_dir() and not any(run.iterdir()):
            run.rmdir()

    def _draw(self, s: Step) -> None:
        from rich.panel import Panel

        assert self._live is not None
        done = int(30 * s.step / self.total)
        text = f"{'█' * done}{'░' * (30 - done)}\n{line(s, self.total)}\n{chart(list(self._losses))}"
        self._live.update(Panel(text, title=f"mbx train: {self.name}"))


def check_writers(recipe: Recipe) -> None:
    """UsageError where the recipe logs to a package that is not installed."""
    for key, asked, package in (
        ("run.tensorboard", recipe.run.tensorboard, "tensorboard"),
        ("run.wandb", bool(recipe.run.wandb), "wandb"),
    ):
        if asked and importlib.util.find_spec(package) is None:
            raise UsageError(f"{key} is set, but {package} is not installed", hint=f"pip install {package}")


def line(s: Step, total: int) -> str:
    """The log line of one step."""
    mfu = f" ({s.mfu:.1%} MFU)" if s.mfu else ""
    left = f"  {human_time((total - s.step) * s.step_s)} left" if s.step < total else ""
    beside = "".join(f"  {name.removesuffix('_loss')} {value:.4f}" for name, value in s.beside.items())
    return (
        f"step {s.step:>{len(str(total))}}/{total}  loss {s.loss:.4f}{beside}  lr {s.lr:.3g}  grad {s.grad_norm:.3f}  "
        f"{s.tokens_per_s:,.0f} tok/s  {s.tflops:.1f} TFLOP/s{mfu}  {s.memory_gib:.1f} GiB  {s.step_s:.2f} s{left}"
    )


def chart(losses: list[float], height: int = 6) -> str:
    """The last losses as columns of `height` lines between their extremes, which stand at the left."""
    finite = [x for x in losses if math.isfinite(x)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    top = height * len(_BARS) - 1
    # in eighths of a line
    levels = [1 + int((x - low) / (high - low or 1.0) * top) if math.isfinite(x) else 0 for x in losses]
    rows = []
    for row in reversed(range(height)):
        label = f"{high:9.3f} " if row == height - 1 else f"{low:9.3f} " if row == 0 else " " * 10
        filled = (min(len(_BARS), max(0, level - row * len(_BARS))) for level in levels)
        rows.append(label + "".join(_BARS[n - 1] if n else " " for n in filled).rstrip())
    return "\n".join(rows)


def only_begun(run: Path) -> bool:
    """Whether a run's folder holds nothing but what a start leaves that ended before its first checkpoint.

    A checkpoint that was being written has a name of its own, and no state of the loop in those of older releases.
    """
    return all(
        entry.name in _BESIDE
        or re.fullmatch(r"iter_\d{7}\.\w+", entry.name)
        or (re.fullmatch(r"iter_\d{7}", entry.name) and not (entry / STATE).exists())
        for entry in run.iterdir()
    )


def _tensorboard(folder: Path) -> _Writer:
    from torch.utils.tensorboard import SummaryWriter

    writer: _Writer = SummaryWriter(str(writable(folder, "tensorboard")))
    return writer


class _Wandb:
    """Weights & Biases behind the two calls of a TensorBoard writer."""

    def __init__(self, recipe: Recipe) -> None:
        import wandb  # type: ignore[import-not-found,unused-ignore]

        self._run = wandb.init(project=recipe.run.wandb, name=recipe.name, config=recipe.to_dict())

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self._run.log({tag: value}, step=step)

    def close(self) -> None:
        self._run.finish()
