"""The tokenizer of a Hugging Face folder, as Transformers reads it; nothing of the folder's code is run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from converters.errors import StorageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_tokenizer(folder: Path, *, hint: str | None = None) -> PreTrainedTokenizerBase:
    """The folder's tokenizer; StorageError, with `hint`, where Transformers cannot read it."""
    from transformers import AutoTokenizer

    try:
        with _silent_stdout():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # it checks little of the files: a wrong one ends in whatever the value led to
        said = f"{type(error).__name__}: {error}"
        raise StorageError(f"Transformers cannot read the tokenizer of `{folder}`: {said}", hint=hint) from error


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """Keeps from stdout what is written to its descriptor: `tokenizers` prints names that it finds in the files."""
    sys.stdout.flush()
    kept, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(null)
