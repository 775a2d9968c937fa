"""Turns whatever ends a command into a fact, a hint and an exit code."""

from __future__ import annotations

import errno
import os

import typer

from converters.errors import DeviceError, MbxError, StorageError, UsageError

#: Packages that only some commands need → what installs them.
_EXTRAS = {
    "transformers": "'mbx[verify]'",
    "transformer_engine": "'mbx[gpu]'",
    "peft": "peft",
    "torch": "torch",
    "megatron": "megatron-core",
}


class Interrupted(MbxError):
    """The user, or a SIGTERM, stopped the run."""

    exit_code = 130

    def __init__(self) -> None:
        super().__init__(
            "interrupted", hint="run the same command again; a conversion or a training goes on with --resume"
        )


def known_failure(error: BaseException) -> MbxError:
    """The failure to report for an exception that is no MbxError.

    An exception nobody expected becomes one line and code 70; the traceback is for MBX_DEBUG=1.
    """
    if isinstance(error, KeyboardInterrupt):
        failure: MbxError = Interrupted()
    elif isinstance(error, ModuleNotFoundError) and (package := _EXTRAS.get((error.name or "").partition(".")[0])):
        failure = UsageError(f"the package `{error.name}` is needed and not installed", hint=f"pip install {package}")
    elif isinstance(error, (OSError, MemoryError)):
        failure = _system(error)
    elif isinstance(error, RuntimeError) and "can't allocate memory" in str(error):  # torch's own MemoryError
        failure = _system(MemoryError())
    else:
        text = str(error).strip().splitlines()
        said = f": {text[0]}" if text else ""
        failure = MbxError(
            f"internal: {type(error).__name__}{said}",
            hint="set MBX_DEBUG=1 for the traceback, and report it with the command line",
        )
    failure.__cause__ = error
    return failure


def help_text(error: typer.TyperException) -> str | None:
    """The help that typer answers a group without a command with; None for any other usage error."""
    message: str = error.format_message()
    return message if message.lstrip().startswith("Usage:") else None


def usage_failure(error: typer.TyperException) -> UsageError:
    """A usage error in the house's form; its hint is the help of the command that was meant, or what it lacks."""
    context = getattr(error, "ctx", None)
    asked, command = getattr(context, "command", None), getattr(context, "command_path", "mbx")
    fact = f"`{command}` needs a command" if help_text(error) is not None else error.format_message().rstrip(".")
    hint = f"`{command} --help`"
    if option := getattr(error, "option_name", None):
        fact = fact.replace(f"No such option: {option}", f"`{command}` takes no {option}")
        for name, child in getattr(asked, "commands", {}).items():
            if any(option in param.opts for param in child.params):
                fact = f"{option} is for `{command} {name}`"
    if fact.startswith("Missing argument"):
        arguments = [param for param in getattr(asked, "params", ()) if param.param_type_name == "argument"]
        hint = " ".join([command, *(param.metavar or param.name.upper() for param in arguments)])
    failure = UsageError(fact, hint=hint)
    failure.__cause__ = error
    return failure


def _system(error: OSError | MemoryError) -> MbxError:
    if isinstance(error, MemoryError):
        return DeviceError("out of memory", hint="lower --max-memory or --workers")
    where = f"`{os.fsdecode(error.filename)}`: " if isinstance(error.filename, (str, bytes)) else ""
    fact = f"{where}{error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM):
        return DeviceError(fact, hint="free space or memory, or choose another destination")
    return StorageError(fact)
