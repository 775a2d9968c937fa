"""A pickle interpreter that builds inert values: it imports nothing and calls nothing a pickle names.

Python's own unpickler is not used, even with a restricted `find_class`: a hostile memo index or length
makes it allocate gigabytes, and a nested tuple used as a key makes it hash for ever or overflow the C
stack. Here every opcode costs at least one input byte, memory grows with the input only, and keys are
checked before they are hashed. Opcodes that `torch.save` and `pickle` (protocol 2 to 5) do not write are
refused. Opcode meanings: the comments of CPython's `Lib/pickletools.py`.
"""

from __future__ import annotations

import gc
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from converters.errors import StorageError
from mbx.torchfile.torch_values import Namespace, Opaque, TorchDtype

#: A checkpoint's pickle is 100 bytes a chunk; this allows a million of them and bounds a hostile one.
MAX_PICKLE_BYTES = 1 << 27
#: Opcodes of one byte that make an empty container of 56 to 216 bytes. No tool fills an eighth of a pickle with them;
#: so bounded, a parse takes at most 64 times the pickle's bytes (measured: memo entries, 44; sets at this share, 29).
_CONTAINERS = (b"}", b"]", b"\x8f")
_FREE_CONTAINERS = 1 << 16
_MAX_KEY_PARTS = 256
_MAX_KEY_INT = 1 << 60
_PLAIN_KEYS = frozenset({str, bool, type(None), bytes, float, Opaque, TorchDtype})


class Factory:
    """What a class or function named by a pickle becomes: a name and, at most, a function of ours."""

    __slots__ = ("make", "name")

    def __init__(self, name: str, make: Callable[[tuple[object, ...]], object] | None = None) -> None:
        self.name = name
        self.make = make


FindGlobal = Callable[[str, str], object]
LoadPersistent = Callable[[object], object]


