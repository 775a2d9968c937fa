"""Whether the command lines of a page are ones that this version takes; nothing is carried out."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import typer
from _pages import ROOT

from converters.errors import MbxError
from mbx.cli import app
from mbx.cli.recipes import named
from mbx.extras import DISTRIBUTION

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Words in place of a name: capitals, or dots.
_STANDS_FOR = re.compile(r"[A-Z][A-Z_]*|…")


def fault(words: list[str]) -> str | None:
    """What is wrong with a command line; None where nothing is."""
    check = _CHECKS.get(words[0])
    return f"no check knows `{words[0]}`" if check is None else check(words[1:])


def _mbx(words: list[str]) -> str | None:
    """Parsed by the command line itself, commands doing nothing; recipes with their overrides are made."""
    command = typer.main.get_command(app)
    seen: list[dict[str, object]] = []
    _hollow(command, seen)
    words = ["llama32_1b_lora" if word == "…" and words[0] == "train" else word for word in words]
    try:
        command.main(args=words, prog_name="mbx", standalone_mode=False)
    except (typer.TyperException, MbxError) as error:
        return str(error)
    except SystemExit as stopped:
        return None if stopped.code in (0, None) else f"exit code {stopped.code}"
    return _recipe_fault(seen)


def _hollow(command: object, seen: list[dict[str, object]]) -> None:
    """Have every command note its options and do nothing else."""
    if getattr(command, "callback", None) is not None:
        command.callback = lambda **given: seen.append(given)  # type: ignore[attr-defined]
    for child in getattr(command, "commands", {}).values():
        _hollow(child, seen)


def _recipe_fault(seen: list[dict[str, object]]) -> str | None:
    from mbx.train.recipe.catalogue import load_recipe

    for given in seen:
        words = given.get("words") or ()
        if not words and not given.get("recipe"):
            continue
        recipe, overrides = named(given.get("recipe"), words)  # type: ignore[arg-type]
        overrides += [f"distill.teacher={given['teacher']}"] if given.get("teacher") else []
        if _STANDS_FOR.fullmatch(recipe) or "/" in recipe or recipe.endswith(".toml"):
            recipe = "llama32_1b_lora"
        try:
            load_recipe(recipe, [word for word in overrides if not word.startswith(("model=", "KEY="))])
        except MbxError as error:
            return str(error)
    return None


def _python(words: list[str]) -> str | None:
    if words[:2] == ["-m", "mbx"]:
        return _mbx(words[2:])
    if words[:2] == ["-m", "venv"]:
        return None
    if words[:2] == ["-m", "pytest"]:
        return _paths(words[2:])
    if words[:1] == ["-m"]:
        base = ROOT.joinpath(*words[1].split("."))
        return None if base.with_suffix(".py").is_file() or base.is_dir() else f"no module {words[1]}"
    return _paths(words[:1])


def _paths(words: list[str]) -> str | None:
    missing = [word for word in words if "/" in word and not (ROOT / word.partition("::")[0]).exists()]
    return f"not there: {missing}" if missing else None


def _torchrun(words: list[str]) -> str | None:
    at = words.index("-m") if "-m" in words else len(words)
    return _python(words[at:]) if words[at:] else _paths(words[-1:])


def _make(words: list[str]) -> str | None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    unknown = [word for word in words if "=" not in word and word not in targets]
    return f"no target {unknown}" if unknown else None


def _installer(words: list[str]) -> str | None:
    """pip, uv and pipx: what is installed of this project has the extras that are asked for."""
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        if found := re.fullmatch(rf"(?:{DISTRIBUTION}|\.|\./mbx)(?:\[([\w,-]+)\])?", word):
            unknown = set(filter(None, (found[1] or "").split(","))) - known.keys()
            return f"no extra {sorted(unknown)}" if unknown else None
    if {"torch", "--index-url", "https://download.pytorch.org/whl/cpu"} <= set(words):
        return None
    return None if {"-r", "venv", "mbx", "create"} & set(words) else "installs something else"


def _docker(words: list[str]) -> str | None:
    files = [words[at + 1] for at, word in enumerate(words[:-1]) if word in ("-f", "--file")]
    return _paths(files)


def _anything(words: list[str]) -> str | None:
    return None


_CHECKS: dict[str, Callable[[list[str]], str | None]] = {
    "mbx": _mbx,
    "python": _python,
    "python3": _python,
    "torchrun": _torchrun,
    "make": _make,
    "pip": _installer,
    "uv": _installer,
    "pipx": _installer,
    "conda": _installer,
    "docker": _docker,
    "pytest": _paths,
    "git": _anything,
}
