"""mbx in Python: open any checkpoint, plan and carry out conversions, and prove them. `import mbx` offers all of it.

A source is a folder or a hub model, `org/name[@revision]`, which is downloaded first. Nothing here prints. `progress`
is called with the bytes that were done since the last call, from several threads; `cancel`, once set, ends the call
with `Cancelled`, and what a conversion has written by then is removed or kept for `resume` as on any failure. Every
expected failure is an `MbxError`, whose fact, hint and details are data.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from converters.codecs.calibration import Calibration
from converters.errors import Cancelled, UsageError
from converters.pruning.choosing import Importance, Pruning
from mbx.formats.adapter_folder import open_base, stated_base
from mbx.formats.checkpoint import Checkpoint
from mbx.formats.hub import resolve
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

Source = str | os.PathLike[str]
Progress = Callable[[int], None]


def _silent(nbytes: int) -> None:
    """No progress."""


def open(source: Source, *, weights: bool = True) -> Checkpoint:
    """Open a checkpoint of any format; headers are read and no tensor.

    `weights=False` downloads of a hub model only what lies beside its weights. Raises StorageError for what is no
    checkpoint, or not a whole one, UnsupportedError for one that is not read.
    """
    return open_checkpoint(_folder(source, weights=weights))


def inspect(source: Source, *, hf_config: Source | None = None) -> Summary:
    """What a checkpoint is and holds, whole or damaged; StorageError for a path that is no checkpoint at all.

    `hf_config` is a folder with config.json for a Megatron checkpoint that carries none.
    """
    return summarize(_folder(source), _config_folder(hf_config))


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
    options, path, into = options or Options(), _folder(source), Path(target)
    found = sniff(path)
    if found.format.spelling == "peft":
        return plan_adapter_to_mcore(path, into, options, _base(path, base, options))
    if found.format.spelling == "hf":
        return plan_hf_to_mcore(path, into, options)
    if base is not None:
        return plan_adapter_to_hf(path, into, options, _base(path, base, options))
    reference = None if hf_config is None else _folder(hf_config, weights=False)
    return plan_mcore_to_hf(path, into, options, reference)


def convert(
    source: Source,
    target: Source,
    options: Options | None = None,
    *,
    hf_config: Source | None = None,
    base: Source | None = None,
    progress: Progress = _silent,
    cancel: Event | None = None,
) -> Outcome:
    """`plan`, carried out: the target appears whole, under its name, or not at all."""
    job = plan(source, target, options, hf_config=hf_config, base=base)
    return job.run(_watched(progress, cancel))


def reshard(
    source: Source,
    target: Source,
    options: Options | None = None,
    *,
    vocab_divisor: int | None = None,
    with_optimizer: bool = False,
    progress: Progress = _silent,
    cancel: Event | None = None,
) -> Outcome:
    """Write a Megatron checkpoint under another layout or format (`options.layout`, `options.format`).

    Values stay as they are. `vocab_divisor` is make-vocab-size-divisible-by, the source's own by default;
    `with_optimizer` takes the optimizer's state along, from torch_dist to torch_dist.
    """
    path, into = _folder(source), Path(target)
    job = plan_mcore_to_mcore(
        path, into, options or Options(), vocab_divisor=vocab_divisor, with_optimizer=with_optimizer
    )
    return job.run(_watched(progress, cancel))


def merge(
    base: Source,
    adapter: Source,
    target: Source,
    options: Options | None = None,
    *,
    to: str | None = None,
    progress: Progress = _silent,
    cancel: Event | None = None,
) -> Outcome:
    """Write `base` with an adapter merged in fp32, rounded once; `to` is "hf" or "mcore", by default as the base."""
    job = plan_merge(_folder(base), Path(adapter), Path(target), options or Options(), to=to)
    return job.run(_watched(progress, cancel))


def prune(
    source: Source,
    target: Source,
    pruning: Pruning,
    options: Options | None = None,
    *,
    by: Source | None = None,
    to: str | None = None,
    hf_config: Source | None = None,
    progress: Progress = _silent,
    cancel: Event | None = None,
) -> Outcome:
    """Write what `pruning` leaves of a model; what stays is taken over as it is.

    `by` is a file of `mbx importance`, which tells the parts that stay where `pruning` says how many. `to` is "hf" or
    "mcore", by default as the source. Raises UnsupportedError, before anything is written, for what a model of its
    architecture cannot be without.
    """
    job = plan_prune(
        _folder(source),
        Path(target),
        pruning,
        options or Options(),
        importance=None if by is None else read_importance(Path(by)),
        to=to,
        hf_config=_config_folder(hf_config),
    )
    return job.run(_watched(progress, cancel))


def importance(
    source: Source,
    data: str,
    target: Source | None = None,
    *,
    samples: int = 64,
    length: int = 512,
    device: str = "cpu",
    dtype: str = "float32",
    mapping: str | None = None,
    progress: Progress = _silent,
    cancel: Event | None = None,
) -> Importance:
    """Measure how much each part of a Hugging Face model matters, on `samples` rows of `length` tokens of a data file.

    `data` is whatever a recipe's `data.path` takes; `target` is the file to write, which `prune` takes as `by`. One
    decoder layer is in memory at a time; `progress` is called with the layers that are done since the last call.
    """
    from mbx.train.importance import importance_of

    return importance_of(
        _folder(source),
        data,
        None if target is None else Path(target),
        samples=samples,
        length=length,
        device=device,
        dtype=dtype,
        mapping=mapping,
        progress=_watched(progress, cancel),
    )


def calibrate(
    source: Source,
    data: str,
    target: Source | None = None,
    *,
    codec: str | None = None,
    samples: int = 64,
    length: int = 512,
    device: str = "cpu",
    dtype: str = "float32",
    mapping: str | None = None,
    hf_config: Source | None = None,
    progress: Progress = _silent,
    cancel: Event | None = None,
) -> Calibration:
    """Measure what flows into the products of a model of either kind, on `samples` rows of `length` tokens of a file.

    `Options(calibration=…)` of an export takes the result; `target` is the file to write. For `codec`, `int4_group` or
    `nvfp4`, scales of channels are chosen too. One decoder layer is in memory at a time; `progress` is called with the
    layers that are done since the last call.
    """
    from mbx.train.calibration import calibrate as measured

    return measured(
        _folder(source),
        data,
        None if target is None else Path(target),
        codec=codec,
        samples=samples,
        length=length,
        device=device,
        dtype=dtype,
        mapping=mapping,
        hf_config=_config_folder(hf_config),
        progress=_watched(progress, cancel),
    )


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
    progress: Progress = _silent,
    cancel: Event | None = None,
) -> ParityReport:
    """Whether two checkpoints of any format and layout are the same model, in legs that are reported apart.

    `forward` and `loss` run both in Transformers and Megatron Core, on the CPU. `dtype` declares a cast that a
    conversion was asked for. `hf_config` is a folder with config.json for a Megatron checkpoint that carries none.
    `allowed_keys` are unknown keys of config.json that are waived. Differences are findings of the report, not errors;
    `proved` says that there are none, and that nothing was left out but what a glob of `allow_gaps` names.
    """
    return parity(
        _folder(first),
        _folder(second),
        forward=forward,
        loss=loss,
        dtype=dtype,
        mapping=mapping,
        reading=Reading(progress=_watched(progress, cancel)),
        hf_config=_config_folder(hf_config),
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
    progress: Progress = _silent,
    cancel: Event | None = None,
) -> Diff:
    """What changed between two checkpoints of any format, tensor by tensor.

    `hf_config` is a folder with config.json for a Megatron checkpoint that carries none, `allowed_keys` are unknown
    keys of config.json that are waived.
    """
    reading = Reading(progress=_watched(progress, cancel))
    beside = _config_folder(hf_config)
    return diff_checkpoints(
        _folder(left),
        _folder(right),
        mapping=mapping,
        reading=reading,
        hf_config=beside,
        allowed_keys=allowed_keys,
    )


def integrity(folder: Source, *, progress: Progress = _silent, cancel: Event | None = None) -> IntegrityReport:
    """Whether every byte of a checkpoint is still what mbx wrote; StorageError where it has no manifest."""
    return check_integrity(Path(folder), progress=_watched(progress, cancel))


def _config_folder(source: Source | None) -> Path | None:
    return None if source is None else _folder(source, weights=False)


def _folder(source: Source, *, weights: bool = True) -> Path:
    """The folder of a source, downloaded where it is a hub model."""
    return resolve(os.fspath(source), weights=weights).path


def _base(adapter: Path, base: Source | None, options: Options) -> Base:
    """The model of an adapter: the one that is named, or else that the adapter names."""
    name = stated_base(adapter) if base is None else base
    if name is None:
        raise UsageError(f"`{adapter}` does not name its base model", hint="give ‹base›")
    opened = open_base(_folder(name, weights=False), options.mapping, options.allow_unused_keys)
    return replace(opened, path=Path(name))


def _watched(progress: Progress, cancel: Event | None) -> Progress:
    """`progress`, which also ends the work once `cancel` is set."""
    if cancel is None:
        return progress

    def advance(nbytes: int) -> None:
        if cancel.is_set():
            raise Cancelled("cancelled")
        progress(nbytes)

    return advance
