"""Pipes and devices in the place of files that are read whole: refused at once, not waited for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from converters.errors import MbxError
from mbx.train.data.examples import read_examples
from mbx.train.recipe.catalogue import load_recipe
from mbx.train.recipe.sections import Data
from mbx.train.run.report import read_metrics

READERS: dict[str, Callable[[Path], object]] = {
    "data.jsonl": lambda path: read_examples(Data(kind="text"), path, cast("None", None)),  # type: ignore[arg-type]
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
