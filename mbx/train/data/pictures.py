"""Images of chats: named in records, counted in tokens when data is prepared, read again when a row is trained on."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from converters.errors import UnsupportedError, UsageError
from mbx.train.data.tokens import Example, Picture, Span
from mbx.train.model.sight import Sight
from mbx.untrusted.images import decoded, image_path, read_image

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from mbx.models.transformers.processor import Processor
    from mbx.models.transformers.tower import Axes


@dataclass(frozen=True, slots=True)
class Shown:
    """A chat with its images: text with all their tokens, spans in it, and the processor's own ids."""

    text: str
    spans: Sequence[Span]
    ids: tuple[int, ...]
    pictures: tuple[Picture, ...]
    inputs: Mapping[str, torch.Tensor]


@dataclass(frozen=True)  # no slots: the processor is read when the first image comes
class Eyes:
    """A model's processor, for images that records name."""

    sight: Sight

    @cached_property
    def processor(self) -> Processor:
        """The folder's."""
        from mbx.models.transformers.processor import Processor

        return Processor(self.sight.folder)

    @property
    def digest(self) -> str:
        """What decides how images become tokens and positions."""
        from mbx.models.transformers.processor import digest_of_processor

        return digest_of_processor(self.sight.folder)

    def show(self, text: str, spans: Sequence[Span], names: Sequence[str], folder: Path) -> Shown:
        """A rendered chat with the images `names` of `folder` put in; errors as of the gates for images."""
        files = [image_path(folder, name) for name in names]
        pictures, images = [], []
        for path in files:
            data = read_image(path)
            found = path.stat()
            pictures.append(Picture(str(path.absolute()), sha256(data).hexdigest(), len(data), found.st_mtime_ns))
            images.append(decoded(data, path))
        done = self.processor.expand(text, images)
        ends = [end for _, end, _, _ in done.spans]
        gained = [0, *(new_end - end for _, end, _, new_end in done.spans)]

        def moved(at: int) -> int:
            return at + gained[bisect_right(ends, at)]

        shifted = [(moved(begin), moved(end), learned) for begin, end, learned in spans]
        shifted += [(begin, end, False) for _, _, begin, end in done.spans]
        return Shown(done.text, shifted, done.ids, tuple(pictures), self.inputs(images))

    def seen(self, example: Example, shown: Shown) -> Example:
        """`example`, the tokens of what was `shown`, with its images and positions; UsageError where the processor
        would have made other tokens, or an image stands at the end."""
        import torch

        from mbx.models.pictures import Pictures

        if tuple(example.tokens.tolist()) != shown.ids:
            raise UsageError("the tokenizer and the model's processor make other tokens of this conversation")
        pictures = Pictures(self.sight.token, shown.inputs)
        ids = torch.from_numpy(example.tokens)[None]
        if bool(pictures.places(ids)[0, -1]):
            raise UsageError("the conversation ends with an image, which no answer follows")
        counts = torch.bincount(pictures.numbers(ids)[pictures.places(ids)]).tolist()
        if len(counts) != len(shown.pictures):
            raise UnsupportedError(
                f"the model's processor makes {len(counts)} parts of {len(shown.pictures)} images",
                hint="images are trained whole: do_pan_and_scan=false in preprocessor_config.json",
            )
        counted = tuple(replace(one, tokens=count) for one, count in zip(shown.pictures, counts, strict=True))
        axes = self._axes.of(ids, pictures) if self.sight.turned else None
        return Example(example.tokens, example.learn, counted, None if axes is None else axes.numpy())

    @cached_property
    def _axes(self) -> Axes:
        from mbx.models.transformers.tower import Axes

        return Axes(self.sight.folder)

    def inputs(self, images: Sequence[Image]) -> Mapping[str, torch.Tensor]:
        """What the model's class takes of images, in their order."""
        return self.processor.inputs(images)
