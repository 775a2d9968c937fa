"""Where a source's files are: a local folder as it is, or a Hugging Face Hub model pinned to one commit.

`HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE` and the hub client's other variables hold, because every call
takes its settings from the client's own constants.
"""

from __future__ import annotations

import glob
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from converters.errors import StorageError, UsageError
from mbx.formats.hf import TEMPLATES
from mbx.formats.hub_errors import hub_errors
from mbx.formats.pipelines import PIPELINE
from mbx.untrusted.small_files import INDEX, read_json

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import tqdm

#: Called with (bytes here so far, bytes to download), from several threads but one at a time.
Progress = Callable[[int, int], None]

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
#: Files that an error names one by one.
_SHOWN = 4

_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_SIDE_SUFFIXES = (".json", ".txt", ".model", ".tiktoken", ".jinja", ".py")
_SIDE_FOLDERS = (".", TEMPLATES)
#: The name that `huggingface_hub.snapshot_download` gives its bar of bytes on disk.
_BYTES_BAR = "huggingface_hub.snapshot_download"


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model's folder; `repo_id` and `revision_sha` are None for a folder the user named."""

    path: Path
    repo_id: str | None
    revision_sha: str | None


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a hub model: its path in the repo, its size, and whether the cache has it."""

    path: str
    nbytes: int
    cached: bool


@dataclass(frozen=True, slots=True)
class DownloadPlan:
    """What `resolve` would fetch; without files for a local folder."""

    repo_id: str | None
    revision_sha: str | None
    files: tuple[RemoteFile, ...]

    @property
    def download_bytes(self) -> int:
        """Bytes that are not in the cache yet."""
        return sum(file.nbytes for file in self.files if not file.cached)


def resolve(
    source: str,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    weights: bool = True,
    progress: Progress | None = None,
) -> LocalModel:
    """The folder of `source`: a local path where one exists, else the hub model `org/name[@revision]`, downloaded.

    A branch or tag is first resolved to a commit, and that commit is downloaded: tokenizer, config, modeling code and,
    with `weights`, safetensors files (pytorch_model*.bin only where there are none). Without, a config.json stands for
    its folder. A commit that is complete in the
    cache is used without a request. When the hub cannot be reached, the commit last seen for the branch is used.
    Raises StorageError when the source cannot be had, UsageError for two different revisions, DeviceError for a full
    disk.
    """
    local = _local_folder(source, revision)
    if local is not None:
        named = local.name == CONFIG_FILE and not weights and local.is_file()
        return LocalModel(local.parent if named else local, None, None)
    repo_id, wanted = _parse(source, revision)
    with hub_errors(repo_id, wanted):
        from huggingface_hub import snapshot_download

        plan = _plan(repo_id, wanted, cache_dir, weights)
        _require_cached(plan)
        folder = snapshot_download(
            repo_id,
            revision=plan.revision_sha,
            cache_dir=cache_dir,
            allow_patterns=[glob.escape(file.path) for file in plan.files],
            library_name="mbx",
            tqdm_class=_bar_class(progress, plan.download_bytes),
        )
    return LocalModel(Path(folder), repo_id, plan.revision_sha)


def plan_download(
    source: str, *, revision: str | None = None, cache_dir: Path | None = None, weights: bool = True
) -> DownloadPlan:
    """The files that `resolve` with the same arguments would fetch, without fetching one; raises as `resolve` does."""
    if _local_folder(source, revision) is not None:
        return DownloadPlan(None, None, ())
    repo_id, wanted = _parse(source, revision)
    with hub_errors(repo_id, wanted):
        return _plan(repo_id, wanted, cache_dir, weights)


def select_files(sizes: Mapping[str, int], *, weights: bool) -> list[str]:
    """The files of a repo that a conversion reads, sorted; `sizes`: bytes by path in the repo.

    Weights lie at the top: subfolders hold other forms of the same model (`original/`, `onnx/`), and so does
    `consolidated*.safetensors` beside other safetensors files (Mistral).
    """
    tops = [path for path in sizes if "/" not in path]
    tensors = [path for path in tops if path.endswith(".safetensors")]
    tensors = [path for path in tensors if not path.startswith("consolidated")] or tensors
    pickles = [path for path in tops if path.startswith("pytorch_model") and path.endswith(".bin")]
    unused_index = "pytorch_model.bin.index.json" if tensors else INDEX_FILE
    side = [
        path
        for path in sizes
        if path.endswith(_SIDE_SUFFIXES) and str(PurePosixPath(path).parent) in _SIDE_FOLDERS and path != unused_index
    ]
    return sorted({*side, *((tensors or pickles) if weights else ())})


def _local_folder(source: str, revision: str | None) -> Path | None:
    """The existing path that `source` names, None for a hub model; raises StorageError for a path that is missing."""
    path = Path(source).expanduser()
    if source and path.exists():
        if revision is not None:
            raise UsageError(f"`{source}` is a local path and has no revision; got `{revision}`")
        return path
    name = source.partition("@")[0]
    if not source or source.startswith((".", "/", "~")) or name.count("/") != 1 or not _REPO_ID.fullmatch(name):
        raise StorageError(
            f"no such folder: `{source}`",
            hint="name a checkpoint folder, or a hub model as `org/name` or `org/name@revision`",
        )
    return None


def _parse(source: str, revision: str | None) -> tuple[str, str | None]:
    """Repo id and wanted revision of `org/name[@revision]`."""
    repo_id, at, inline = source.partition("@")
    if at and not inline:
        raise UsageError(f"`{source}` names no revision after `@`")
    if inline and revision is not None and inline != revision:
        raise UsageError(f"two revisions for `{repo_id}`: `{inline}` and `{revision}`", hint="give one of them")
    return repo_id, inline or revision


def _plan(repo_id: str, revision: str | None, cache_dir: Path | None, weights: bool) -> DownloadPlan:
    from huggingface_hub import HfApi, try_to_load_from_cache

    api = HfApi(library_name="mbx")
    sha = api.resolve_revision(repo_id, revision=revision, cache_dir=cache_dir).resolved
    sizes, whole = _list_files(api, repo_id, sha, cache_dir)
    if PIPELINE in sizes and CONFIG_FILE not in sizes:
        raise StorageError(
            f"`{repo_id}` is a pipeline of diffusers, whose transformers convert one by one",
            hint=f"`hf download {repo_id} --include 'transformer*/*' --local-dir DIR`, then name DIR/transformer",
        )
    chosen = select_files(sizes, weights=weights)
    if weights and not any(path.endswith((".safetensors", ".bin")) for path in chosen):
        if not whole:
            raise StorageError(
                f"the hub cannot be reached, and the cache holds of `{repo_id}` only {_shown(sizes)}: its weights "
                "were never downloaded",
                hint=f"with a network: `hf download {repo_id}`; or name a folder that has the weights",
                details=sorted(sizes),
            )
        raise StorageError(
            f"`{repo_id}` holds no weights in safetensors or pytorch_model*.bin files, but {_shown(sizes)}",
            hint="GGUF, ONNX and the like are made from a repository with the original weights: name that one",
            details=sorted(sizes),
        )
    files = tuple(
        RemoteFile(
            path,
            sizes[path],
            isinstance(try_to_load_from_cache(repo_id, path, cache_dir=cache_dir, revision=sha), str),
        )
        for path in chosen
    )
    return DownloadPlan(repo_id, sha, files)


def _shown(names: Iterable[str]) -> str:
    """The first of some files, in words."""
    listed = sorted(names)
    rest = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return (", ".join(f"`{name}`" for name in listed[:_SHOWN]) or "nothing") + rest


def _require_cached(plan: DownloadPlan) -> None:
    """StorageError where the hub client is told to stay offline and the cache lacks files of a commit."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE and (lacks := [file.path for file in plan.files if not file.cached]):
        raise StorageError(
            f"{len(lacks)} of the {len(plan.files)} files of `{plan.repo_id}` are not in the cache, and "
            f"HF_HUB_OFFLINE is set: {_shown(lacks)}",
            hint=f"unset HF_HUB_OFFLINE; or on a connected machine `hf download {plan.repo_id}`, and copy the cache",
            details=lacks,
        )


