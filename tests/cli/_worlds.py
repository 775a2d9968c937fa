"""Random folders around source and target, and what has to be found in them afterwards."""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
from dataclasses import dataclass, field
from pathlib import Path

MAPPING = Path(__file__).parents[2] / "mappings" / "llama.toml"
Print = dict[str, tuple[object, ...]]

#: Command → its sources and its options; `hf` among the options is a source too.
COMMANDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "hf-to-mcore": (("hf",), ()),
    "mcore-to-hf": (("mcore",), ()),
    "reshard": (("mcore",), ("--tp", "2")),
    "merge": (("hf", "lora"), ()),
    "adapter-to-mcore": (("lora",), ("--base", "hf")),
    "adapter-to-hf": (("lora-mcore",), ("--base", "hf")),
}
#: What `--overwrite` replaces.
CHECKPOINTS = ("mcore", "made", "lora-mcore", "hf", "single", "lora", "bare")


def prints(root: Path) -> Print:
    """Kind, mode and content of everything below `root`; links are not followed."""
    found: Print = {}
    for at, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(at, name)
            state = path.lstat()
            content: object = None
            if stat.S_ISLNK(state.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(state.st_mode):
                content = path.read_bytes()
            found[str(path.relative_to(root))] = (stat.S_IFMT(state.st_mode), stat.S_IMODE(state.st_mode), content)
    return found


def litter(folder: Path, chance: random.Random, count: int, prefix: str = "") -> None:
    """Foreign files, folders, links and pipes in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = folder / f"{prefix}{chance.choice(['notes', '.hidden', 'model', 'dst', 'a b', 'ü'])}{number}"
        kind = chance.choice(["file", "folder", "empty", "link", "git", "pipe", "checkpoint"])
        if kind == "file":
            path.write_bytes(chance.randbytes(chance.randrange(40)))
            path.chmod(chance.choice([0o644, 0o600, 0o444, 0o755]))
        elif kind == "folder":
            (path / "deep" / "deeper").mkdir(parents=True)
            (path / "deep" / "thesis.tex").write_bytes(chance.randbytes(20))
        elif kind == "empty":
            path.mkdir(mode=chance.choice([0o755, 0o700]))
        elif kind == "link":
            path.symlink_to(chance.choice(["nowhere", "..", ".", "/etc/hostname"]))
        elif kind == "git":
            (path / ".git").mkdir(parents=True)
            (path / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.mkdir()
            (path / "config.json").write_text("{}")
            (path / "model.safetensors").write_bytes(chance.randbytes(30))


STRAYS = (
    *("notes.txt", ".git/HEAD", "deep/nested/x", ".hidden", "empty/", ".mbx/notes.txt", ".mbx/", "iter_0000000/x.txt"),
    *("link to a folder", "link to a file", "link for README.md", "hard link", "pipe", "b\udcff\n.txt"),
)


def stray(folder: Path, what: str, outside: Path) -> None:
    """One foreign thing in `folder`, of a kind of STRAYS; `outside` is a folder with a file `mine`."""
    if what == "link to a folder":
        (folder / "iter_0000007").symlink_to(outside)
    elif what == "link to a file":
        (folder / "model-extra.safetensors").symlink_to(outside / "mine")
    elif what == "link for README.md":
        (folder / "README.md").unlink(missing_ok=True)
        (folder / "README.md").symlink_to(os.path.relpath(outside / "mine", folder))
    elif what == "hard link":
        (folder / "mine").hardlink_to(outside / "mine")
    elif what == "pipe":
        os.mkfifo(folder / "config.json.pipe")
    elif what.endswith("/"):
        (folder / what).mkdir()
    else:
        path = folder / what
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")


@dataclass
class World:
    """A working folder, a command line, and what it may replace (a folder relative to `root`; None: nothing)."""

    root: Path
    words: list[str]
    target: Path
    succeeds: bool
    gives: str | None = None
    told: list[str] = field(default_factory=list)

    @property
    def cwd(self) -> Path:
        return self.root / "up" / "work"

    def foreign(self, before: Print) -> Print:
        """What has to stay of a fingerprint."""
        gives = self.gives
        if gives is None:
            return before
        return {name: one for name, one in before.items() if name != gives and not name.startswith(f"{gives}/")}


def settle(stock: Path, root: Path, command: str, chance: random.Random) -> Path:
    """Sources and foreign neighbours under `root`; returns the working folder."""
    work = root / "up" / "work"
    work.mkdir(parents=True)
    for name in {*COMMANDS[command][0], *(w for w in COMMANDS[command][1] if w == "hf")}:
        shutil.copytree(stock / name, work / name)
    for folder in (root, root / "up", work):
        litter(folder, chance, 3)
    for name in ("dst.old", "dst.bak", ".dst.partial"):
        litter(work / name, chance, 1)
    (root / "outside").mkdir()
    (root / "outside" / "mine").write_text("mine")
    return work


def put(stock: Path, target: Path, kind: str) -> None:
    """A checkpoint of a kind at `target`; `bare` is Megatron's without mbx's manifest."""
    shutil.copytree(stock / ("mcore" if kind == "bare" else kind), target)
    if kind == "bare":
        (target / "mbx_manifest.json").unlink()


def _spelt(target: Path, work: Path, chance: random.Random) -> str:
    """The target as a user may give it."""
    relative = os.path.relpath(target, work)
    made = chance.randrange(5)
    if made == 4:
        (work / "here").symlink_to(".")
    return [str(target), relative, f"{relative}/", f"nowhere/../{relative}", f"here/{relative}"][made]


#: Where a target stands.
PLACES = (
    *("fresh", "empty", "dangling", "checkpoint", "checkpoint", "linked checkpoint"),
    *("strayed", "strayed", "strayed", "project", "web project", "file", "linked project", "loop"),
    *("source", "in source", "above source", "source links in", "source is a link in", "mapping"),
    *("work: tree", "work: checkpoint", "work: strayed", "work: link"),
)


def world(stock: Path, root: Path, command: str, seed: int) -> World:
    """A random world of a seed."""
    chance = random.Random(f"{command} {seed}")
    work = settle(stock, root, command, chance)
    sources, options = COMMANDS[command]
    place, kind = PLACES[seed % len(PLACES)], chance.choice(CHECKPOINTS)
    made = World(root, [], work / "dst", place in ("fresh", "empty", "dangling") or place.endswith("checkpoint"))
    made.told = [place, kind]
    named = [str(work / name) if chance.random() < 0.5 else name for name in sources]
    target = work / "dst"
    if place.startswith("work: "):
        made.succeeds = False
        _work(stock, work / "dst.partial", place, chance, root / "outside")
        made.told += [name for name in prints(work) if name.startswith("dst.partial")]
    elif "source" in place:
        read = work / chance.choice([*sources, *(word for word in options if word == "hf")])
        target = _overlap(stock, read, place, chance)
    elif place.endswith("checkpoint"):
        made.target = work / ("real" if place.startswith("linked") else "dst")
        put(stock, made.target, kind)
        made.gives = str(made.target.relative_to(root))
        if made.target != target:
            target.symlink_to("real")
    elif place in ("strayed", "mapping"):
        put(stock, target, kind)
        what = chance.choice(STRAYS)
        made.told.append(what)
        if place == "strayed":
            stray(target, what, root / "outside")
        else:
            shutil.copy(MAPPING, target / "mine.toml")
            options = (*options, "--mapping", "dst/mine.toml")
    else:
        _no_checkpoint(target, place, chance, root / "outside")
    if place == "dangling":
        made.target = Path(os.path.realpath(target))
    made.words = ["convert", command, *named, _spelt(target, work, chance), "--overwrite", *options]
    made.words += chance.choice([[], [], ["--resume"], ["--no-sync"]])
    return made


def _overlap(stock: Path, read: Path, place: str, chance: random.Random) -> Path:
    """A target that is a source, or shares something with one."""
    target = read.with_name("dst")
    if place == "source links in":
        put(stock, target, read.name)
        name = chance.choice(sorted(path for path in read.rglob("*") if path.is_file()))
        name.unlink()
        name.symlink_to(target / name.relative_to(read))
    elif place == "source is a link in":
        read.rename(target)
        read.symlink_to("dst")
    elif place == "source":
        return read
    elif place == "in source":
        return read / chance.choice(["new", "hf"])
    else:
        return chance.choice([read.parent, read.parent.parent])
    return target


def _no_checkpoint(target: Path, place: str, chance: random.Random, outside: Path) -> None:
    """A target that is nothing yet, or none of mbx's business."""
    if place == "empty":
        target.mkdir()
    elif place == "dangling":
        target.symlink_to(chance.choice(["new", "../new", "new/deep"]))
    elif place == "loop":
        target.symlink_to("dst")
    elif place == "project":
        litter(target, chance, 3)
        stray(target, ".git/HEAD", outside)
    elif place == "web project":
        target.mkdir()
        (target / "config.json").write_text(json.dumps({"port": 80}))
    elif place == "file":
        target.write_text("mine")
    elif place == "linked project":
        target.symlink_to(outside)


def _work(stock: Path, partial: Path, place: str, chance: random.Random, outside: Path) -> None:
    """Something under the name of the folder of work that no run left there."""
    if place == "work: tree":
        litter(partial, chance, 2)
    elif place == "work: checkpoint":
        put(stock, partial, chance.choice(CHECKPOINTS))
    elif place == "work: link":
        partial.symlink_to(chance.choice([str(outside), "hf", "nowhere"]))
    else:
        (partial / ".mbx").mkdir(parents=True)
        (partial / "iter_0000000").mkdir()
        if chance.random() < 0.5:
            (partial / ".mbx" / "run.json").write_text(json.dumps({"files": ["config.json"]}))
        stray(partial, chance.choice([what for what in STRAYS if what != ".mbx/"]), outside)
