"""What trainers keep beside a Megatron checkpoint's tensors: its tokenizer, and a folder with config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from converters.errors import StorageError
from converters.mcore.megatron_args import config_of_args
from converters.rows.expr import Value
from mbx.formats import hf
from mbx.untrusted.small_files import INDEX, read_json

if TYPE_CHECKING:
    from mbx.formats.checkpoint import Checkpoint

#: Folders of config.json and tokenizer that trainers write next to the folder of tensors: verl's.
_SISTERS = ("huggingface",)
_SETTINGS = (hf.CONFIG, "generation_config.json")
_SPECIAL = ("bos_token", "eos_token", "pad_token")


def tokenizer_beside(opened: Checkpoint) -> Path | None:
    """The folder in an iteration that Megatron-Bridge keeps the tokenizer in; None where it is not there, or empty."""
    folder = opened.home / "tokenizer"
    return folder if folder.is_dir() and tokenizer_files(folder) else None


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """A folder's files that belong to a tokenizer, by name; links out of it are left out."""
    return {name: folder / name for name in hf.side_files(folder) if hf.is_tokenizer_file(name)}


def reference_files(folder: Path, *, whole: bool) -> dict[str, Path]:
    """What travels out of a folder with config.json: everything that is no weight, or the settings and the tokenizer.

    The second is for a folder that nobody but a checkpoint named.
    """
    names = hf.side_files(folder)
    chosen = names if whole else [name for name in names if name in _SETTINGS or hf.is_tokenizer_file(name)]
    return {name: folder / name for name in chosen}


def token_ids(folder: Path) -> dict[str, Value]:
    """`bos_token_id` and its like of a tokenizer's folder, those that its files say; StorageError for damaged ones."""
    files = tokenizer_files(folder)
    settings, whole = (
        read_json(files[name], INDEX) if name in files else {} for name in ("tokenizer_config.json", "tokenizer.json")
    )
    ids = dict(_ids(settings, whole))
    named = settings if isinstance(settings, Mapping) else {}
    out: dict[str, Value] = {}
    for special in _SPECIAL:
        token = named.get(special)
        content = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(content, str) and content in ids:
            out[f"{special}_id"] = ids[content]
    return out


def _ids(settings: object, whole: object) -> Iterator[tuple[str, int]]:
    """Contents of special tokens and their ids, by each of the files."""
    decoder = settings.get("added_tokens_decoder") if isinstance(settings, Mapping) else None
    for number, token in decoder.items() if isinstance(decoder, Mapping) else ():
        if isinstance(token, Mapping) and str(number).isdigit():
            yield str(token.get("content")), int(number)
    added = whole.get("added_tokens") if isinstance(whole, Mapping) else None
    for token in added if isinstance(added, list) else ():
        if isinstance(token, Mapping) and isinstance(token.get("id"), int):
            yield str(token.get("content")), int(token["id"])


def with_config(opened: Checkpoint, folder: Path | None) -> Checkpoint:
    """A Megatron checkpoint with the config.json of `folder`, or of the place where its trainer keeps one.

    One that has a config.json of its own, or says itself what it is of, stays as it is unless a folder is named.
    """
    if opened.spelling != "mcore":
        return opened
    own = opened.hf is not None and (opened.hf / hf.CONFIG).is_file()
    says = opened.run_config or opened.args and config_of_args(opened.args)
    if folder is not None and not (folder / hf.CONFIG).is_file():
        raise StorageError(
            f"`{folder}` has no `{hf.CONFIG}`",
            hint="‹hf-config› names the model's Hugging Face folder or hub name; weights need not lie there",
        )
    if folder is None and not own and not says:
        folder = config_beside(opened)
    return opened if folder is None else replace(opened, hf=folder)


def config_beside(opened: Checkpoint) -> Path | None:
    """A folder with the config.json of a checkpoint that says nothing of its model, where trainers keep one.

    It is next to the tensors (verl's `huggingface`), the checkpoint's own folder above an iteration, or the one that
    ms-swift's `args` name. None where there is none.
    """
    folders = [opened.home.parent / name for name in _SISTERS]
    if opened.root not in (opened.home, Path()):
        folders += [opened.root, *(opened.root.parent / name for name in _SISTERS)]
    named = (opened.args or {}).get("model_dir")
    if isinstance(named, str) and named:
        folders.append(Path(named))
    return next((folder for folder in folders if (folder / hf.CONFIG).is_file()), None)
