"""The plain values of `.pt` files without torch: `common.pt`, `train_state.pt`, `model_optim_rng.pt`.

Reading never imports or runs what a pickle names (`pickle_machine`); writing names classes by their module
path only (`pickle_writer`).
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from typing import Literal

from converters.errors import StorageError
from mbx.torchfile.pickle_machine import Factory, FindGlobal, run_pickle
from mbx.torchfile.pickle_plain import PLAIN_GLOBALS, PLAIN_TYPES, load_storage, torch_constant
from mbx.torchfile.pickle_writer import PickleWriter
from mbx.torchfile.torch_values import STORAGE_CLASS_OF, TORCH_NAMES, Namespace, Opaque, TensorStub, TorchDtype

_MAX_DEPTH = 100


#: What becomes of classes that mbx does not know: refused, or Opaque stands in, for all of them or the named ones.
Unknown = Literal["refuse", "opaque"] | Collection[str]


def load_plain(data: bytes, *, unknown: Unknown = "refuse", source: str = "pickle") -> object:
    """The value of a `data.pkl`, with stand-ins for what is not plain Python.

    Tensors become TensorStub, `argparse.Namespace` becomes Namespace, torch dtypes TorchDtype, an
    OrderedDict a dict. A class that is not known raises StorageError, or as `unknown` allows becomes
    Opaque; it is never imported. Raises StorageError for a pickle that is not sound.
    """
    return run_pickle(data, global_finder(unknown=unknown, source=source), load_storage, source=source)


def dump_plain(value: object) -> bytes:
    """A pickle of plain values, which torch's `weights_only` unpickler accepts.

    Takes None, bool, int, float, str, bytes, list, tuple, dict, Namespace (ours or argparse's), TorchDtype
    and TensorStub; raises StorageError for anything else and for nesting deeper than 100.
    """
    out = PickleWriter()
    _write_plain(out, value, 0)
    return out.finish()


def global_finder(*, unknown: Unknown, source: str) -> FindGlobal:
    """Looks up what a pickle names; a class that is not known is refused, or as `unknown` allows becomes Opaque."""

    def find_global(module: str, name: str) -> object:
        known = torch_constant(module, name)
        if known is not None:
            return known
        full = f"{module}.{name}"
        make = PLAIN_GLOBALS.get(full)
        if make is not None or full in PLAIN_TYPES:
            return Factory(full, make)
        if unknown != "opaque" and (unknown == "refuse" or full not in unknown):
            raise StorageError(
                f"{source}: the pickle names {full!r}, which is not a class that mbx reads",
                hint="nothing of it was run; check where the file comes from",
            )
        return Factory(full, lambda args: Opaque(full, args))

    return find_global


def _write_plain(out: PickleWriter, value: object, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise StorageError(f"a value nested deeper than {_MAX_DEPTH} cannot be written to a checkpoint")
    if value is None:
        out.opcodes(b"N")
    elif isinstance(value, bool):
        out.opcodes(b"\x88" if value else b"\x89")
    elif isinstance(value, TorchDtype):
        out.reference("torch", value.removeprefix("torch."))
    elif type(value) is str:
        out.string(value)
    elif type(value) is int:
        out.integer(value)
    elif type(value) is float:
        out.number(value)
    elif type(value) is bytes:  # protocol 2 has no opcode for bytes; pickle itself writes this call
        out.reference("_codecs", "encode")
        out.string(value.decode("latin1"))
        out.string("latin1")
        out.opcodes(b"\x86R")
    elif type(value) is list or type(value) is tuple:
        out.opcodes(b"](" if type(value) is list else b"(")
        for item in value:
            _write_plain(out, item, depth + 1)
        out.opcodes(b"e" if type(value) is list else b"t")
    elif type(value) is dict:
        _write_dict(out, value, depth)
    elif isinstance(value, (Namespace, argparse.Namespace)):
        out.reference("argparse", "Namespace")
        out.opcodes(b")\x81")
        _write_dict(out, value.values if isinstance(value, Namespace) else dict(vars(value)), depth)
        out.opcodes(b"b")
    elif isinstance(value, TensorStub):
        _write_tensor(out, value)
    else:
        raise StorageError(f"a value of type {type(value).__qualname__} cannot be written to a checkpoint")


def _write_dict(out: PickleWriter, values: dict[object, object] | dict[str, object], depth: int) -> None:
    out.opcodes(b"}(")
    for key, item in values.items():
        _write_plain(out, key, depth + 1)
        _write_plain(out, item, depth + 1)
    out.opcodes(b"u")


def _write_tensor(out: PickleWriter, stub: TensorStub) -> None:
    storage_class = STORAGE_CLASS_OF.get(stub.dtype)
    out.reference("torch._utils", "_rebuild_tensor_v2" if storage_class else "_rebuild_tensor_v3")
    out.opcodes(b"((")
    out.string("storage")
    if storage_class:
        out.reference("torch", storage_class)
    else:
        out.reference("torch.storage", "UntypedStorage")
    out.string(stub.storage)
    out.string("cpu")
    out.integer(stub.storage_nbytes // (stub.itemsize if storage_class else 1))
    out.opcodes(b"tQ")
    out.integer(stub.storage_offset)
    out.integers(stub.shape)
    out.integers(stub.stride)
    out.opcodes(b"\x89")
    out.reference("collections", "OrderedDict")
    out.opcodes(b")R")
    if not storage_class:
        out.reference("torch", TORCH_NAMES[stub.dtype])
    out.opcodes(b"tR")
