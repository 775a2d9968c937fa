"""Measures of a model from Python."""

from __future__ import annotations

from pathlib import Path
from threading import Event

from converters.codecs.calibration import Calibration
from converters.pruning.choosing import Importance
from mbx.api.sources import Progress, Source, config_folder, folder_of, silent, watched


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
    progress: Progress = silent,
    cancel: Event | None = None,
) -> Importance:
    """Measure how much each part of a Hugging Face model matters, on `samples` rows of `length` tokens of a data file.

    `data` is whatever a recipe's `data.path` takes; `target` is the file to write, which `prune` takes as `by`. One
    decoder layer is in memory at a time; `progress` is called with the layers that are done since the last call.
    """
    from mbx.train.importance import importance_of

    return importance_of(
        folder_of(source),
        data,
        None if target is None else Path(target),
        samples=samples,
        length=length,
        device=device,
        dtype=dtype,
        mapping=mapping,
        progress=watched(progress, cancel),
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
    progress: Progress = silent,
    cancel: Event | None = None,
) -> Calibration:
    """Measure what flows into the products of a model of either kind, on `samples` rows of `length` tokens of a file.

    `Options(calibration=…)` of an export takes the result; `target` is the file to write. For `codec`, `int4_group`,
    `mxfp4` or `nvfp4`, scales of channels are chosen too. One decoder layer is in memory at a time; `progress` is
    called with the layers that are done since the last call.
    """
    from mbx.train.calibration import calibrate as measured

    return measured(
        folder_of(source),
        data,
        None if target is None else Path(target),
        codec=codec,
        samples=samples,
        length=length,
        device=device,
        dtype=dtype,
        mapping=mapping,
        hf_config=config_folder(hf_config),
        progress=watched(progress, cancel),
    )
