"""What a checkpoint's pickle declares, read by walking its opcodes: nothing that it names is looked up or called.

A pickle is a program for a small stack machine. Of that machine only what builds tables of tensors is here, so a
hostile pickle has nothing to work with: a call makes a `Declared` or a placeholder, a dictionary takes text as keys
only, and the number of instructions is limited.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import IO, Any, cast

import torch

from mrflow_sched._runtime.errors import MrFlowError, shown

MOST_OPCODES = 500_000
"""About five times what a checkpoint of the largest network with its optimizer needs."""

MOST_WAITING = 20_000
"""Values on the machine's stack at once: pickle writes tables in parts of a thousand."""

_MOST_DIMENSIONS = 8
_PLACEHOLDERS = frozenset({"NONE", "NEWTRUE", "NEWFALSE", "BINFLOAT", "EMPTY_SET", "BINBYTES", "SHORT_BINBYTES"})
_VALUES = frozenset(
    {"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING"}
)
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_STORAGES = {f"torch.{name}": dtype for name, dtype in _DTYPES.items()}
_TENSORS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
_PARAMETERS = (
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch.nn.parameter.Parameter",
)
_DICTIONARIES = ("collections.OrderedDict", "collections.defaultdict", "builtins.dict", "__builtin__.dict")
# What training programs leave beside the weights. It is not made; anything else is a reason to distrust the file.
_HARMLESS = frozenset(
    {
        "_codecs.encode",
        "argparse.Namespace",
        "builtins.set",
        "__builtin__.set",
        "collections.Counter",
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "numpy.dtype",
        "numpy.ndarray",
        "torch.Size",
        "torch.device",
    }
)


