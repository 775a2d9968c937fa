"""The formats that are known, and the one place that decides what a folder is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import entry_points
from itertools import islice
from pathlib import Path
from typing import Protocol

from converters.adapters.megatron import MARKS
from converters.errors import StorageError, UsageError
from mbx.formats import hf
from mbx.formats.checkpoint import Checkpoint, Spelling
from mbx.formats.fsdp_dtensor import FsdpDtensor
from mbx.formats.hf import HuggingFace
from mbx.formats.legacy import Legacy
from mbx.formats.peft import CONFIG as PEFT_CONFIG
from mbx.formats.peft import Peft
from mbx.formats.pipelines import PIPELINE, of_pipeline
from mbx.formats.placement import Order, Placement
from mbx.formats.torch_dist import TRACKER, TorchDist


class Format(Protocol):
    """A way to store a checkpoint. `name` is what users choose it by, `title` what reports call it.

    `spelling` says whose names its tensors have, and with it which conversions it takes part in.
    """

    name: str
    title: str
    spelling: Spelling

    def find(self, path: Path) -> Path | None:
        """The folder that the tensors of the checkpoint at `path` lie in, None where it is none of this format.

        Told by which files are there, before any of them is believed. StorageError for a pointer that leads nowhere.
        """
        ...

    def open(self, path: Path, home: Path) -> Checkpoint:
        """Open the checkpoint at `path`, whose tensors `find` saw in `home`; headers are read and no tensor.

        Raises StorageError for one that is not whole, UnsupportedError for one that is not read.
        """
        ...

    def place(self, order: Order) -> Placement:
        """Where every chunk of a target will lie; UnsupportedError for a format that is only read."""
        ...


#: Asked in this order: a Megatron checkpoint may have any file of the others beside it, an adapter a config.json.
_BUILT_IN: tuple[Format, ...] = (Legacy(), FsdpDtensor(), TorchDist(), Peft(), HuggingFace())
_registered: list[Format] = []
#: Folders of a trainer's own in which the tensors lie: verl's, NeMo 2's.
_WITHIN = ("dist_ckpt", "weights")
#: Folders that are looked into, below one that is no checkpoint, and checkpoints that a message names.
_LOOKED_AT, _SHOWN = 64, 3
#: Installed packages offer a format as an entry point of this group: a class without arguments.
ENTRY_POINTS = "mbx.formats"


def register(format: Format) -> None:
    """Make a format of your own known, before the built-in ones; one of the same name goes."""
    unregister(format.name)
    _registered.append(format)


def unregister(name: str) -> None:
    """Forget a format that was registered."""
    _registered[:] = [one for one in _registered if one.name != name]


@cache
def _installed() -> tuple[Format, ...]:
    return tuple(point.load()() for point in entry_points(group=ENTRY_POINTS))


def formats() -> tuple[Format, ...]:
    """Every format, in the order in which a folder is held against them."""
    return (*_registered, *_installed(), *_BUILT_IN)


def writable(spelling: Spelling) -> tuple[str, ...]:
    """Names of the formats in which targets of a spelling can be stored, the usual one first."""
    return tuple(one.name for one in (*reversed(_BUILT_IN), *_registered, *_installed()) if one.spelling == spelling)


def format_named(name: str, spelling: Spelling) -> Format:
    """The format of a name, for targets of a spelling; UsageError lists the choices."""
    found = next((one for one in formats() if one.name == name and one.spelling == spelling), None)
    if found is None:
        raise UsageError(f"‹format› {name!r} is not known", hint=f"choices: {', '.join(writable(spelling))}")
    return found


@dataclass(frozen=True, slots=True)
class Sniffed:
    """What the folder `path` is: a checkpoint of `format`, its tensors in `home`."""

    path: Path
    format: Format
    home: Path

    def open(self) -> Checkpoint:
        """Open it, as its format does."""
        opened = self.format.open(self.path, self.home)
        made = any((folder / hf.MANIFEST).is_file() for folder in (self.path, self.home, self.home.parent))
        return replace(opened, writer="mbx", core=None) if made else opened


def find(path: Path) -> Sniffed | None:
    """What the folder at `path` is, None where it is nothing that is known.

    One that keeps its checkpoint in a folder of a name that trainers use is that checkpoint.
    """
    found = next((Sniffed(path, one, home) for one in formats() if (home := one.find(path)) is not None), None)
    if found is None:
        return next((inner for name in _WITHIN if (path / name).is_dir() and (inner := find(path / name))), None)
    return found


def sniff(path: Path) -> Sniffed:
    """What the folder at `path` is; StorageError where it is no checkpoint."""
    if not path.is_dir():
        what = "is a file; a folder was expected" if path.exists() else "does not exist"
        raise StorageError(f"`{path}` {what}", hint="name a checkpoint folder")
    if (found := find(path)) is not None:
        return found
    if unfinished := sorted(p.name for p in path.glob("iter_*") if p.is_dir()):
        raise StorageError(
            f"`{path}` is no Megatron Core checkpoint: it has neither `metadata.json` nor `{TRACKER}`",
            hint=f"name an iteration: {path / unfinished[-1]}",
        )
    if (path / PIPELINE).is_file():
        raise of_pipeline(path)
    if below := _below(path):
        held = ", ".join(f"{one.format.title} `{one.path}`" for one in below)
        raise StorageError(
            f"`{path}` is no checkpoint itself: it holds {held}",
            hint=f"name that: {below[0].path}" if len(below) == 1 else "name one of them",
        )
    raise StorageError(
        f"`{path}` is no checkpoint that mbx knows: neither a model of either kind nor an adapter",
        hint=f"a Megatron checkpoint has `{TRACKER}` or `.metadata`; it is no Hugging Face folder either: that has "
        f"`{hf.CONFIG}`, an adapter `{PEFT_CONFIG}`",
    )


def _below(path: Path) -> list[Sniffed]:
    """Checkpoints one folder down, as trainers keep adapters, and in a hub cache's `snapshots`."""
    folders = [path, path / "snapshots"]
    inside = (
        folder for parent in folders if parent.is_dir() for folder in islice(sorted(parent.iterdir()), _LOOKED_AT)
    )
    known = (find(folder) for folder in inside if folder.is_dir())
    return list(islice((one for one in known if one is not None), _SHOWN))


