"""Pipes and devices in the place of files that are read whole: refused at once, not waited for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from converters.errors import MbxError
from mbx.train.data.sources import open_sources
from mbx.train.recipe.catalogue import load_recipe
from mbx.train.run.report import read_metrics

READERS: dict[str, Callable[[Path], object]] = {
    "data.jsonl": lambda path: list(open_sources(str(path))[0].records()),
    "recipe.toml": lambda path: load_recipe(str(path)),
    "metrics.jsonl": lambda path: read_metrics(path.parent),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_regular_file_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(MbxError, match="no regular file"):
        READERS[name](path)