def _list_files(api: HfApi, repo_id: str, sha: str, cache_dir: Path | None) -> tuple[dict[str, int], bool]:
    """Bytes by path of a commit, from the cached listing, else the hub, else what the cache holds of it.

    The second says whether that is the whole commit.
    """
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is the HTTP library's
        CachedRepoTreeNotFoundError,
        HfHubHTTPError,
        HTTPError,
        OfflineModeIsEnabled,
    )
    from huggingface_hub.hf_api import RepoFile

    try:
        tree = get_cached_repo_tree(repo_id, revision=sha, cache_dir=cache_dir)
        return {file.path: file.size for file in tree}, True
    except CachedRepoTreeNotFoundError:
        pass  # never downloaded by this client; ask the hub
    try:
        entries = api.list_repo_tree(repo_id, recursive=True, revision=sha)
        return {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}, True
    except (HTTPError, OfflineModeIsEnabled) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise  # the hub answered
        # Unreachable. An older client may have cached the commit without its listing; raises if it did not.
        folder = Path(snapshot_download(repo_id, revision=sha, cache_dir=cache_dir, local_files_only=True))
        _require_shards(repo_id, folder)
        files = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}, False


def _require_shards(repo_id: str, folder: Path) -> None:
    """Raise StorageError when the index names a shard that `folder` lacks."""
    index = folder / INDEX_FILE
    if not index.is_file():
        return
    shards = set(read_json(index, INDEX).get("weight_map", {}).values())
    missing = sorted(shard for shard in shards if not (folder / shard).is_file())
    if missing:
        raise StorageError(
            f"the hub cannot be reached and the cache lacks {len(missing)} of {len(shards)} shards of `{repo_id}`",
            hint="run again with a network connection",
            details=missing,
        )


def _bar_class(progress: Progress | None, total: int) -> type[tqdm]:
    """A silent progress bar for the hub client that hands its bytes to `progress`."""
    from huggingface_hub.utils.tqdm import tqdm

    lock = threading.Lock()
    done = 0

    class BytesBar(tqdm):
        def __init__(self, *args: object, **kwargs: object) -> None:
            self._counts_bytes = kwargs.get("name") == _BYTES_BAR
            kwargs["disable"] = True
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal done
            if progress is not None and self._counts_bytes:
                with lock:
                    done += int(n or 0)
                    progress(done, total)
            return None

    return BytesBar
