"""A teacher's likeliest tokens on disk: written once, and read beside the rows that they belong to.

FOLDER/mbx_logits.json       what was heard: vocabulary, tokens kept, temperature, length of rows
FOLDER/00000.rows            int64 [rows, 3]: a row's digest, 16 bytes, and where its tokens end in the files below
FOLDER/00000.tokens          int32 [learned tokens, k]
FOLDER/00000.logprobs        float32 [learned tokens, k]
FOLDER/00000.rest            float32 [learned tokens]: the logarithm of what all other tokens have together

A set of files for each data-parallel rank that wrote. Tokens that are not learned have no entry. Rows are found by
their content, so another order, another epoch, another seed or another number of processes finds them as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b, sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from converters.errors import StorageError, UsageError
from mbx.formats.files import os_failure
from mbx.models.tokenizer import read_tokenizer
from mbx.train.data.corpus import mapped
from mbx.train.data.rows import Heard, Row, Rows
from mbx.train.model.blueprint import Blueprint, has_tokenizer
from mbx.train.model.teacher import LOGITS
from mbx.train.recipe.sections import Recipe
from mbx.untrusted.small_files import read_json

if TYPE_CHECKING:
    from mbx.train.distill.terms import Top

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Facts:
    """What the files of a folder hold. `tokenizer`: digest of the tokens that both sides know, empty where a folder
    had none; `rows` and `learned` of all `parts`, which are numbered."""

    teacher: str
    vocabulary: int
    tokenizer: str
    top_k: int
    temperature: float
    length: int
    parts: int
    rows: int = 0
    learned: int = 0


def facts_of(recipe: Recipe, plan: Blueprint, parts: int) -> Facts:
    """What a recipe asks a teacher, in its own words."""
    d = recipe.distill
    return Facts(d.teacher, plan.vocab, tokens_digest(plan), d.top_k, d.temperature, recipe.data.length, parts)


def tokens_digest(plan: Blueprint) -> str:
    """SHA-256 of a tokenizer's tokens and their ids; empty where the folder has none."""
    if plan.hf is None or not has_tokenizer(plan.hf):
        return ""
    return sha256(json.dumps(sorted(read_tokenizer(plan.hf).get_vocab().items())).encode()).hexdigest()


def digest_of_row(row: Row) -> bytes:
    """What decides what a teacher says of a row, and of which of its tokens, in 16 bytes."""
    seen = blake2b(digest_size=16)
    for part in (row.tokens, row.positions, np.asarray(row.lengths, np.int64), row.mask > 0):
        seen.update(np.ascontiguousarray(part).tobytes())
    return seen.digest()


