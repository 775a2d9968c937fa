"""Images of the micro-batch to come are read while the one before is trained on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from converters.errors import StorageError
from mbx.train.data.ahead import Ahead


@dataclass
class Image:
    """A picture by number, which may be gone."""

    number: int
    gone: bool = False

    def read(self) -> int:
        if self.gone:
            raise StorageError(f"image {self.number} is gone")
        return self.number


@dataclass
class Watched:
    """Eyes that note what they read, and on which thread."""

    read: list[tuple[list[int], bool]] = field(default_factory=list)

    def inputs(self, images: Sequence[int]) -> dict[str, torch.Tensor]:
        self.read.append((list(images), threading.current_thread() is threading.main_thread()))
        return {"pixels": torch.tensor(images)}


def rows(*images: Image) -> Any:
    """A micro-batch whose row shows `images`."""
    return [SimpleNamespace(pictures=[list(images)])]


def test_each_image_is_read_once_and_ahead() -> None:
    eyes = Watched()
    ahead = Ahead(cast(Any, eyes))
    batches = [rows(Image(0), Image(1)), rows(), rows(Image(2)), rows(Image(3))]
    found = []
    for number, batch in enumerate(batches):
        found.append({name: value.tolist() for name, value in ahead.of(batch).items()})
        if number + 1 < len(batches):
            ahead.begin(batches[number + 1])
    ahead.close()
    assert found == [{"pixels": [0, 1]}, {}, {"pixels": [2]}, {"pixels": [3]}]
    assert eyes.read == [([0, 1], True), ([2], False), ([3], False)]


def test_another_batch_than_the_announced_one_is_read_when_it_comes() -> None:
    eyes = Watched()
    ahead = Ahead(cast(Any, eyes))
    ahead.begin(rows(Image(5, gone=True)))
    assert ahead.of(rows(Image(7)))["pixels"].tolist() == [7]  # what was announced and not asked for says nothing
    ahead.begin(rows(Image(5, gone=True)))
    with pytest.raises(StorageError, match="image 5 is gone"):
        ahead.of(rows(Image(5, gone=True)))
    ahead.close()
