"""calibration.safetensors: what flows into a model's products, as `mbx calibrate` measured it.

Of each module it holds fp32 vectors `NAME.max` and `NAME.mean`, one value an input channel; of tensors that make
channels `NAME.scale`, where scales were chosen for a `codec`. Its header says of that and of what was `measured`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from converters.codecs.calibration import Calibration, Vector
from converters.errors import StorageError
from converters.tensors import StoredTensor
from mbx.formats.files import FileSource
from mbx.formats.safetensors import build_header, load_json, read_header
from mbx.untrusted.small_files import open_regular

_KINDS = {"maxima": ".max", "means": ".mean", "scales": ".scale"}
_SAID = "mbx_calibration"


def is_calibration(path: Path) -> bool:
    """Whether a file may be one, rather than data to measure on: a safetensors header of its size is in front."""
    try:
        with open(open_regular(path), "rb") as file:
            return int.from_bytes(file.read(8), "little") + 8 <= os.fstat(file.fileno()).st_size
    except OSError:
        return False  # data may be named otherwise than by a file


def read_calibration(path: Path) -> Calibration:
    """What `calibration_bytes` made; StorageError for anything else."""
    header = read_header(path)
    said = load_json(header.metadata[_SAID].encode(), f"`{path}`") if _SAID in header.metadata else None
    source = FileSource(path.parent)
    found: dict[str, dict[str, Vector]] = {kind: {} for kind in _KINDS}
    try:
        for name, (dtype, shape, start, _) in header.tensors.items():
            kind = next((kind for kind, end in _KINDS.items() if name.endswith(end)), None)
            if kind is None or dtype != "F32" or len(shape) != 1 or not shape[0] or said is None:
                raise StorageError(
                    f"`{path}` is no calibration: it holds `{name}`, {dtype} {list(shape)}",
                    hint="`mbx calibrate SRC data.jsonl -o calibration.safetensors` writes one",
                )
            raw = np.empty(4 * shape[0], np.uint8)
            source.read_into(path.name, header.data_start + start, raw.data)
            values = raw.view("<f4")
            if not (np.isfinite(values) & ((values > 0) if kind == "scales" else (values >= 0))).all():
                raise StorageError(
                    f"`{path}`: `{name}` holds values that are no {'scales' if kind == 'scales' else 'magnitudes'}"
                )
            found[kind][name.removesuffix(_KINDS[kind])] = values
    finally:
        source.close()
    codec, measured = (said or {}).get("codec"), (said or {}).get("measured")
    return Calibration(
        **found,
        codec=codec if isinstance(codec, str) else None,
        measured=measured if isinstance(measured, dict) else {},
    )


def calibration_bytes(calibration: Calibration) -> bytes:
    """The file's content."""
    held: dict[str, Mapping[str, Vector]] = {kind: getattr(calibration, kind) for kind in _KINDS}
    vectors = {name + _KINDS[kind]: values for kind, all_of in held.items() for name, values in all_of.items()}
    stored = [StoredTensor(name, "F32", values.shape, ()) for name, values in vectors.items()]
    said = json.dumps({"codec": calibration.codec, "measured": dict(calibration.measured)})
    header = build_header(stored, {_SAID: said})
    return header + b"".join(np.ascontiguousarray(values, "<f4").tobytes() for values in vectors.values())