@dataclass(frozen=True)
class Declared:
    """A tensor as a file declares it.

    Attributes:
        dtype: Of its values.
        shape: Its sides.
        stride: Values from one index to the next, for each side.
        storage: Name of the block of values that it shows.
        offset: Its first value in that block.
        available: Values that the block is said to hold.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage: str
    offset: int
    available: int

    @property
    def numel(self) -> int:
        """Number of its values."""
        count = 1
        for side in self.shape:
            count *= side
        return count


@dataclass(frozen=True)
class _Named:
    """What a pickle asks for by name."""

    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    numel: int
    offset: int = 0


def read_pickle(file: IO[bytes], widths: dict[str, int] | None = None) -> object:
    """Walk one pickle and return what it declares; nothing is imported, called or unpacked.

    Args:
        file: At the pickle's first byte. It is at the byte after the pickle afterwards.
        widths: Receives the bytes of a value for every block that the pickle names.

    Returns:
        Dictionaries with text as keys, lists, tuples, numbers, texts and `Declared`; None for everything else.

    Raises:
        MrFlowError: It asks to run something, declares tensors that cannot be, or is no pickle of weights.
    """
    machine = _Machine({} if widths is None else widths)
    try:
        for count, (opcode, value, _) in enumerate(pickletools.genops(file)):
            if count >= MOST_OPCODES or len(machine.stack) > MOST_WAITING:
                raise MrFlowError("it holds more than weights")
            machine.step(opcode.name, value)
        return machine.stack[-1]
    except MrFlowError:
        raise
    except Exception as error:  # bytes that are no pickle make the machine fail in any way
        raise MrFlowError("it holds no table of weights") from error


class _Machine:
    def __init__(self, widths: dict[str, int]) -> None:
        self.widths = widths
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, value: Any) -> None:
        stack = self.stack
        if name in _VALUES:
            stack.append(value)
        elif name in _PLACEHOLDERS:
            stack.append(None)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[value] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[value])
        elif name in _TUPLES:
            self.put(tuple(self.take(_TUPLES[name])))
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name == "TUPLE":
            self.put(tuple(self.take_marked()))
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name in ("SETITEM", "SETITEMS"):
            self.fill(self.take(2) if name == "SETITEM" else self.take_marked())
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = self.take(1) if name == "APPEND" else self.take_marked()
            if isinstance(stack[-1], list):
                cast("list[Any]", stack[-1]).extend(items)
        elif name == "GLOBAL":
            self.put(_known(str(value).replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            self.put(_known(".".join(map(str, self.take(2)))))
        elif name in ("REDUCE", "NEWOBJ"):
            called, arguments = self.take(2)
            self.put(_made(called, arguments))
        elif name == "BUILD":
            self.take(1)  # attributes: not weights
        elif name == "BINPERSID":
            found = _storage(*self.take(1))
            self.widths[found.key] = found.dtype.itemsize
            self.put(found)
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise MrFlowError(f"it uses the pickle instruction {name}, which no file of weights needs")

    def put(self, value: object) -> None:
        self.stack.append(value)

    def take(self, count: int) -> list[Any]:
        first = len(self.stack) - count
        if first < (self.marks[-1] if self.marks else 0):
            raise IndexError("stack underflow")
        taken = self.stack[first:]
        del self.stack[first:]
        return taken

    def take_marked(self) -> list[Any]:
        return self.take(len(self.stack) - self.marks.pop())

    def fill(self, items: list[Any]) -> None:
        # Text only: the hash of a nested tuple takes time exponential in its bytes.
        if isinstance(self.stack[-1], dict):
            pairs = zip(items[::2], items[1::2], strict=True)
            cast("dict[str, Any]", self.stack[-1]).update({key: value for key, value in pairs if isinstance(key, str)})


def _known(name: str) -> _Named:
    if name in _STORAGES or name in _HARMLESS or name in (*_TENSORS, *_PARAMETERS, *_DICTIONARIES):
        return _Named(name)
    raise MrFlowError(f"it asks to run {shown(name)}, which was refused")


def _made(called: object, arguments: object) -> object:
    """What a call would have made, as far as it matters."""
    name = called.name if isinstance(called, _Named) else ""
    given = cast("tuple[Any, ...]", arguments)
    if name in _TENSORS:
        return _tensor(*given[:4])
    if name in _PARAMETERS:
        return given[0]
    if name in _DICTIONARIES:
        pairs = cast("list[Any]", given[0]) if given and isinstance(given[0], list) else []  # as Python 2 wrote them
        return {key: value for key, value in pairs if isinstance(key, str)}
    return None


def _storage(identity: object) -> _Storage:
    """A block of values: ("storage", type, name, device, number of values), with (name, offset, number) of a part."""
    kind, named, key, _, numel, *rest = cast("tuple[Any, ...]", identity)
    part = rest[0] if rest else None
    if kind != "storage" or not isinstance(named, _Named) or named.name not in _STORAGES:
        raise MrFlowError("it holds values of a type that weights do not have")
    offset = part[1] if part else 0
    _check_sizes((numel, offset))
    return _Storage(str(key), _STORAGES[named.name], numel, offset)


def _tensor(storage: object, offset: int, shape: Any, stride: Any) -> Declared:
    if not isinstance(storage, _Storage) or len(shape) != len(stride):
        raise MrFlowError("it holds tensors without values")
    shape, stride = tuple(shape), tuple(stride)
    _check_sizes((offset, *shape, *stride))
    found = Declared(storage.dtype, shape, stride, storage.key, storage.offset + offset, storage.numel)
    last = found.offset + sum((side - 1) * step for side, step in zip(shape, stride, strict=True))
    if found.numel and (found.numel > storage.numel or last >= storage.numel):
        raise MrFlowError("it declares more values than it holds")
    return found


def _check_sizes(numbers: tuple[Any, ...]) -> None:
    if len(numbers) > 2 * _MOST_DIMENSIONS + 1 or not all(type(one) is int and 0 <= one < 2**48 for one in numbers):
        raise MrFlowError("it declares sizes that cannot be")
