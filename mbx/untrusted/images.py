"""Images of strangers: files beside the data that names them, of a few formats and a bounded size; none is fetched."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from converters.errors import StorageError, UnsupportedError
from mbx.extras import install_line
from mbx.untrusted.names import is_inside, leads_out
from mbx.untrusted.small_files import read_small

if TYPE_CHECKING:
    from PIL.Image import Image

#: The largest image that is read, in bytes as it is stored and in pixels as it is decoded (three bytes each).
LARGEST = 64 << 20
MOST_PIXELS = 1 << 26
#: What Pillow may take a file for; it knows many more formats, most of which nobody looks at any more.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")


def image_path(folder: Path, name: str) -> Path:
    """Where the image `name` of data in `folder` lies; UnsupportedError for what would have to be fetched,
    StorageError for a name that leaves the folder, by itself or through a link."""
    kind = name.partition(":")[0].lower()
    if kind in ("http", "https", "ftp", "s3", "gs", "hf") and "://" in name:
        raise UnsupportedError(
            f"the image {name[:100]!r} lies elsewhere, and nothing is fetched while data is read",
            hint="put the image beside the data, and name it by its path from there",
        )
    if kind == "data":
        raise UnsupportedError(
            "an image stands within the record, as text", hint="put it into a file beside the data, and name that"
        )
    path = folder / name
    home = os.path.realpath(folder)
    if not is_inside(name) or leads_out(path) or os.path.commonpath((home, os.path.realpath(path.parent))) != home:
        raise StorageError(
            f"the image {name[:300]!r} does not lie in the folder of its data, `{folder}`",
            hint="images are named by their path from the file that names them, and lie beside or below it",
        )
    return path


def read_image(path: Path) -> bytes:
    """The content of an image's file; StorageError where there is none, or too large a one."""
    try:
        return read_small(path, LARGEST)
    except OSError as error:
        raise StorageError(f"cannot read the image `{path}`: {error.strerror or error}") from error


def decoded(data: bytes, path: Path) -> Image:
    """An image in RGB, turned as its camera says; StorageError for what is none, or has more than MOST_PIXELS."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise UnsupportedError("images need Pillow, which is not installed", hint=install_line("vision")) from error
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:  # its header alone
            wide, high = image.size
            if not 0 < wide * high <= MOST_PIXELS:
                raise StorageError(f"`{path}` has {wide} x {high} pixels; at most {MOST_PIXELS} are read")
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise StorageError(
            f"`{path}` cannot be read as an image: {error or type(error).__name__}",
            hint=f"known formats: {', '.join(FORMATS)}",
        ) from error
