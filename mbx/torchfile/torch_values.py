"""Inert stand-ins for the torch and Python objects that checkpoint pickles name.

Nothing here imports torch. A pickle that names `torch.bfloat16` or `argparse.Namespace` gets one of
these values; no object, function or module of that name is ever touched.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from converters.tensors import DTYPE_BITS, Shape

#: torch dtype name -> safetensors dtype name.
TORCH_DTYPES: dict[str, str] = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "int64": "I64",
    "uint64": "U64",
    "float64": "F64",
    "complex64": "C64",
}
TORCH_NAMES: dict[str, str] = {stored: name for name, stored in TORCH_DTYPES.items()}

#: torch dtypes that checkpoints may name but mbx does not store.
_FOREIGN_DTYPES = frozenset(
    {
        *("complex32", "complex128", "qint8", "qint32", "quint8", "quint4x2", "quint2x4"),
        *("bits8", "bits16", "bits1x8", "bits2x4", "bits4x2"),
        *("float8_e4m3fnuz", "float8_e5m2fnuz", "float4_e2m1fn_x2"),
    }
)
DTYPE_NAMES = frozenset(TORCH_DTYPES) | _FOREIGN_DTYPES

#: Typed storage class -> safetensors dtype name (torch.storage._dtype_to_storage_type_map). A dtype
#: without a class of its own is saved as UntypedStorage, with the dtype beside it.
STORAGE_CLASSES: dict[str, str] = {
    "BoolStorage": "BOOL",
    "ByteStorage": "U8",
    "CharStorage": "I8",
    "ShortStorage": "I16",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "IntStorage": "I32",
    "FloatStorage": "F32",
    "LongStorage": "I64",
    "DoubleStorage": "F64",
    "ComplexFloatStorage": "C64",
}
STORAGE_CLASS_OF: dict[str, str] = {stored: name for name, stored in STORAGE_CLASSES.items()}


class TorchDtype(str):
    """A torch dtype, spelt as torch prints it: `torch.bfloat16`."""

    __slots__ = ()

    @property
    def stored(self) -> str | None:
        """The safetensors name, or None for a dtype that mbx does not store."""
        return TORCH_DTYPES.get(self.removeprefix("torch."))


@dataclass(frozen=True, slots=True)
class StorageRef:
    """One storage of a torch.save archive: `data/<key>`, `num_elements` of `dtype` (None: untyped bytes)."""

    key: str
    dtype: str | None
    num_elements: int


@dataclass(frozen=True, slots=True)
class TensorStub:
    """A tensor without its data: a view on a storage; offset and strides are in elements."""

    dtype: str
    shape: Shape
    storage: str
    storage_offset: int
    stride: Shape
    storage_nbytes: int

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return DTYPE_BITS[self.dtype] // 8

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie row-major and without gaps."""
        if 0 in self.shape:
            return True
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return True

    @property
    def end_nbytes(self) -> int:
        """Bytes of the storage up to the last element that the view reaches."""
        if 0 in self.shape:
            return 0
        last = self.storage_offset + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.itemsize


@dataclass(slots=True, eq=False)
class Namespace:
    """Stands for an `argparse.Namespace`: its attributes, by name."""

    values: dict[str, object] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Opaque:
    """Stands for an object of a class that is not built: what the pickle would have passed to it."""

    class_name: str
    args: tuple[object, ...] = ()
    state: object = None
    items: list[object] = field(default_factory=list)


def row_major(shape: Shape) -> Shape:
    """Strides, in elements, that torch gives a dense tensor of `shape`."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
