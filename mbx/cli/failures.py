"""Turns whatever ends a command into a fact, a hint and an exit code."""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Sequence

import typer

from converters.errors import DeviceError, MbxError, StorageError, UsageError
from mbx.cli.synonyms import GROUPS, OPTIONS, VALUES
from mbx.extras import EXTRA_OF, install_line

#: Commands of `mbx train` that have nothing to go on with.
_NO_RUNS = (["report"], ["export"], ["generate"])


class Interrupted(MbxError):
    """The user, or a SIGTERM, stopped the run."""

    exit_code = 130

    def __init__(self, arguments: Sequence[str] = ()) -> None:
        line = shlex.join(["mbx", *arguments])
        resumes = arguments[:1] == ["convert"] or (arguments[:1] == ["train"] and arguments[1:2] not in _NO_RUNS)
        if resumes and "--resume" not in arguments:
            line += " --resume"
        super().__init__("interrupted", hint=f"to go on: {line}" if arguments else "run the same command again")


def known_failure(error: BaseException, arguments: Sequence[str] = ()) -> MbxError:
    """The failure to report for an exception that is no MbxError, of a command line `arguments`.

    An exception nobody expected becomes one line and code 70; the traceback is for MBX_DEBUG=1.
    """
    if isinstance(error, KeyboardInterrupt):
        failure: MbxError = Interrupted(arguments)
    elif isinstance(error, ModuleNotFoundError) and (hint := _remedy(error.name or "")):
        failure = UsageError(f"the package `{error.name}` is needed and not installed", hint=hint)
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


def _remedy(module: str) -> str | None:
    """What installs a module that only some commands need; None for one that mbx never asks for."""
    package = module.partition(".")[0]
    if package == "triton":  # megatron-core 0.19 imports it, and PyTorch's CPU builds come without
        return "pip install triton"
    extra = EXTRA_OF.get(package)
    return install_line(extra) if extra else None


def help_text(error: typer.TyperException) -> str | None:
    """The help that typer answers a group without a command with; None for any other usage error."""
    message: str = error.format_message()
    return message if message.lstrip().startswith("Usage:") else None


def usage_failure(error: typer.TyperException) -> UsageError:
    """A usage error in the house's form; its hint is the help of the command that was meant, or what it lacks."""
    context = getattr(error, "ctx", None)
    asked, command = getattr(context, "command", None), getattr(context, "command_path", "mbx")
    fact = f"`{command}` needs a command" if help_text(error) is not None else error.format_message().rstrip(".")
    fact = fact.replace("Value error, ", "")
    hint = f"`{command} --help`"
    if option := getattr(error, "option_name", None):
        fact = fact.replace(f"No such option: {option}", f"`{command}` takes no {option}")
        for name, child in getattr(asked, "commands", {}).items():
            if any(option in param.opts for param in child.params):
                fact = f"{option} is for `{command} {name}`"
        if option in OPTIONS:
            hint = f"{OPTIONS[option]} is what it is called here; {hint}"
    elif fact.startswith("No such command") and "Did you mean" not in fact:
        hint = _group_of(fact, command, asked) or GROUPS.get(command, hint)
    elif meant := next((ours for theirs, ours in VALUES.items() if f"'{theirs}' is not one of" in fact), None):
        hint = f"`{meant}` is what it is called here"
    if fact.startswith("Missing argument"):
        arguments = [param for param in getattr(asked, "params", ()) if param.param_type_name == "argument"]
        hint = " ".join([command, *(param.metavar or param.name.upper() for param in arguments)])
    failure = UsageError(fact, hint=hint)
    failure.__cause__ = error
    return failure


def _group_of(fact: str, command: str, asked: object) -> str | None:
    """Where the word that a fact quotes is a command of one of the groups below `asked`."""
    for name, child in getattr(asked, "commands", {}).items():
        for word in getattr(child, "commands", {}):
            if f"'{word}'" in fact:
                return f"it is `{command} {name} {word}`"
    return None


def _system(error: OSError | MemoryError) -> MbxError:
    if isinstance(error, MemoryError):
        return DeviceError("out of memory", hint="lower --max-memory or --workers")
    where = f"`{os.fsdecode(error.filename)}`: " if isinstance(error.filename, (str, bytes)) else ""
    fact = f"{where}{error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM):
        return DeviceError(fact, hint="free space or memory, or choose another destination")
    return StorageError(fact)