def open_checkpoint(path: Path) -> Checkpoint:
    """Open the checkpoint at `path`, whatever it is; headers are read and no tensor.

    Raises StorageError for what is no checkpoint, or not a whole one, UnsupportedError for one that is not read.
    """
    return sniff(path).open()


def open_hf(path: Path) -> Checkpoint:
    """Open a Hugging Face folder, or what goes by its names; StorageError for anything else."""
    return _open_as(path, "hf")


def open_megatron(path: Path) -> Checkpoint:
    """Open a Megatron checkpoint, the root or an iteration; StorageError for anything else."""
    return _open_as(path, "mcore")


def open_model(path: Path) -> Checkpoint:
    """Open a Megatron checkpoint of a model; UsageError for one that holds adapters.

    A model's conversion has no place for an adapter's alpha, without which its factors say nothing.
    """
    opened = open_megatron(path)
    if name := next((name for name in opened.tensors if any(mark in name for mark in MARKS)), None):
        raise UsageError(
            f"`{path}` holds an adapter, not a model: `{name}`",
            hint=f"`mbx convert adapter-to-hf {path} DST`, or `mbx convert merge BASE {path} DST` with the model that "
            "it adapts",
        )
    return opened


def _open_as(path: Path, spelling: Spelling) -> Checkpoint:
    found = sniff(path)
    if found.format.spelling != spelling:
        wanted = {"hf": "Hugging Face model", "mcore": "Megatron checkpoint", "peft": "PEFT folder"}[spelling]
        raise StorageError(f"`{path}` is no {wanted}", hint=instead(found))
    return found.open()


def instead(found: Sniffed) -> str:
    """What a folder is, with a command that takes it: a hint for a command that needs another kind."""
    path = found.path
    if found.format.spelling == "peft":
        return (
            f"an adapter: `mbx convert adapter-to-mcore {path} DST`, or `mbx convert merge BASE {path} DST` "
            "with the model that it adapts"
        )
    if found.format.spelling == "mcore":
        return f"a Megatron checkpoint: `mbx convert mcore-to-hf {path} DST` converts it"
    return f"a Hugging Face folder: `mbx convert hf-to-mcore {path} DST` converts it"