def run_pickle(data: bytes, find_global: FindGlobal, load_persistent: LoadPersistent, *, source: str) -> object:
    """The inert value that a pickle describes.

    `find_global(module, name)` gives the value of a global, usually a Factory; `load_persistent(id)` that
    of a persistent id. Raises StorageError, naming `source`, for anything that is not a sound pickle.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise StorageError(f"{source}: the pickle has {len(data)} bytes; at most {MAX_PICKLE_BYTES} are read")
    made = sum(map(data.count, _CONTAINERS))
    if made > max(_FREE_CONTAINERS, len(data) // 8):
        raise StorageError(f"{source}: up to {made} empty containers in a pickle of {len(data)} bytes")
    machine = _Machine(data, find_global, load_persistent, source)
    try:
        with paused_collection():
            return machine.run()
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, struct.error, OverflowError) as exc:
        raise StorageError(f"{source}: not a valid pickle near byte {machine.pos}: {type(exc).__name__}") from exc


@contextmanager
def paused_collection() -> Iterator[None]:
    """Keeps the cycle collector off while many objects are made that all stay alive.

    Measured on a `.metadata` of 100,000 chunks: 1.7 s instead of 2.8 s.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class _Machine:
    __slots__ = ("data", "find_global", "load_persistent", "marks", "memo", "pos", "source", "stack")

    def __init__(self, data: bytes, find_global: FindGlobal, load_persistent: LoadPersistent, source: str) -> None:
        self.data = data
        self.find_global = find_global
        self.load_persistent = load_persistent
        self.source = source
        self.pos = 0
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}

    def run(self) -> object:
        # The opcodes that a large `.metadata` consists of are handled here, most frequent first: a call
        # for each would double the time (8 million opcodes for 100,000 chunks).
        data, stack, memo, marks = self.data, self.stack, self.memo, self.marks
        push = stack.append
        pos = 0
        while True:
            op = data[pos]
            pos += 1
            if op == 0x94:  # MEMOIZE
                memo[len(memo)] = stack[-1]
            elif op == 0x68:  # BINGET
                push(memo[data[pos]])
                pos += 1
            elif op == 0x4B:  # BININT1
                push(data[pos])
                pos += 1
            elif op == 0x72:  # LONG_BINPUT
                memo[int.from_bytes(data[pos : pos + 4], "little")] = stack[-1]
                pos += 4
            elif op == 0x71:  # BINPUT
                memo[data[pos]] = stack[-1]
                pos += 1
            elif op == 0x6A:  # LONG_BINGET
                push(memo[int.from_bytes(data[pos : pos + 4], "little")])
                pos += 4
            elif op == 0x85:  # TUPLE1
                stack[-1] = (stack[-1],)
            elif op == 0x86:  # TUPLE2
                last = stack.pop()
                stack[-1] = (stack[-1], last)
            elif op == 0x52:  # REDUCE
                args = stack.pop()
                stack[-1] = self.call(stack[-1], args)
            elif op == 0x28:  # MARK
                marks.append(len(stack))
            elif op == 0x29:  # EMPTY_TUPLE
                push(())
            elif op == 0x81:  # NEWOBJ
                args = stack.pop()
                stack[-1] = self.call(stack[-1], args)
            elif op == 0x7D:  # EMPTY_DICT
                push({})
            elif op == 0x75:  # SETITEMS
                items = self.since_mark()
                self.set_items(stack[-1], items)
            elif op == 0x62:  # BUILD
                state = stack.pop()
                self.build(stack[-1], state)
            elif op == 0x87:  # TUPLE3
                last, middle = stack.pop(), stack.pop()
                stack[-1] = (stack[-1], middle, last)
            elif op == 0x4D:  # BININT2
                push(data[pos] | data[pos + 1] << 8)
                pos += 2
            elif op == 0x8C:  # SHORT_BINUNICODE
                end = pos + 1 + data[pos]
                push(data[pos + 1 : end].decode())
                pos = end
            elif op == 0x2E:  # STOP
                self.pos = pos
                return stack.pop()
            else:
                self.pos = pos
                handler = _HANDLERS.get(op)
                if handler is None:
                    self.refuse(f"opcode 0x{op:02x}, which no checkpoint uses")
                handler(self)
                pos = self.pos

    def refuse(self, what: str) -> NoReturn:
        raise StorageError(f"{self.source}: the pickle near byte {self.pos} holds {what}")

    def call(self, target: object, args: object) -> object:
        if type(target) is not Factory or target.make is None or type(args) is not tuple:
            self.refuse(f"a call of {target.name if isinstance(target, Factory) else type(target).__name__}")
        return target.make(args)

    def build(self, target: object, state: object) -> None:
        if type(target) is Opaque:
            target.state = state
        elif type(target) is Namespace and type(state) is dict:
            for key, value in state.items():
                if type(key) is not str:
                    self.refuse("a Namespace with an attribute name that is no string")
                target.values[key] = value
        elif type(target) is not dict:  # attributes of an OrderedDict, such as a state dict's `_metadata`
            self.refuse(f"a state for {type(target).__name__}")

    def set_items(self, target: object, items: list[object]) -> None:
        if len(items) % 2:
            self.refuse("a key without a value")
        if type(target) is dict:
            for index in range(0, len(items), 2):
                key = items[index]
                if type(key) is not str:
                    self.check_key(key)
                target[key] = items[index + 1]
        elif type(target) is Opaque:
            target.items.extend(zip(items[::2], items[1::2], strict=True))
        else:
            self.refuse(f"items set on {type(target).__name__}")

    def check_key(self, key: object) -> None:
        """Refuses a key that is costly to hash: nested without bound, or made to collide."""
        parts, seen = [key], 0
        while parts:
            part = parts.pop()
            seen += 1
            if seen > _MAX_KEY_PARTS:
                self.refuse("a key of too many parts")
            if type(part) is tuple:
                parts.extend(part[: _MAX_KEY_PARTS + 1])
            elif type(part) is int:
                if not -_MAX_KEY_INT < part < _MAX_KEY_INT:
                    self.refuse("an integer key out of range")
            elif type(part) not in _PLAIN_KEYS:
                self.refuse(f"a {type(part).__name__} as a key")

    def take(self, count: int) -> bytes:
        end = self.pos + count
        if end > len(self.data):
            self.refuse(f"a value of {count} bytes past its end")
        part = self.data[self.pos : end]
        self.pos = end
        return part

    def take_length(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def take_line(self) -> str:
        end = self.data.index(b"\n", self.pos)
        line = self.data[self.pos : end].decode()
        self.pos = end + 1
        return line

    def since_mark(self) -> list[object]:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def proto(self) -> None:
        version = self.take_length(1)
        if not 2 <= version <= 5:
            self.refuse(f"protocol {version}; 2 to 5 are read")

    def append(self, items: Iterable[object]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif type(target) is Opaque:
            target.items.extend(items)
        else:
            self.refuse(f"items appended to {type(target).__name__}")

    def append_one(self) -> None:
        item = self.stack.pop()
        self.append([item])

    def set_one(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items(self.stack[-1], [key, value])

    def checked(self, items: list[object]) -> list[object]:
        for item in items:
            self.check_key(item)
        return items

    def add_items(self) -> None:
        items = self.checked(self.since_mark())
        target = self.stack[-1]
        if type(target) is not set:
            self.refuse(f"items added to {type(target).__name__}")
        target.update(items)

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            self.refuse("a global whose name is no string")
        self.stack.append(self.find_global(module, name))

    def new_with_keywords(self) -> None:
        keywords, args = self.stack.pop(), self.stack.pop()
        if type(args) is not tuple:
            self.refuse("arguments that are no tuple")
        self.stack[-1] = self.call(self.stack[-1], (*args, keywords))


def _push(make: Callable[[_Machine], object]) -> Callable[[_Machine], None]:
    def handler(machine: _Machine) -> None:
        machine.stack.append(make(machine))

    return handler


_HANDLERS: dict[int, Callable[[_Machine], object]] = {
    0x80: _Machine.proto,
    0x95: lambda m: m.take(8),  # FRAME: its length is a hint for buffering
    ord("0"): lambda m: m.stack.pop(),
    ord("1"): _Machine.since_mark,
    ord("2"): _push(lambda m: m.stack[-1]),
    ord("N"): _push(lambda m: None),
    0x88: _push(lambda m: True),
    0x89: _push(lambda m: False),
    ord("J"): _push(lambda m: int.from_bytes(m.take(4), "little", signed=True)),
    0x8A: _push(lambda m: int.from_bytes(m.take(m.take_length(1)), "little", signed=True)),
    0x8B: _push(lambda m: int.from_bytes(m.take(m.take_length(4)), "little", signed=True)),
    ord("G"): _push(lambda m: struct.unpack(">d", m.take(8))[0]),
    ord("X"): _push(lambda m: m.take(m.take_length(4)).decode()),
    0x8D: _push(lambda m: m.take(m.take_length(8)).decode()),
    ord("C"): _push(lambda m: m.take(m.take_length(1))),
    ord("B"): _push(lambda m: m.take(m.take_length(4))),
    0x8E: _push(lambda m: m.take(m.take_length(8))),
    0x96: _push(lambda m: bytearray(m.take(m.take_length(8)))),
    ord("]"): _push(lambda m: []),
    0x8F: _push(lambda m: set()),
    0x91: _push(lambda m: frozenset(m.checked(m.since_mark()))),
    ord("t"): _push(lambda m: tuple(m.since_mark())),
    ord("a"): _Machine.append_one,
    ord("e"): lambda m: m.append(m.since_mark()),
    ord("s"): _Machine.set_one,
    0x90: _Machine.add_items,
    ord("c"): _push(lambda m: m.find_global(m.take_line(), m.take_line())),
    0x93: _Machine.stack_global,
    0x92: _Machine.new_with_keywords,
    ord("Q"): lambda m: m.stack.append(m.load_persistent(m.stack.pop())),
}
