"""Damage and malice, drawn from a seeded generator: one or two changes to the files of a checkpoint."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

NAMES = ("../x", "a/../../x", "/etc/passwd", "a\0b", "\ud800", "x" * 5000, "", ".", "a\\b", "\x1b[2J", "‮gnp")
#: What may stand where another value stood.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.5, 1e308, float("inf"), float("nan"),
    "", "x", [], {}, [[]], [0], {"a": 1}, [None] * 1000, {"": {"": {"": []}}}, "9" * 5000, *NAMES,
)  # fmt: skip
#: Fragments of template programs: endless, huge, curious.
PROGRAMS = (
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
    "{{ 'a' * 10000000000 }}",
    "{{ [0] * 10000000000 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ 'x' | center(10000000000) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '{:10000000000}'.format(1) }}",
    "{{ 'x'.ljust(10000000000) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% set ns = namespace(a='aa') %}{% for i in range(64) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('id') }}",
    "{{ lipsum(n=100000000) }}",
    "{% include '/etc/passwd' %}",
    "{% extends 'x' %}",
    "{{ raise_exception('no') }}",
    "{{ messages | map('attr', 'x') | list }}",
    "{{ 1 // 0 }}",
    "{{ '\\ud800' }}",
    "{% for",
    "{{ " + "(" * 500,
    "{{ " + "1 + " * 5000 + "1 }}",
    "{{ range(99999) | list | batch(1) | list | tojson }}",
    "{{ 'x' | indent(1000000000) }}",
    "{{ 'a,' * 1000000 | urlize }}",
    "{{ strftime_now('%Y' * 100) }}",
    "{{ strftime_now('\\ud800') }}",
)
_INTEGERS = (0, 1, 255, 2**15, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)


def mutate(number: int, folder: Path, files: list[Path], outside: Path) -> str:
    """Change one of `files` (a few times), as `number` says; what was done, in words. Links lead to `outside`."""
    rng = random.Random(number)
    path = rng.choice(files)
    if rng.random() < 0.05:
        done = _replace(rng, path, outside)
    else:
        content, words = path.read_bytes(), []
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            change = rng.choice(_changes_for(path))
            content = change(rng, content)
            words.append(change.__name__.strip("_"))
        path.write_bytes(content)
        done = "+".join(words)
    return f"{path.relative_to(folder)}: {done}"


def _changes_for(path: Path) -> list[Callable[[random.Random, bytes], bytes]]:
    binary = [_flip, _insert, _delete, _cut, _repeat, _integer, _name]
    kinds = {".json": [_json] * 8, ".jsonl": [_jsonl] * 8, ".yaml": [_yaml] * 8, ".toml": [_toml] * 8}
    kinds[".jinja"] = [_program] * 8
    kinds[".safetensors"] = [_header] * 8
    return [*binary, *kinds.get(path.suffix, [])]


def _replace(rng: random.Random, path: Path, outside: Path) -> str:
    kind = rng.choice(("pipe", "zero", "folder", "link", "loop", "gone", "empty"))
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind != "gone":
        path.symlink_to({"zero": "/dev/zero", "link": str(outside), "loop": path.name}[kind])
    return kind


def _at(rng: random.Random, data: bytes) -> int:
    """A place in it; the start, where headers lie, and the end, where a zip's directory does, are met most."""
    near = min(len(data), rng.choice((16, 400, 10**9)))
    at = rng.randrange(near) if near else 0
    return len(data) - 1 - at if near and rng.random() < 0.3 else at


def _flip(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 8))):
        if out:
            out[_at(rng, data)] ^= 1 << rng.randrange(8)
    return bytes(out)


def _insert(rng: random.Random, data: bytes) -> bytes:
    at = _at(rng, data)
    return data[:at] + rng.randbytes(rng.choice((1, 4, 8, 100))) + data[at:]


def _delete(rng: random.Random, data: bytes) -> bytes:
    at = _at(rng, data)
    return data[:at] + data[at + rng.choice((1, 4, 8, 100)) :]


