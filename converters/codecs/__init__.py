"""How Hugging Face checkpoints store quantised tensors: decoded before table rows see them, encoded after.

The modules here know names, shapes and dtypes and import no torch; `arithmetic` knows values.
"""

from converters.codecs.base import Codec, assemble
from converters.codecs.fp8 import Fp8Block, Fp8Scaled
from converters.codecs.int4 import Int4Packed
from converters.codecs.mxfp4 import Mxfp4
from converters.codecs.registry import CODECS, codecs_for, quantization_of

__all__ = [
    "CODECS",
    "Codec",
    "Fp8Block",
    "Fp8Scaled",
    "Int4Packed",
    "Mxfp4",
    "assemble",
    "codecs_for",
    "quantization_of",
]
