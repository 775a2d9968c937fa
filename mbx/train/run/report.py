"""`mbx train report RUN`: a run's loss, memory and throughput as a page, or PNG where matplotlib is installed."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from converters.errors import StorageError, UsageError
from mbx.formats.summary import AHEAD, summarize
from mbx.page import Dot, curve, document, write
from mbx.text import human_bytes, plural
from mbx.train.checkpoints.state import latest
from mbx.train.run.log import METRICS, PROFILE, STRAGGLERS
from mbx.untrusted.names import writable
from mbx.untrusted.small_files import INDEX, read_small

_PANELS = (("loss", "loss"), ("tokens_per_s", "tokens/s"), ("memory_gib", "peak memory, GiB"), ("lr", "learning rate"))
_KEYS = tuple(key for key, _ in _PANELS)

Points = Sequence[tuple[float, float]]


def read_metrics(run_dir: Path) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Step and evaluation records of a run; where a step was run again after a resume, the later one counts."""
    path = run_dir / METRICS
    steps: dict[int, dict[str, float]] = {}
    evals: dict[int, dict[str, float]] = {}
    try:
        lines = read_small(path, INDEX).splitlines(keepends=True)
    except OSError as error:
        raise StorageError(f"cannot read `{path}`: {error.strerror}", hint="name a run's folder") from error
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            break  # being written, or cut when the run was killed
        try:
            record = json.loads(line)
            if record.get("kind") in ("step", "eval"):
                keys = ("step", *_KEYS) if record["kind"] == "step" else ("step", "loss")
                found = {key: float(record[key]) for key in keys}
                (steps if record["kind"] == "step" else evals)[int(found["step"])] = found
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise StorageError(f"{path}:{number}: no record of a run: {type(error).__name__}: {error}") from error
    if not steps:
        raise UsageError(f"`{path}` holds no step yet")
    return [steps[n] for n in sorted(steps)], [evals[n] for n in sorted(evals)]


def _rewinds(run_dir: Path) -> dict[tuple[int, int], str]:
    """From which step to which a run went back, and why; one that was done again behind a resume counts once."""
    lines = read_small(run_dir / METRICS, INDEX).splitlines()
    records = [json.loads(line) for line in lines if b'"kind": "rewind"' in line and line.endswith(b"}")]
    return {(int(one["step"]), int(one["to"])): str(one["why"]) for one in records}


def _slow(run_dir: Path) -> list[str]:
    """Which ranks were slow, by the last report on them; empty where none was, or nobody asked."""
    lines = read_small(run_dir / METRICS, INDEX).splitlines()
    marked = f'"kind": "{STRAGGLERS}"'.encode()
    found = [json.loads(line) for line in lines if marked in line and line.endswith(b"}")]
    return [f"step {int(found[-1]['step'])}: {text}" for text in found[-1]["slow"]] if found else []


def write_report(run_dir: Path, target: Path | None = None) -> Path:
    """Write the report to `target`, by its suffix .html (the default, in the run's folder) or .png."""
    steps, evals = read_metrics(run_dir)
    target = target or writable(run_dir, "report.html")
    went = _rewinds(run_dir)
    panels = [
        (title, [(s["step"], s[key]) for s in steps], [(e["step"], e["loss"]) for e in evals] if key == "loss" else [])
        for key, title in _PANELS
    ]
    if target.suffix == ".png":
        _png(panels, target)
    elif target.suffix == ".html":
        last = steps[-1]
        head = f"<h1>{escape(run_dir.name)}</h1><p>{int(last['step'])} steps, last loss {last['loss']:.4f}</p>"
        traced = sorted(path.name for path in (run_dir / PROFILE).glob("*") if path.is_file())
        head += _left_out(run_dir)
        head += "".join(f"<p>Step {s}: {escape(why)}; back to step {to}</p>" for (s, to), why in went.items())
        head += "".join(f"<p>Slow, {escape(text)}</p>" for text in _slow(run_dir))
        head += f"<p>Profile: {', '.join(escape(f'{PROFILE}/{name}') for name in traced)}</p>" if traced else ""
        write(target, document(run_dir.name, [head, *(_drawn(*panel) for panel in panels)]))
    else:
        raise UsageError(f"a report is .html or .png, got `{target}`")
    return target


def _left_out(run_dir: Path) -> str:
    """What the run's last checkpoint carries of the source's prediction layers; empty where it carries none."""
    found = latest(run_dir)
    count, size = summarize(found).kept.get(AHEAD, (0, 0)) if found else (0, 0)
    if not count:
        return ""
    return f"<p>Prediction layers were left out: {plural(count, 'tensor')}, {human_bytes(size)}, kept as they were</p>"


def _drawn(title: str, points: Points, second: Points) -> str:
    """One curve; `second` is drawn as dots."""
    line, dots = ([(x, y) for x, y in given if math.isfinite(y)] for given in (points, second))
    heights = [y for _, y in (*line, *dots)] or [0.0]
    low, high = min(heights), max(heights)
    legend = ' <span class="open">● validation</span>' if second else ""
    drawn = curve(
        line or [(points[0][0], low)],
        [Dot(x, y, "second", f"step {x:g}: {y:.4f}", "validation") for x, y in dots],
        {low: f"{low:.4g}", high if high > low else low + 1: f"{high:.4g}" if high > low else ""},
        (f"{points[0][0]:g}", f"step {points[-1][0]:g}"),
    )
    return f"<h2>{title}{legend}</h2>{drawn}"


def _png(panels: Sequence[tuple[str, Points, Points]], target: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("a PNG report needs matplotlib", hint="pip install matplotlib, or ask for report.html")
    from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]

    figure = Figure(figsize=(8, 3 * len(panels)), layout="constrained")
    for axes, (title, points, second) in zip(figure.subplots(len(panels), sharex=True), panels, strict=True):
        axes.plot(*zip(*points, strict=True), label="training")
        if second:
            axes.plot(*zip(*second, strict=True), "o", label="validation")
            axes.legend()
        axes.set_title(title)
        axes.grid(alpha=0.3)
    axes.set_xlabel("step")
    figure.savefig(target)
