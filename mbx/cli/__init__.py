"""The command line: `main` runs one command and returns its exit code.

Commands import torch, NumPy, Megatron Core and the hub client only when they run, so `--help` is instant.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer
from typer.core import TyperGroup

from converters.errors import MbxError
from mbx.cli import (
    adapter,
    budget,
    calibrate,
    diff,
    doctor,
    importance,
    inspect,
    merge,
    mlm_args,
    models,
    prune,
    push,
    report,
    reshard,
    train,
    train_logits,
    train_matrix,
    verify,
    verify_training,
)
from mbx.cli.failures import Interrupted, help_text, known_failure, usage_failure
from mbx.cli.options import Quiet, Verbose, epilog
from mbx.cli.output import out

BROKEN_PIPE = 141


#: Commands in the order a user meets them.
_ORDER = """convert verify diff inspect models importance calibrate train budget report mlm-args doctor""".split()


class _Ordered(TyperGroup):
    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return sorted(self.commands, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))


app = typer.Typer(
    name="mbx",
    cls=_Ordered,
    help="Move model weights between Hugging Face and Megatron Core, and prove that nothing was lost.",
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog=epilog(
        "mbx convert hf-to-mcore meta-llama/Llama-3.2-1B ckpt --tp 2",
        "mbx verify parity meta-llama/Llama-3.2-1B ckpt",
        "mbx convert mcore-to-hf ckpt hf-folder",
    ),
)
app.add_typer(reshard.app, name="convert")  # convert's own app, to which these modules added their commands
assert reshard.app is adapter.app is merge.app is prune.app
assert train.app is train_logits.app is train_matrix.app
app.add_typer(verify_training.app, name="verify")  # verify's own app, likewise
assert verify_training.app is verify.app
app.command("push", epilog=push.EPILOG)(push.push)
app.command("diff", epilog=diff.EPILOG)(diff.diff)
app.command("importance", epilog=importance.EPILOG)(importance.importance)
app.command("calibrate", epilog=calibrate.EPILOG)(calibrate.calibrate)
app.command("inspect", epilog=inspect.EPILOG)(inspect.inspect)
app.add_typer(models.app, name="models")
app.add_typer(train.app, name="train")
app.command("budget", epilog=budget.EPILOG)(budget.budget)
app.command("report", epilog=report.EPILOG)(report.report)
app.add_typer(mlm_args.app, name="mlm-args")
app.command("doctor", epilog=doctor.EPILOG)(doctor.doctor)


def _version(asked: bool) -> None:
    if asked:
        from mbx.version import __version__

        out.result({"mbx": __version__}, lambda: [f"mbx {__version__}"])
        raise typer.Exit()


@app.callback()
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
    quiet: Quiet = 0,
    verbose: Verbose = 0,
) -> None:
    out.configure(json=False, quiet=quiet, verbose=verbose)
    if ctx.invoked_subcommand is None:
        out.result({"commands": _ORDER}, lambda: ctx.get_help().splitlines())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (the process's own by default); returns the exit code, never raises."""
    if sys.stdout is None or sys.stderr is None:  # closed by the caller, as `>&-` does: Python has no stream then
        sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    out.reset(json="--json" in options)
    try:
        with _termination_interrupts():
            code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return code


def _run(arguments: list[str]) -> int:
    try:
        code = typer.main.get_command(app).main(args=arguments, prog_name="mbx", standalone_mode=False)
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # typer exits with 1 for it
            raise error.__context__ from None
        return error.code if isinstance(error.code, int) else 1
    except MbxError as error:
        return out.error(error)
    except typer.TyperException as error:
        if not out.json and (text := help_text(error)) is not None:
            out.error_text(text)
            return error.exit_code
        return out.error(usage_failure(error), error.exit_code)
    except BaseException as error:  # torch's CheckpointException, for one, is no Exception
        return out.error(known_failure(error, arguments))
    if code == Interrupted.exit_code:  # what typer makes of a KeyboardInterrupt
        return out.error(Interrupted(arguments))
    return code if isinstance(code, int) else 0


@contextmanager
def _termination_interrupts() -> Iterator[None]:
    """Let SIGTERM end a run as Ctrl-C does, so that what is half written is removed."""
    if threading.current_thread() is not threading.main_thread():  # where handlers cannot be set
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
