"""Defaults a user may set once: option > `MBX_*` variable > `mbx.toml` here > the user's own file > built in."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from converters.errors import UsageError
from mbx.text import parse_memory, parse_size
from mbx.untrusted.toml_files import parse_toml

#: More threads than this gain nothing on the disks that were measured.
_MOST_WORKERS = 8
#: "quota period" in microseconds, of the root of the process's own cgroup v2 namespace.
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting's value as text, and where it comes from."""

    name: str
    value: str
    origin: str


def parse_workers(text: str) -> int:
    """A number of threads; UsageError unless it is a whole number from 1 to 256."""
    if not text.isdecimal() or not 1 <= int(text) <= 256:
        raise UsageError(f"{text!r} is not a number of workers", hint="1 to 256")
    return int(text)


def usable_cores() -> int:
    """Processors that this process may use: those it is bound to, less where its control group has a quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _QUOTA.read_text(encoding="ascii").split()
        return max(1, min(cores, -(-int(quota) // int(period))))
    except (OSError, ValueError):  # no such control group, or `max`: no quota
        return cores


#: Name → what is built in, and the reader of its value.
_KNOWN: dict[str, tuple[str, Callable[[str], int]]] = {
    "workers": (str(min(_MOST_WORKERS, usable_cores())), parse_workers),
    "max_memory": ("1GiB", parse_memory),
    "max_shard_size": ("5GB", parse_size),
}


def number(name: str, option: str | None) -> int:
    """Value of a setting; `option` is the command line's, None where it was not given.

    A value that cannot be read is a UsageError that names its origin.
    """
    setting = Setting(name, option, f"--{name.replace('_', '-')}") if option is not None else find(name)
    try:
        return _KNOWN[name][1](setting.value)
    except UsageError as error:
        raise UsageError(f"{setting.origin}: {error.fact}", hint=error.hint) from error


def every() -> list[Setting]:
    """All settings with their origins."""
    return [find(name) for name in _KNOWN]


def find(name: str) -> Setting:
    """A setting from the first place that has it."""
    if (value := os.environ.get(variable := f"MBX_{name.upper()}")) is not None:
        return Setting(name, value, variable)
    if not os.environ.get("MBX_NO_CONFIG"):
        for path in config_files():
            if (stored := _read(path).get(name)) is not None:
                return Setting(name, str(stored), str(path))
    return Setting(name, _KNOWN[name][0], "built in")


def config_files() -> tuple[Path, Path]:
    """The project's settings file and the user's, strongest first; either may be absent."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return Path("mbx.toml"), home / "mbx" / "config.toml"


def _read(path: Path) -> Mapping[str, object]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the settings file `{path}` cannot be read: {error}") from error
    try:
        values = parse_toml(text)
    except ValueError as error:
        raise UsageError(f"the settings file `{path}`: {error}") from error
    if unknown := sorted(set(values) - set(_KNOWN)):
        raise UsageError(
            f"the settings file `{path}` has unknown keys: {', '.join(unknown)}", hint=f"known: {', '.join(_KNOWN)}"
        )
    return values
