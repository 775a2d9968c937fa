"""mbx in Python: open any checkpoint, plan and carry out conversions, and prove them. `import mbx` offers all of it.

A source is a folder or a hub model, `org/name[@revision]`, which is downloaded first. Nothing here prints. `progress`
is called with the bytes that were done since the last call, from several threads; `cancel`, once set, ends the call
with `Cancelled`, and what a conversion has written by then is removed or kept for `resume` as on any failure. Every
expected failure is an `MbxError`, whose fact, hint and details are data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from converters.errors import UsageError
from converters.pruning.choosing import Pruning
from mbx.api.sources import Progress, Source, config_folder, folder_of, silent, watched
from mbx.formats.adapter_folder import open_base, stated_base
from mbx.formats.checkpoint import Checkpoint
from mbx.formats.registry import open_checkpoint, sniff
from mbx.formats.summary import Summary, summarize
from mbx.proof.compare import Reading
from mbx.proof.diff import Diff
from mbx.proof.diff import diff as diff_checkpoints
from mbx.proof.integrity import Report as IntegrityReport
from mbx.proof.integrity import check as check_integrity
from mbx.proof.parity import ParityReport, parity
from mbx.run.adapters import plan_adapter_to_hf, plan_adapter_to_mcore
from mbx.run.execution import Outcome
from mbx.run.importance_file import read_importance
from mbx.run.job import Job, Options, plan_hf_to_mcore, plan_mcore_to_hf
from mbx.run.merge import plan_merge
from mbx.run.prune import plan_prune
from mbx.run.reshard import plan_mcore_to_mcore

if TYPE_CHECKING:
    from mbx.formats.adapter_folder import Base


def open(source: Source, *, weights: bool = True) -> Checkpoint:
    """Open a checkpoint of any format; headers are read and no tensor.

    `weights=False` downloads of a hub model only what lies beside its weights. Raises StorageError for what is no
    checkpoint, or not a whole one, UnsupportedError for one that is not read.
    """
    return open_checkpoint(folder_of(source, weights=weights))


def inspect(source: Source, *, hf_config: Source | None = None) -> Summary:
    """What a checkpoint is and holds, whole or damaged; StorageError for a path that is no checkpoint at all.

    `hf_config` is a folder with config.json for a Megatron checkpoint that carries none.
    """
    return summarize(folder_of(source), config_folder(hf_config))


def plan(
    source: Source,
    target: Source,
    options: Options | None = None,
    *,
    hf_config: Source | None = None,
    base: Source | None = None,
) -> Job:
    """Plan a conversion to the other side; headers are read, nothing is written. The job's `run` carries it out.

    Hugging Face → Megatron Core or back, by what the source is; an adapter's factors likewise, and then `base` names
    its model, where the adapter does not. `hf_config` is a folder with config.json and tokenizer for a Megatron
    checkpoint that carries none. Raises UnsupportedError without a table, CoverageError for tensors or config keys
    left over, LayoutError for a layout that does not fit.
    """
    options, path, into = options or Options(), folder_of(source), Path(target)
    found = sniff(path)
    if found.format.spelling == "peft":
        return plan_adapter_to_mcore(path, into, options, _base(path, base, options))
    if found.format.spelling == "hf":
        return plan_hf_to_mcore(path, into, options)
    if base is not None:
        return plan_adapter_to_hf(path, into, options, _base(path, base, options))
    reference = None if hf_config is None else folder_of(hf_config, weights=False)
    return plan_mcore_to_hf(path, into, options, reference)


def convert(
    source: Source,
    target: Source,
    options: Options | None = None,
    *,
    hf_config: Source | None = None,
    base: Source | None = None,
    progress: Progress = silent,
    cancel: Event | None = None,
) -> Outcome:
    """`plan`, carried out: the target appears whole, under its name, or not at all."""
    job = plan(source, target, options, hf_config=hf_config, base=base)
    return job.run(watched(progress, cancel))


def reshard(
    source: Source,
    target: Source,
    options: Options | None = None,
    *,
    vocab_divisor: int | None = None,
    with_optimizer: bool = False,
    progress: Progress = silent,
    cancel: Event | None = None,
) -> Outcome:
    """Write a Megatron checkpoint under another layout or format (`options.layout`, `options.format`).

    Values stay as they are. `vocab_divisor` is make-vocab-size-divisible-by, the source's own by default;
    `with_optimizer` takes the optimizer's state along, from torch_dist to torch_dist.
    """
    path, into = folder_of(source), Path(target)
    job = plan_mcore_to_mcore(
        path, into, options or Options(), vocab_divisor=vocab_divisor, with_optimizer=with_optimizer
    )
    return job.run(watched(progress, cancel))


def merge(
    base: Source,
    adapter: Source,
    target: Source,
    options: Options | None = None,
    *,
    to: str | None = None,
    progress: Progress = silent,
    cancel: Event | None = None,
) -> Outcome:
    """Write `base` with an adapter merged in fp32, rounded once; `to` is "hf" or "mcore", by default as the base."""
    job = plan_merge(folder_of(base), Path(adapter), Path(target), options or Options(), to=to)
    return job.run(watched(progress, cancel))


def prune(
    source: Source,
    target: Source,
    pruning: Pruning,
    options: Options | None = None,
    *,
    by: Source | None = None,
    to: str | None = None,
    hf_config: Source | None = None,
    progress: Progress = silent,
    cancel: Event | None = None,
) -> Outcome:
    """Write what `pruning` leaves of a model; what stays is taken over as it is.

    `by` is a file of `mbx importance`, which tells the parts that stay where `pruning` says how many. `to` is "hf" or
    "mcore", by default as the source. Raises UnsupportedError, before anything is written, for what a model of its
    architecture cannot be without.
    """
    job = plan_prune(
        folder_of(source),
        Path(target),
        pruning,
        options or Options(),
        importance=None if by is None else read_importance(Path(by)),
        to=to,
        hf_config=config_folder(hf_config),
    )
    return job.run(watched(progress, cancel))


def verify(
    first: Source,
    second: Source,
    *,
    forward: bool = False,
    loss: bool = False,
    dtype: str | None = None,
    mapping: str | None = None,
    hf_config: Source | None = None,
    allow_gaps: Sequence[str] = (),
    allowed_keys: tuple[str, ...] = (),
    progress: Progress = silent,
    cancel: Event | None = None,
) -> ParityReport:
    """Whether two checkpoints of any format and layout are the same model, in legs that are reported apart.

    `forward` and `loss` run both in Transformers and Megatron Core, on the CPU. `dtype` declares a cast that a
    conversion was asked for. `hf_config` is a folder with config.json for a Megatron checkpoint that carries none.
    `allowed_keys` are unknown keys of config.json that are waived. Differences are findings of the report, not errors;
    `proved` says that there are none, and that nothing was left out but what a glob of `allow_gaps` names.
    """
    return parity(
        folder_of(first),
        folder_of(second),
        forward=forward,
        loss=loss,
        dtype=dtype,
        mapping=mapping,
        reading=Reading(progress=watched(progress, cancel)),
        hf_config=config_folder(hf_config),
        allow_gaps=allow_gaps,
        allowed_keys=allowed_keys,
    )


def diff(
    left: Source,
    right: Source,
    *,
    mapping: str | None = None,
    hf_config: Source | None = None,
    allowed_keys: tuple[str, ...] = (),
    progress: Progress = silent,
    cancel: Event | None = None,
) -> Diff:
    """What changed between two checkpoints of any format, tensor by tensor.

    `hf_config` is a folder with config.json for a Megatron checkpoint that carries none, `allowed_keys` are unknown
    keys of config.json that are waived.
    """
    reading = Reading(progress=watched(progress, cancel))
    beside = config_folder(hf_config)
    return diff_checkpoints(
        folder_of(left),
        folder_of(right),
        mapping=mapping,
        reading=reading,
        hf_config=beside,
        allowed_keys=allowed_keys,
    )


def integrity(folder: Source, *, progress: Progress = silent, cancel: Event | None = None) -> IntegrityReport:
    """Whether every byte of a checkpoint is still what mbx wrote; StorageError where it has no manifest."""
    return check_integrity(Path(folder), progress=watched(progress, cancel))


def _base(adapter: Path, base: Source | None, options: Options) -> Base:
    """The model of an adapter: the one that is named, or else that the adapter names."""
    name = stated_base(adapter) if base is None else base
    if name is None:
        raise UsageError(f"`{adapter}` does not name its base model", hint="give ‹base›")
    opened = open_base(folder_of(name, weights=False), options.mapping, options.allow_unused_keys)
    return replace(opened, path=Path(name))