class Part:
    """One set of files, being written row by row; behind an error, which `failed` has until `close`, nothing is."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder = folder
        self.files = {name: (folder / f"{number:05d}.{name}").open("xb") for name in _KINDS}
        self.rows = self.learned = 0
        self.failed: OSError | None = None

    def add(self, row: Row, top: Top) -> None:
        """Append a row, of whose tokens `top` has all, [length, k]."""
        if self.failed is not None:
            return
        learned = row.mask > 0
        self.rows, self.learned = self.rows + 1, self.learned + int(learned.sum())
        try:
            self.files["rows"].write(digest_of_row(row) + np.int64(self.learned).tobytes())
            for name in ("tokens", "logprobs", "rest"):
                values = getattr(top, name).cpu().numpy()[learned].astype(_KINDS[name])
                self.files[name].write(values.tobytes())
        except OSError as error:
            self.failed = error

    def close(self) -> None:
        """Close the files; StorageError or DeviceError where not all of them was written."""
        for file in self.files.values():
            try:
                file.close()
            except OSError as error:
                self.failed = self.failed or error
        if self.failed is not None:
            raise os_failure(self.failed, f"cannot write `{self.folder}`") from self.failed


_KINDS: Mapping[str, type[np.generic]] = {
    "rows": np.int64,
    "tokens": np.int32,
    "logprobs": np.float32,
    "rest": np.float32,
}


def write_facts(folder: Path, facts: Facts) -> None:
    """Write what describes the files, last of all."""
    (folder / LOGITS).write_text(json.dumps({"format": FORMAT, **asdict(facts)}, indent=1), encoding="utf-8")


class Logits:
    """An opened folder; StorageError where its files are not what it says of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            said = read_json(folder / LOGITS)
            if said.pop("format") != FORMAT:
                raise ValueError("it is of another release")
            self.facts = Facts(**{name: type(getattr(_BLANK, name))(said[name]) for name in Facts.__slots__})
            if not 0 < self.facts.parts < _MOST_PARTS or self.facts.top_k < 1:
                raise ValueError(f"{self.facts.parts} parts of {self.facts.top_k} tokens")
            self.parts = [self._part(number) for number in range(self.facts.parts)]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"the logits in `{folder}` cannot be used: {error}") from error
        self._keys = np.concatenate([part["rows"][:, 0] for part in self.parts])
        self._order = np.argsort(self._keys, kind="stable")
        self._firsts = np.cumsum([0, *(len(part["rows"]) for part in self.parts)])

    def _part(self, number: int) -> dict[str, npt.NDArray]:  # type: ignore[type-arg]
        k = self.facts.top_k
        shapes = {"rows": (-1, 3), "tokens": (-1, k), "logprobs": (-1, k), "rest": (-1,)}
        found = {
            name: mapped(self.folder / f"{number:05d}.{name}", kind).reshape(shapes[name])
            for name, kind in _KINDS.items()
        }
        ends = found["rows"][:, 2]
        learned = int(ends[-1]) if len(ends) else 0
        sizes = {len(found[name]) for name in ("tokens", "logprobs", "rest")}
        if sizes != {learned} or (np.diff(ends, prepend=0) < 0).any():
            raise ValueError(f"the files of part {number} do not fit each other")
        return found

    def heard(self, row: Row) -> Heard | None:
        """What the teacher says of a row; None where it was not asked about its tokens."""
        if not row.mask.any():
            return self.blank(len(row.tokens))
        key, check = np.frombuffer(digest_of_row(row), np.int64)
        first = np.searchsorted(self._keys, key, sorter=self._order)
        for at in self._order[first:]:
            number = int(np.searchsorted(self._firsts, at, "right")) - 1
            part, here = self.parts[number], int(at - self._firsts[number])
            if part["rows"][here, 0] != key:
                return None
            if part["rows"][here, 1] == check:
                return self._of(part, here, row)
        return None

    def _of(self, part: Mapping[str, npt.NDArray], here: int, row: Row) -> Heard:  # type: ignore[type-arg]
        ends = part["rows"][:, 2]
        place = slice(int(ends[here - 1]) if here else 0, int(ends[here]))
        found, learned = self.blank(len(row.tokens)), row.mask > 0
        for name in ("tokens", "logprobs", "rest"):
            getattr(found, name)[learned] = part[name][place]
        return found

    def blank(self, length: int) -> Heard:
        """Of tokens that are not learned, of which anything finite will do."""
        shape = (length, self.facts.top_k)
        return Heard(np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.full(length, -np.inf, np.float32))

    def beside(self, rows: Rows) -> Taught:
        """The same rows, with what the teacher says of each."""
        return Taught(rows, self)

    def check(self, recipe: Recipe, plan: Blueprint) -> None:
        """UsageError where the folder answers another question than the recipe's."""
        asked, known = facts_of(recipe, plan, 1), self.facts
        pairs = [
            ("the vocabulary", known.vocabulary, asked.vocabulary, "a teacher with the student's tokenizer"),
            ("data.length", known.length, asked.length, f"data.length={known.length}"),
            (
                "distill.temperature",
                known.temperature,
                asked.temperature,
                f"distill.temperature={known.temperature:g}",
            ),
            ("distill.top_k", known.top_k, asked.top_k or known.top_k, f"distill.top_k={known.top_k}"),
        ]
        for name, there, here, hint in pairs:
            if there != here:
                raise UsageError(f"the logits in `{self.folder}` are of {name} {there}, not {here}", hint=hint)
        if known.tokenizer and asked.tokenizer and known.tokenizer != asked.tokenizer:
            raise UsageError(f"the logits in `{self.folder}` are of another tokenizer", hint=pairs[0][3])


_BLANK = Facts("", 0, "", 0, 0.0, 0, 0)
_MOST_PARTS = 100_000


class Taught:
    """Rows with what a teacher said of each. One that it was not asked about is `missing`, and says nothing true."""

    def __init__(self, rows: Rows, logits: Logits) -> None:
        self.rows, self.logits = rows, logits
        self.missing: list[int] = []

    def row(self, index: int) -> Row:
        """Row `index` of the run."""
        row = self.rows.row(index)
        if (heard := self.logits.heard(row)) is None:
            self.missing.append(index)
            heard = self.logits.blank(len(row.tokens))
        return replace(row, heard=heard)

    def check(self) -> None:
        """UsageError where a row was missing."""
        if self.missing:
            folder, row = self.logits.folder, self.missing[0]
            raise UsageError(
                f"the logits in `{folder}` have nothing on row {row} of the run: they are of other data",
                hint="`mbx train logits` with this recipe's data, template, tokenizer and packing makes them",
            )
