"""A finished Hugging Face folder onto the hub, with a model card that says how it came to be and what was proven."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from converters.errors import StorageError, UsageError
from mbx.formats.files import MANIFEST, MANIFEST_BYTES
from mbx.formats.hub_errors import hub_errors
from mbx.text import in_markdown
from mbx.untrusted.small_files import SETTINGS, read_json, read_text
from mbx.version import __version__

CARD = "README.md"
#: How files end that readers take weights from.
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")


@dataclass(frozen=True, slots=True)
class Proof:
    """One thing that was checked before the upload, and its outcome in words."""

    what: str
    outcome: str


def check_name(repo_id: str) -> None:
    """UsageError unless a repository's name is `org/name` as the hub takes it, before anything is converted."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # listed nowhere

    try:
        validate_repo_id(repo_id)
        said = None if "/" in repo_id else "it has no organisation or user before a slash"
    except HFValidationError as error:
        said = str(error)
    if said is not None:
        details = [said]
        raise UsageError(f"‹push› {repo_id!r} is no repository", hint="name it as `org/name`", details=details)


def push(folder: Path, repo_id: str, *, private: bool = True, proofs: Sequence[Proof] = ()) -> str:
    """Upload a folder that mbx made to the hub repository `repo_id`, made where it is missing; returns its address.

    What goes are the files that mbx wrote: whatever else lies in the folder stays (`left_out`). Files that the
    repository has already are not sent again, so that an interrupted upload goes on. Raises
    StorageError for a folder that mbx did not finish, and where the hub does not take it; UsageError for a repository
    that anybody may read where `private` is asked for, and for one with weights of another cutting.
    """
    check_name(repo_id)
    manifest = _manifest(folder)
    text = card(manifest, _own_card(folder), proofs)
    with hub_errors(repo_id, None, what="upload"):
        from huggingface_hub import HfApi

        api = HfApi(library_name="mbx")
        made = api.create_repo(repo_id, private=private, exist_ok=True)
        found = api.model_info(repo_id)
        _check_repository(repo_id, folder, found.private, [s.rfilename for s in found.siblings or ()], private)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[glob.escape(name) for name in sorted(_written(manifest) - {CARD})],
            commit_message=f"Upload with mbx {__version__}",
        )
        api.upload_file(
            repo_id=repo_id, path_or_fileobj=text.encode(), path_in_repo=CARD, commit_message="Model card of mbx"
        )
    return str(made)


def left_out(folder: Path) -> list[str]:
    """Files of a finished folder that mbx did not write, and that are not uploaded."""
    own = _written(_manifest(folder))
    return sorted(
        name
        for path in folder.rglob("*")
        if path.is_file() and (name := path.relative_to(folder).as_posix()) not in own and name != CARD
    )


def _written(manifest: Mapping[str, object]) -> set[str]:
    """Names of the files that a manifest speaks of, and its own."""
    listed = (manifest.get(key) for key in ("files", "containers"))
    return {MANIFEST, *(str(name) for names in listed if isinstance(names, Mapping) for name in names)}


def _check_repository(
    repo_id: str, folder: Path, is_private: bool | None, files: Sequence[str], private: bool
) -> None:
    """UsageError where a repository that stood there already would show, or mix up, what is uploaded."""
    if private and is_private is False:
        raise UsageError(
            f"`{repo_id}` exists, and anybody may read it: nothing was uploaded",
            hint="to publish there, say ‹public›; else make it private in its settings, or name another repository",
        )
    others = sorted(name for name in files if "/" not in name and name.endswith(_WEIGHTS))
    if stale := [name for name in others if not (folder / name).exists()]:
        raise UsageError(
            f"`{repo_id}` holds {len(stale)} files of weights that `{folder}` has not, first `{stale[0]}`: "
            "readers would mix them",
            hint="name another repository, or delete them there first",
            details=stale,
        )


def _manifest(folder: Path) -> Mapping[str, object]:
    try:
        loaded: dict[str, object] = read_json(folder / MANIFEST, MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise StorageError(
            f"`{folder}` has no `{MANIFEST}`: only folders that mbx finished are pushed",
            hint=f"`hf upload ORG/NAME {folder}` takes any folder",
        ) from None
    if loaded.get("direction") not in ("mcore-to-hf", "merge", "prune", "adapter-to-hf") or not _is_hf(folder):
        raise StorageError(
            f"`{folder}` is no Hugging Face folder", hint=f"convert it first: mbx convert mcore-to-hf {folder} DIR"
        )
    return loaded


def _is_hf(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def _own_card(folder: Path) -> str:
    return read_text(folder / CARD, SETTINGS) if (folder / CARD).is_file() else ""


def card(manifest: Mapping[str, object], own: str, proofs: Sequence[Proof]) -> str:
    """The model card: the folder's own, and a section of what the manifest says, what was proven and how."""
    tensors, source = manifest.get("tensors"), manifest.get("source")
    dtypes: dict[str, int] = {}
    for entry in tensors.values() if isinstance(tensors, Mapping) else ():
        dtype = str(entry.get("dtype")) if isinstance(entry, Mapping) else "?"
        dtypes[dtype] = dtypes.get(dtype, 0) + 1
    origin = {key: value for key, value in source.items() if value} if isinstance(source, Mapping) else {}
    counts = ", ".join(f"{count} {dtype}" for dtype, count in sorted(dtypes.items()))
    facts = [
        f"- made by mbx {in_markdown(str(manifest.get('mbx')))}, {_code(str(manifest.get('direction')))}",
        *(f"- {in_markdown(key)}: {_code(_shown(key, str(value)))}" for key, value in origin.items()),
        f"- {sum(dtypes.values())} tensors: {in_markdown(counts)}",
        f"- table: {_table(manifest)}",
        *(f"- waived, {in_markdown(what)}: {', '.join(map(_code, names))}" for what, names in _waived(manifest)),
    ]
    proven = [f"- {in_markdown(proof.what)}: {in_markdown(proof.outcome)}" for proof in proofs] or [
        "- nothing beyond the conversion's own ledger, in which every tensor and every key of config.json counts once"
    ]
    checksums = f"`mbx verify integrity DIR` compares every byte with the checksums in `{MANIFEST}`."
    section = ["## How this folder was made", "", *facts, "", "### What was proven", "", *proven, "", checksums, ""]
    head = own.rstrip() + "\n\n" if own.strip() else "---\nlibrary_name: transformers\n---\n\n"
    return head + "\n".join(section)


def _code(text: str) -> str:
    """Text as a code span, which a name of a stranger's cannot end."""
    return f"`{in_markdown(text).replace('`', chr(39))}`"


def _shown(key: str, value: str) -> str:
    """Of a path its last part: where things lie on a machine is nobody's business."""
    return Path(value).name if key in ("path", "adapter") else value


def _table(manifest: Mapping[str, object]) -> str:
    table = manifest.get("table")
    if not isinstance(table, Mapping):
        return "none"
    return f"{_code(str(table.get('name')))}, SHA-256 {_code(str(table.get('sha256')))}"


def _waived(manifest: Mapping[str, object]) -> list[tuple[str, list[str]]]:
    waived = manifest.get("waived")
    if not isinstance(waived, Mapping):
        return []
    return [(str(what), list(map(str, names))) for what, names in waived.items() if isinstance(names, list) and names]
