"""The classes and functions that checkpoint pickles may name, each mapped to a function of ours.

Every function takes the arguments the pickle passes and raises ValueError when they are not of the
expected form, which the interpreter reports as a malformed pickle.
"""

from __future__ import annotations

from collections.abc import Callable

from converters.tensors import DTYPE_BITS, Shape
from mbx.torchfile.pickle_machine import Factory
from mbx.torchfile.torch_values import (
    DTYPE_NAMES,
    STORAGE_CLASSES,
    Namespace,
    Opaque,
    StorageRef,
    TensorStub,
    TorchDtype,
)

_MAX_DIMS = 64
_MAX_INT = 1 << 63


def torch_constant(module: str, name: str) -> object | None:
    """The stand-in of a torch dtype or storage class, or None."""
    if module == "torch" and name in DTYPE_NAMES:
        return TorchDtype(f"torch.{name}")
    if (module == "torch" and name in STORAGE_CLASSES) or (module in _STORAGE_MODULES and name == "UntypedStorage"):
        return Factory(f"torch.{name}")
    return None


def load_storage(identity: object) -> object:
    """The storage a persistent id names: `("storage", class, key, location, number of elements)`."""
    match identity:
        case ("storage", Factory(name=class_name), str(key), str(), int(count)) if 0 <= count < _MAX_INT:
            return StorageRef(key, _storage_dtype(class_name), count)
    raise ValueError("a persistent id that names no storage")


def _storage_dtype(class_name: str) -> str | None:
    short = class_name.removeprefix("torch.")
    if short == "UntypedStorage":
        return None
    return STORAGE_CLASSES[short]


def _integers(value: object) -> Shape:
    if type(value) is not tuple or len(value) > _MAX_DIMS:
        raise ValueError("expected a tuple of sizes")
    for item in value:
        if type(item) is not int or not 0 <= item < _MAX_INT:
            raise ValueError("expected sizes of 0 and above")
    return value


def _tensor(args: tuple[object, ...], dtype: str | None) -> TensorStub:
    storage, offset, shape, stride = args[:4]
    if type(storage) is not StorageRef or type(offset) is not int or not 0 <= offset < _MAX_INT:
        raise ValueError("a tensor without a storage")
    used = storage.dtype or dtype
    if used is None:
        raise ValueError("a tensor of unknown dtype")
    sizes, steps = _integers(shape), _integers(stride)
    if len(sizes) != len(steps):
        raise ValueError("a tensor with more sizes than strides")
    element_bits = 8 if storage.dtype is None else DTYPE_BITS[storage.dtype]
    return TensorStub(used, sizes, storage.key, offset, steps, storage.num_elements * element_bits // 8)


def _tensor_v3(args: tuple[object, ...]) -> TensorStub:
    dtype = args[6]
    if type(dtype) is not TorchDtype or dtype.stored is None:
        raise ValueError("a tensor of a dtype that is not stored")
    return _tensor(args, dtype.stored)


def _subclass(args: tuple[object, ...]) -> object:
    """A tensor with attributes (Megatron's parameters carry some): `(function, class, arguments, attributes)`."""
    function, _, inner = args[:3]
    if type(function) is not Factory or function.make is None or type(inner) is not tuple:
        raise ValueError("a tensor subclass that is built by something else")
    built = function.make(inner)
    return built if type(built) is Opaque else _same_tensor((built,))


def _same_tensor(args: tuple[object, ...]) -> TensorStub:
    if type(args[0]) is not TensorStub:
        raise ValueError("a parameter without a tensor")
    return args[0]


def _ordered_dict(args: tuple[object, ...]) -> dict[object, object]:
    if args:
        raise ValueError("an OrderedDict made from arguments")
    return {}


def _default_dict(args: tuple[object, ...]) -> dict[object, object]:
    """The default factory is dropped: it matters for missing keys only."""
    if len(args) > 1:
        raise ValueError("a defaultdict made from arguments")
    return {}


def _namespace(args: tuple[object, ...]) -> Namespace:
    if args:
        raise ValueError("a Namespace made from arguments")
    return Namespace()


def _encode(args: tuple[object, ...]) -> bytes:
    """How protocol 2 spells bytes: `_codecs.encode(text, "latin1")`."""
    match args:
        case (str(text), "latin1"):
            return text.encode("latin1")
    raise ValueError("an encoding other than latin1")


def _bytes(args: tuple[object, ...]) -> bytes:
    if args:
        raise ValueError("bytes made from arguments")
    return b""


def _size(args: tuple[object, ...]) -> Shape:
    (sizes,) = args
    return _integers(sizes)


def _text(args: tuple[object, ...]) -> str:
    (text,) = args
    if type(text) is not str:
        raise ValueError("expected a string")
    return text


def _device(args: tuple[object, ...]) -> str:
    match args:
        case (str(kind),):
            return kind
        case (str(kind), int(index)):
            return f"{kind}:{index}"
    raise ValueError("not a device")


def _elements(args: tuple[object, ...]) -> list[object]:
    if not args:
        return []
    (items,) = args
    if type(items) is not list:
        raise ValueError("a set that is not made from a list")
    for item in items:
        if type(item) not in (str, bytes, bool, float, type(None)) and not (
            type(item) is int and -_MAX_INT < item < _MAX_INT
        ):
            raise ValueError("a set of anything but plain values")
    return items


_STORAGE_MODULES = ("torch", "torch.storage")

#: Types that a pickle may refer to, as the factory of a defaultdict; none of them is called.
PLAIN_TYPES = frozenset(
    f"{module}.{name}"
    for module in ("builtins", "__builtin__")
    for name in ("bool", "dict", "float", "int", "list", "str")
)

#: Names as pickles of Python 3 spell them; protocol 2 uses Python 2's module names.
PLAIN_GLOBALS: dict[str, Callable[[tuple[object, ...]], object]] = {
    "torch._utils._rebuild_tensor": lambda args: _tensor(args, None),
    "torch._utils._rebuild_tensor_v2": lambda args: _tensor(args, None),
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _same_tensor,
    "torch._utils._rebuild_parameter_with_state": _same_tensor,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "torch.Tensor": _same_tensor,
    "torch.nn.parameter.Parameter": _same_tensor,
    "torch.Size": _size,
    "torch.device": _device,
    "torch.serialization._get_layout": _text,
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": _default_dict,
    "argparse.Namespace": _namespace,
    "types.SimpleNamespace": _namespace,
    "_codecs.encode": _encode,
    "__builtin__.bytes": _bytes,
    "builtins.set": lambda args: set(_elements(args)),
    "__builtin__.set": lambda args: set(_elements(args)),
    "builtins.frozenset": lambda args: frozenset(_elements(args)),
    "__builtin__.frozenset": lambda args: frozenset(_elements(args)),
}
