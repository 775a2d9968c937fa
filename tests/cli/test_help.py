"""Help texts and options, held against golden files; `MBX_UPDATE_GOLDEN=1` writes them anew."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from _cli import Run

from mbx.cli import app
from mbx.cli.options import EXIT_CODES

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden" / "help"
UPDATE = os.environ.get("MBX_UPDATE_GOLDEN") == "1"
HEAVY = ("torch", "numpy", "huggingface_hub", "transformers", "megatron", "rich", "safetensors")


def walk(command: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from walk(child, (*path, name))


COMMANDS = dict(walk(typer.main.get_command(app)))
LEAVES = [path for path, command in COMMANDS.items() if not hasattr(command, "commands")]


def golden(name: str, text: str) -> None:
    path = GOLDEN / name
    if UPDATE:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), f"no {path.name}: run with MBX_UPDATE_GOLDEN=1"
    assert text == path.read_text(encoding="utf-8"), f"{path.name} changed: run with MBX_UPDATE_GOLDEN=1 if it should"


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_is_the_golden_one_and_fits_80_columns(mbx: Run, path: tuple[str, ...]) -> None:
    said = mbx(*path, "--help")
    assert said.code == 0 and not said.stderr
    assert max(map(len, said.stdout.splitlines())) <= 80
    golden("-".join(("mbx", *path)) + ".txt", said.stdout)


def test_the_set_of_options_is_frozen() -> None:
    lines = []
    for path, command in COMMANDS.items():
        names = sorted("/".join(param.opts) for param in command.params)  # type: ignore[attr-defined]
        lines.append(f"{' '.join(('mbx', *path))}: {' '.join(names)}")
    golden("options.txt", "\n".join(sorted(lines)) + "\n")


def test_no_golden_file_is_left_of_a_command_that_is_gone() -> None:
    expected = {"-".join(("mbx", *path)) + ".txt" for path in COMMANDS} | {"options.txt"}
    assert {path.name for path in GOLDEN.iterdir()} == expected


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_every_command_takes_the_common_options_and_shows_examples_and_exit_codes(
    mbx: Run, path: tuple[str, ...]
) -> None:
    text = mbx(*path, "--help").stdout
    for option in ("--json", "--quiet", "--verbose"):
        assert option in text
    examples = text.partition("Examples:")[2].partition("Exit codes:")[0]
    assert examples.count(f"mbx {' '.join(path)}") >= 2
    assert all(line in text for line in EXIT_CODES)


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"], ["models", "check", "--help"]])
def test_help_is_instant_and_imports_nothing_heavy(arguments: list[str]) -> None:
    code = "import sys; from mbx.cli import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    done, spent = _cpu_time(code, *arguments)
    imported = set(done.stderr.split())
    assert "typer" in imported and not imported & set(HEAVY)
    # Beside the libraries that every command line of this kind imports: a loaded machine is slow at both.
    shown = min(spent, *(_cpu_time(code, *arguments)[1] for _ in range(2)))
    libraries = min(_cpu_time("import typer.main, rich.console, rich.panel, rich.table")[1] for _ in range(3))
    assert shown < 4 * libraries


def _cpu_time(code: str, *arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """A Python process that ran `code`, and the seconds of CPU that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def test_a_group_without_a_command_shows_its_help(mbx: Run) -> None:
    said = mbx("convert")
    assert said.code == 2 and not said.stdout and "hf-to-mcore" in said.stderr


def test_an_unknown_command_is_met_with_the_nearest(mbx: Run) -> None:
    said = mbx("convrt")
    assert said.code == 2 and "convert" in said.stderr and said.stderr.startswith("error: ")


def test_version(mbx: Run) -> None:
    from mbx import __version__

    assert mbx("--version").stdout == f"mbx {__version__}\n"
