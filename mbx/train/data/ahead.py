"""Images read and scaled on a thread while the micro-batch before theirs is trained on.

An image of 1024 x 1024 pixels takes a processor about 60 ms, which the GPU would wait for at every micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from mbx.train.data.pictures import Eyes
    from mbx.train.data.rows import Row
    from mbx.train.data.tokens import Picture

    Inputs = Mapping[str, torch.Tensor]


class Ahead:
    """What `eyes` make of the images of rows, those of one micro-batch ahead.

    Errors of an image come when its rows do: what was read ahead and is not asked for says nothing.
    """

    def __init__(self, eyes: Eyes) -> None:
        self.eyes = eyes
        self._thread = ThreadPoolExecutor(1, "images")
        self._coming: tuple[Sequence[Picture], Future[Inputs]] | None = None

    def of(self, rows: Sequence[Row]) -> Inputs:
        """What a tower takes of the images of `rows`, in their order; nothing where there are none."""
        pictures = _pictures(rows)
        coming, self._coming = self._coming, None
        if not pictures:
            return {}
        if coming is not None and coming[0] == pictures:
            return coming[1].result()
        return self._read(pictures)

    def begin(self, rows: Sequence[Row]) -> None:
        """Read the images of `rows`, which come next."""
        if pictures := _pictures(rows):
            self._coming = pictures, self._thread.submit(self._read, pictures)

    def close(self) -> None:
        """Wait for what is being read, and end the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _read(self, pictures: Sequence[Picture]) -> Inputs:
        return self.eyes.inputs([picture.read() for picture in pictures])


def _pictures(rows: Sequence[Row]) -> list[Picture]:
    return [one for row in rows for own in row.pictures for one in own]
