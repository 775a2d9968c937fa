"""What a calibration measured of a model's products: of their inputs, and the scales that were chosen by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float32]
#: Largest magnitudes of E4M3 and E2M1.
_E4M3, _E2M1 = np.float32(448), np.float32(6)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Of each input channel of a product [in], by its module: the largest magnitude, and the mean one.

    Products that share their input are under the first of them. `scales` are of channels, which are to be divided by
    them where they are made and multiplied where they are used, by the tensor that makes them; they were chosen for
    `codec`. `measured` says on what.
    """

    maxima: Mapping[str, Vector]
    means: Mapping[str, Vector]
    scales: Mapping[str, Vector] = field(default_factory=dict)
    codec: str | None = None
    measured: Mapping[str, object] = field(default_factory=dict)


def fp8_input_scale(largest: float) -> Vector:
    """[1]: what FP8 codes of inputs up to `largest` are multiplied by.

    As compressed-tensors has it (`quantization/utils/helpers.py`, `calculate_qparams`), in fp32.
    """
    scale = np.float32(largest) / _E4M3
    return np.array([scale if scale > 0 else np.finfo(np.float32).eps], np.float32)


def nvfp4_input_scale(largest: float) -> Vector:
    """[1]: what the FP8 scales of blocks of inputs up to `largest` are multiplied by before they are stored.

    As compressed-tensors has it (`quantization/utils/helpers.py`, `generate_gparam`): 1 where nothing was measured.
    """
    with np.errstate(over="ignore"):
        # torch divides a number by a tensor so: the reciprocal is rounded before the product
        scale = np.float32(1) / np.maximum(np.float32(largest), np.finfo(np.float32).tiny) * (_E4M3 * _E2M1)
    return np.array([scale if np.isfinite(scale) else 1], np.float32)
