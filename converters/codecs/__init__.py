"""How Hugging Face checkpoints store quantised tensors: decoded before table rows see them, encoded after.

The modules here know names, shapes and dtypes and import no torch; `arithmetic` knows values.
"""

from converters.codecs.base import Codec, assemble
from converters.codecs.fp8 import Fp8Block, Fp8Scaled
from converters.codecs.int4 import Int4Packed
from converters.codecs.int8 import Int8
from converters.codecs.mx import Mxfp4Packed, Mxfp8
from converters.codecs.mxfp4 import Mxfp4
from converters.codecs.nvfp4 import Nvfp4
from converters.codecs.registry import CODECS, codecs_for, quantization_of
from converters.codecs.words4 import Words4

__all__ = [
    "CODECS",
    "Codec",
    "Fp8Block",
    "Fp8Scaled",
    "Int4Packed",
    "Int8",
    "Mxfp4",
    "Mxfp4Packed",
    "Mxfp8",
    "Nvfp4",
    "Words4",
    "assemble",
    "codecs_for",
    "quantization_of",
]
