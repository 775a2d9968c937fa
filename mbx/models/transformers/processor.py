"""The processor of a folder whose model sees, as Transformers reads it: images to what the class takes of them.

Only its part for images and its tokenizer are built: those for films and sounds want libraries of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.errors import StorageError, UnsupportedError, UsageError
from mbx.models.transformers.reference import silent_transformers, transformers_config
from mbx.untrusted.small_files import SETTINGS, read_small

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

#: Files that say how a folder's images are prepared, and what its text model does with them.
_FILES = ("preprocessor_config.json", "processor_config.json", "config.json")
#: What a processor makes of text.
_TEXT = frozenset(("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"))


@dataclass(frozen=True, slots=True)
class Expanded:
    """A text whose marks of images have become as many tokens as the images take.

    `spans`: of each mark [begin, end) in the text before, and in the one behind. `ids`: the processor's own.
    """

    text: str
    spans: tuple[tuple[int, int, int, int], ...]
    ids: tuple[int, ...]


class Processor:
    """A folder's processor of images and text; UnsupportedError where Transformers has none that mbx can use."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.own = folder, _read(folder)

    def expand(self, text: str, images: Sequence[Image]) -> Expanded:
        """`text`, in which a template wrote a mark for each of `images`; UsageError where their numbers differ."""
        try:
            done = self.own(
                images=[list(images)], text=[text], return_text_replacement_offsets=True, add_special_tokens=False
            )
            found = done["text_replacement_offsets"][0]
        except (ValueError, StopIteration, IndexError, RuntimeError) as error:
            raise UsageError(f"the model's processor refuses the images of this conversation: {error}") from error
        if len(found) != len(images):
            raise UsageError(
                f"the record has {len(images)} images, and the chat template shows {len(found)}",
                hint="data.template names a template that shows images, or the model's own is missing",
            )
        parts, last, spans = [], 0, []
        for one in found:
            (begin, end), (new_begin, new_end) = one["span"], one["new_span"]
            parts += [text[last:begin], one["replacement"]]
            spans.append((begin, end, new_begin, new_end))
            last = end
        return Expanded("".join([*parts, text[last:]]), tuple(spans), tuple(map(int, done["input_ids"][0])))

    def inputs(self, images: Sequence[Image]) -> dict[str, torch.Tensor]:
        """What the class takes of `images`, in their order."""
        done: Mapping[str, Any] = self.own(images=[list(images)], return_tensors="pt")
        return {name: value for name, value in done.items() if name not in _TEXT}


def digest_of_processor(folder: Path) -> str:
    """SHA-256 of what says how a folder's images become tokens and positions."""
    done = sha256()
    for name in _FILES:
        content = read_small(folder / name, SETTINGS) if (folder / name).is_file() else b""
        done.update(f"{name} {len(content)}\n".encode() + content)
    return done.hexdigest()


def _read(folder: Path) -> Any:
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    try:
        config = transformers_config(folder, whole=True)
        known: Any = PROCESSOR_MAPPING[type(config)]
    except (ValueError, KeyError, ImportError) as error:
        raise UnsupportedError(f"Transformers has no processor of images for `{folder}`: {error}") from error
    if not hasattr(known, "get_text_with_replacements") or not hasattr(known, "get_attributes"):
        raise UnsupportedError(
            "the processors of this Transformers do not say where the tokens of an image go, as those of 5.23 do",
            hint="pip install -U transformers",
        )

    class Stills(known):  # type: ignore[misc]
        """The same without its parts for films and sounds."""

        @classmethod
        def get_attributes(cls) -> list[str]:
            """What the processor is made of."""
            return [name for name in super().get_attributes() if "tokenizer" in name or "image" in name]

    try:
        with silent_transformers():
            return Stills.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # it checks little of the files: a wrong one ends in whatever the value led to
        said = f"{type(error).__name__}: {error}"
        raise StorageError(
            f"Transformers cannot read the processor of `{folder}`: {said}",
            hint="a model that sees comes with preprocessor_config.json; copy it there",
        ) from error
