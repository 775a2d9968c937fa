"""What may go where `overwrite` asks for it: what a tool wrote whole as a checkpoint, an adapter or a run, no more.

A folder that mbx wrote says in its manifest what it holds. Others are known by their files: each has to be one that
some tool writes into folders of the kind, and together they have to be one. A config.json alone is a web project's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from converters.errors import StorageError
from mbx.formats.hf import MANIFEST
from mbx.run import journal, manifest
from mbx.untrusted.names import leads_out

#: Side files of a model, wherever they lie: config, tokenizer, chat template, modeling code, model card.
_SIDE = r"""
    (?:[a-z_]*config|tokenizer|special_tokens_map|added_tokens|vocab|model\.safetensors\.index
       |pytorch_model\.bin\.index|trainer_state|all_results|train_results|eval_results|quantize_config)\.json
    |[a-z_]*(?:tokenizer|spiece|sentencepiece)[a-z_.\d]*\.model(?:\.v\d+)?|tekken\.json|merges\.txt|vocab\.txt
    |chat_template(?:\.\w+)?\.(?:jinja|json)|additional_chat_templates/[\w.-]+\.jinja|mbx_(?:layout\.json|kept\.safetensors|scales\.safetensors)
    |(?:modeling|configuration|tokenization|processing|image_processing|modular)_\w+\.py
    |README\.md|LICENSE(?:\.\w+)?|NOTICE(?:\.\w+)?|USE_POLICY\.md|\.gitattributes
"""
_WEIGHTS = r"(?:model|consolidated)[\w.-]*\.safetensors|pytorch_model[\w.-]*\.bin"
_ADAPTER = r"adapter_config\.json|adapter_model\.(?:safetensors|bin)"
_ITERATION = rf"""
    \.metadata|metadata\.json|common\.pt|__\d+_\d+\.distcp|run_config\.yaml|train_state\.pt
    |mp_rank_\d+(?:_\d+)*/(?:model_optim_rng|distrib_optim|model_rng)\.pt
    |mbx_train\.json|recipe\.json|args\.json
    |(?:hf|tokenizer|peft)/(?:{_SIDE}|{_ADAPTER})
"""
_TOP = r"""
    latest_checkpointed_iteration\.txt|latest_train_state\.pt|latest_wandb_artifact_path\.txt|progress\.txt|args\.json
    |metrics\.jsonl|report\.html|events\.out\.tfevents\.[\w.-]+
"""
#: Names of a whole folder of each kind, relative to it, and a name that each has.
_KINDS = (
    (rf"{_SIDE}|{_WEIGHTS}|{_ADAPTER}", _WEIGHTS),
    (rf"{_SIDE}|{_ADAPTER}", r"adapter_model\.(?:safetensors|bin)"),
    (_ITERATION, r"\.metadata|mp_rank_.*"),
    (rf"{_TOP}|{_SIDE}|(?:iter_\d{{7}}|release)/(?:{_ITERATION})", r"latest_checkpointed_iteration\.txt"),
)
_COMPILED = [(re.compile(all_names, re.X), re.compile(one, re.X)) for all_names, one in _KINDS]


#: Folders of weights within a target.
_BASE = re.compile(r"iter_\d{7}|release")


def foreign(folder: Path) -> list[str]:
    """Files and empty folders, relative and sorted, that keep `folder` from being replaced; empty where none do."""
    files, empty, odd = _names(folder)
    try:
        listed = manifest.read(folder)
    except StorageError:  # nothing that says what the folder holds
        return sorted(empty + odd + min((_strangers(files, *kind) for kind in _COMPILED), key=len))
    own = {*listed.files, *listed.containers, MANIFEST}
    return sorted(empty + odd + [name for name in files if name not in own])


def foreign_in_work(partial: Path) -> list[str]:
    """The same for a folder of work: what the run that it belongs to did not mean to make."""
    files, empty, odd = _names(partial)
    planned = journal.planned(partial)
    if planned is None:  # killed before it said what it makes, or that is damaged
        empty = [name for name in empty if not _BASE.fullmatch(name) and name != journal.FOLDER]
        known = [every for every, _ in _COMPILED] if (partial / journal.FOLDER).is_dir() else []
        return sorted(empty + odd + [name for name in files if not any(every.fullmatch(name) for every in known)])
    own = {*planned, MANIFEST}
    folders = {parent.as_posix() for name in own for parent in PurePosixPath(name).parents}
    return sorted([name for name in empty if name not in folders] + odd + [name for name in files if name not in own])


def _strangers(names: list[str], every: re.Pattern[str], one: re.Pattern[str]) -> list[str]:
    """Names that are none of a kind; all of them where the one is missing that the kind cannot be without."""
    if not any(one.fullmatch(name) for name in names):
        return names
    return [name for name in names if not every.fullmatch(name)]


def _names(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """Regular files below `folder`, empty folders, and what no tool writes: links that lead out of it, pipes.

    The files of mbx's own journal count as nothing.
    """
    files, empty, odd = list[str](), list[str](), list[str]()
    for path in _ends(folder):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            empty.append(name)
        elif not path.is_file() or leads_out(path):
            odd.append(name)
        elif path.is_symlink() or not journal.OWN.fullmatch(name):
            files.append(name)
    return sorted(files), empty, odd


def _ends(folder: Path) -> Iterator[Path]:
    """Everything below `folder` but folders that hold something; links are not followed."""
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir()):
            yield path
