"""How every conversion runs: the options for it, and a plan carried out or printed."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from mbx.cli.options import Resources
from mbx.cli.output import out

if TYPE_CHECKING:
    from mbx.run.job import Job, Options

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan, from headers alone; write nothing.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint that stands there.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with an interrupted run of the same command, or start where none was.")
]
NoSync = Annotated[
    bool, typer.Option("--no-sync", help="Do not wait for the disk: faster, and a crash of the machine may lose it.")
]


@dataclass(frozen=True)
class Running(Resources):
    """How a conversion runs."""

    dry_run: DryRun = False
    overwrite: Overwrite = False
    resume: Resume = False
    no_sync: NoSync = False

    def options(self, mapping: str | None) -> Options:
        """The options that every conversion has; UsageError for a bad number."""
        from mbx.run.job import Options

        return Options(
            mapping=mapping,
            overwrite=self.overwrite,
            resume=self.resume,
            sync=not self.no_sync,
            workers=self.num_workers,
            max_memory=self.max_bytes,
        )


def warn_of_unknown_core() -> None:
    """Say that the installed Megatron Core is newer than what is known of it, where it is."""
    from mbx.installed import unknown_core

    if (text := unknown_core()) is not None:
        out.warning(text)


def carry_out(make_plan: Callable[[], Job], dry_run: bool) -> None:
    """Plan; then print the plan, or run it and print what it did."""
    from converters.errors import DeviceError
    from mbx.cli import plan_view
    from mbx.cli.progress import Meter, peak_memory_bytes
    from mbx.run.job import run
    from mbx.run.ranks import world

    # A large model's plan is millions of objects that live to the end: collecting among them costs a quarter of it.
    gc.disable()
    try:
        job = make_plan()
    finally:
        gc.freeze()
        gc.enable()
    if job.sidecars is not None and job.options.format != "torch_dist":
        warn_of_unknown_core()
    plan = plan_view.document(job)
    if dry_run:
        out.result({"dry_run": True, "plan": plan, "result": None}, lambda: plan_view.lines(plan))
        if not plan["disk"]["fits"]:
            raise DeviceError("the result does not fit on the disk", hint="free space, or choose another destination")
        return
    for line in plan_view.lines(plan)[1:]:
        out.detail(line)
    if (place := world(os.environ)).rank:  # rank 0 speaks for all
        run(job, place=place)
        return
    with Meter(job.plan.direction, job.plan.target_bytes) as meter:
        outcome = run(job, meter.advance, place)
    result = {
        "target": str(outcome.target),
        "bytes": outcome.bytes_written,
        "bytes_resumed": outcome.bytes_resumed,
        "seconds": outcome.seconds,
        # Of what this run wrote: an interrupted one's part took none of its time.
        "gb_per_s": (outcome.bytes_written - outcome.bytes_resumed) / 1e9 / max(outcome.seconds, 1e-9),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    out.result({"dry_run": False, "plan": plan, "result": result}, lambda: plan_view.summary(plan, result))
