"""`mbx train report RUN`: a run's loss, memory and throughput as HTML, or PNG where matplotlib is installed."""

from __future__ import annotations

import html
import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path

from converters.errors import StorageError, UsageError
from mbx.train.log import METRICS

_PANELS = (("loss", "loss"), ("tokens_per_s", "tokens/s"), ("memory_gib", "peak memory, GiB"), ("lr", "learning rate"))
_KEYS = tuple(key for key, _ in _PANELS)
_WIDTH, _HEIGHT, _MARGIN = 640, 220, 48

Points = Sequence[tuple[float, float]]


def read_metrics(run_dir: Path) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Step and evaluation records of a run; where a step was run again after a resume, the later one counts."""
    path = run_dir / METRICS
    steps: dict[int, dict[str, float]] = {}
    evals: dict[int, dict[str, float]] = {}
    try:
        lines = path.read_bytes().splitlines(keepends=True)
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
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(f"{path}:{number}: no record of a run: {type(error).__name__}: {error}") from error
    if not steps:
        raise UsageError(f"`{path}` holds no step yet")
    return [steps[n] for n in sorted(steps)], [evals[n] for n in sorted(evals)]


def write_report(run_dir: Path, target: Path | None = None) -> Path:
    """Write the report to `target`, by its suffix .html (the default, in the run's folder) or .png."""
    steps, evals = read_metrics(run_dir)
    target = target or run_dir / "report.html"
    panels = [
        (title, [(s["step"], s[key]) for s in steps], [(e["step"], e["loss"]) for e in evals] if key == "loss" else [])
        for key, title in _PANELS
    ]
    if target.suffix == ".png":
        _png(panels, target)
    elif target.suffix == ".html":
        body = "\n".join(_svg(*panel) for panel in panels)
        name = html.escape(run_dir.name)
        last = steps[-1]
        head = f"{int(last['step'])} steps, last loss {last['loss']:.4f}"
        text = (
            f"<!doctype html><meta charset=utf-8><title>{name}</title>"
            f"<body style='font:14px sans-serif;margin:2em'><h1>{name}</h1><p>{head}</p>{body}</body>\n"
        )
        target.write_text(text, encoding="utf-8")
    else:
        raise UsageError(f"a report is .html or .png, got `{target}`")
    return target


def _svg(title: str, points: Points, second: Points) -> str:
    """One line chart; `second` is drawn as dots."""
    xs = [x for x, _ in points]
    ys = [y for _, y in [*points, *second] if math.isfinite(y)]
    low_x, high_x, low_y, high_y = min(xs), max(xs), min(ys, default=0.0), max(ys, default=1.0)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - low_x) / ((high_x - low_x) or 1) * (_WIDTH - 2 * _MARGIN)
        up = (y - low_y) / ((high_y - low_y) or 1) * (_HEIGHT - 2 * _MARGIN)
        return _MARGIN + across, _HEIGHT - _MARGIN - up

    legend = (
        f'<text x="{_WIDTH - _MARGIN}" y="20" text-anchor="end" fill="#d95f02">● validation</text>' if second else ""
    )
    line = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in points if math.isfinite(y))
    dots = "".join(
        '<circle cx="{:.1f}" cy="{:.1f}" r="3" fill="#d95f02"/>'.format(*place(x, y))
        for x, y in second
        if math.isfinite(y)
    )
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img"><title>{title}</title>'
        f'<text x="{_MARGIN}" y="20" font-weight="bold">{title}</text>{legend}'
        f'<polyline points="{line}" fill="none" stroke="#1b6ca8" stroke-width="1.5"/>{dots}'
        f'<text x="4" y="{_HEIGHT - _MARGIN}">{low_y:.4g}</text><text x="4" y="{_MARGIN}">{high_y:.4g}</text>'
        f'<text x="{_MARGIN}" y="{_HEIGHT - 20}">{low_x:g}</text>'
        f'<text x="{_WIDTH - _MARGIN}" y="{_HEIGHT - 20}" text-anchor="end">step {high_x:g}</text></svg>'
    )


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
