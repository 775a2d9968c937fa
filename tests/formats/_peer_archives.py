"""Checkpoints that other tools made, packed, with the Hugging Face folders that they were made from."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
#: A further folder of archives: `TOOL/NAME.tar.xz` with `NAME/{hf,mcore}`, where `hf` may lie in another tool's.
FURTHER_ENV = "MBX_PEER_ARCHIVES"


@dataclass(frozen=True)
class Peer:
    """A folder, and the checkpoint that a tool made of it."""

    hf: Path
    mcore: Path


def archives() -> list[Path]:
    """Every archive that is here."""
    folders = [FIXTURES / "peer", FIXTURES / "peer_0_6"]
    if FURTHER_ENV in os.environ:
        folders.append(Path(os.environ[FURTHER_ENV]))
    return sorted(path for folder in folders for path in folder.rglob("*.tar.xz"))


def unpacked(archive: Path, folder: Path) -> Path:
    """`folder`, with what the archive holds in it."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder


def peers_in(archive: Path, folder: Path) -> Iterator[Peer]:
    """The checkpoints of an archive, unpacked into `folder`; none where no folder of theirs is packed anywhere."""
    unpacked(archive, folder / "own")
    for mcore in sorted((folder / "own").rglob("mcore")):
        sources = [mcore.parent / "hf", *sorted((folder / "own").glob("*/hf"))]
        if not any(source.is_dir() for source in sources):
            for other in sorted(set(archive.parent.parent.glob(f"*/{archive.name}")) - {archive}):
                sources += unpacked(other, folder / other.parent.name).glob("*/hf")
        source = next((source for source in sources if source.is_dir()), None)
        if source is not None:
            yield Peer(source, mcore)