def _cut(rng: random.Random, data: bytes) -> bytes:
    return data[: _at(rng, data)]


def _repeat(rng: random.Random, data: bytes) -> bytes:
    at, length = _at(rng, data), rng.choice((1, 8, 64, 1000))
    return data[: at + length] + data[at : at + length] * rng.choice((1, 3, 50)) + data[at + length :]


def _integer(rng: random.Random, data: bytes) -> bytes:
    at, (size, code) = _at(rng, data), rng.choice(((2, "H"), (4, "I"), (8, "Q")))
    value = rng.choice(_INTEGERS) & (1 << 8 * size) - 1
    return data[:at] + struct.pack(rng.choice("<>") + code, value) + data[at + size :]


def _name(rng: random.Random, data: bytes) -> bytes:
    at, name = _at(rng, data), rng.choice(NAMES).encode("utf-8", "surrogatepass")
    return data[:at] + name + data[at + rng.choice((0, len(name))) :]


def _json(rng: random.Random, data: bytes) -> bytes:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return data + b"}"
    if rng.random() < 0.02:
        return b"[" * 100_000
    return json.dumps(_changed(rng, value)).encode()


def _jsonl(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = _json(rng, lines[at])
    return b"\n".join(lines)


def _yaml(rng: random.Random, data: bytes) -> bytes:
    try:
        value = yaml.safe_load(data)
    except (ValueError, RecursionError, yaml.YAMLError):
        return data + b"}"
    extra = rng.choice(
        ("", "", "", "\nz: !!python/object/apply:os.mkdir [PWNED]\n", "\n<<: {a: 1}\n", "\n? [a]\n: 1\n")
    )
    text = json.dumps(_changed(rng, value), default=str)[: 1 << 20]  # JSON is YAML, and is written at any depth
    return (text + extra).encode("utf-8", "surrogatepass")


def _toml(rng: random.Random, data: bytes) -> bytes:
    lines = data.decode("utf-8", "replace").splitlines() or [""]
    at, value = rng.randrange(len(lines)), rng.choice(VALUES)
    key, equals, _ = lines[at].partition("=")
    spelt = repr(value) if isinstance(value, float | int) and not isinstance(value, bool) else json.dumps(value)
    lines[at] = f"{key}= {spelt}" if equals else rng.choice((lines[at] * 2, "[[a]]", "a.b.c = 1", "x = " + "[" * 5000))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _program(rng: random.Random, data: bytes) -> bytes:
    at, program = rng.randrange(len(data) + 1), rng.choice(PROGRAMS).encode()
    return rng.choice((program, program + data, data + program, data[:at] + program + data[at:]))


def _header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors header changed as JSON, its length made to fit, mostly."""
    size = int.from_bytes(data[:8], "little")
    header = _json(rng, data[8 : 8 + size])
    length = len(header) if rng.random() < 0.9 else rng.choice(_INTEGERS)
    return struct.pack("<Q", length) + header + data[8 + size :]


def _changed(rng: random.Random, value: Any) -> Any:
    """The value with one place in it changed: another value, another key, gone, twice, or deep."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        match rng.randrange(10):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return {(rng.choice(NAMES) if k == key else k): v for k, v in value.items()}
            case 2:
                return {**value, rng.choice(NAMES): rng.choice(VALUES)}
        return {**value, key: _changed(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        match rng.randrange(8):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return [*value, value[at]]
        return [*value[:at], _changed(rng, value[at]), *value[at + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.3:
        return value + rng.choice((-1, 1, 7))
    chosen = rng.choice((*VALUES, "deep"))
    if chosen == "deep":
        for _ in range(rng.choice((50, 500))):
            chosen = [chosen]
    return chosen


def copy_of(seed: Path, into: Path) -> Path:
    """A fresh copy of a seed's folder."""
    shutil.rmtree(into, ignore_errors=True)
    return Path(shutil.copytree(seed, into))
