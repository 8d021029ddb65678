"""A reader of pickles that calls no function of the file: it parses the file, and then builds tensors from the result.

``pickle`` and ``torch.load(weights_only=True)`` call functions that the file names, with arguments from the file. Some
of these calls can write to any memory, reserve more memory than the file needs, or run without end. This reader turns
a file into containers, numbers, strings and :class:`Call` objects. :class:`Builder` knows the few calls that weights
files need. It checks their arguments, and makes tensors from bytes, an element type and a shape.
"""

import math
import pickletools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

# Limit of the opcodes in a file, and of the values in its content. The checkpoint of a Swin-L run has 100,000.
MOST_OBJECTS = 500_000
_DEEPEST = 64
# More than 1, because views of one storage, such as tied weights, are counted once for each name.
_MOST_BYTES_PER_FILE_BYTE = 4

_VALUES = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES "
    "SHORT_BINBYTES BINBYTES8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8".split()
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
}
_PUT, _GET = ("BINPUT", "LONG_BINPUT", "PUT"), ("BINGET", "LONG_BINGET", "GET")
_TUPLE_SIZES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MAPPINGS = ("collections.OrderedDict", "collections.Counter")

_NUMPY_CODES = frozenset("b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8".split())
_STORAGE_TYPES = {
    "torch.BoolStorage": torch.bool,
    "torch.ByteStorage": torch.uint8,
    "torch.CharStorage": torch.int8,
    "torch.ShortStorage": torch.int16,
    "torch.IntStorage": torch.int32,
    "torch.LongStorage": torch.int64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.storage.UntypedStorage": torch.uint8,
}
# Element types without a storage class: the file contains an untyped storage and the name of the type.
_ELEMENT_TYPES = {"torch.uint16": torch.uint16, "torch.uint32": torch.uint32, "torch.uint64": torch.uint64}
_NUMPY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")  # numpy 1 and 2
_CALLABLE = frozenset(
    [f"{module}.{name}" for module in _NUMPY_MODULES for name in ("_reconstruct", "scalar")]
    + [f"torch._utils._rebuild_{name}" for name in ("tensor", "tensor_v2", "tensor_v3")]
    + [f"torch._utils._rebuild_{name}" for name in ("parameter", "parameter_with_state")]
    + ["torch._tensor._rebuild_from_type_v2", "torch.Size", "_codecs.encode", "numpy.dtype"]
)
_NAMES_ONLY = ("numpy.ndarray", "torch.Tensor", "torch.nn.parameter.Parameter")
_KNOWN_NAMES = frozenset({*_CALLABLE, *_MAPPINGS, *_STORAGE_TYPES, *_ELEMENT_TYPES, *_NAMES_ONLY})


class Refused(ValueError):
    """The content of a file is not allowed. The message follows "<path>: " and says why and what to do."""


def _without_values(path: str) -> Refused:
    return Refused(f"it contains a {path[:200]} without its values. Save only tensors, arrays, numbers and strings.")


class Name(NamedTuple):
    """A class or function that a file names."""

    path: str


class Storage(NamedTuple):
    """A reference to tensor values that are stored outside the pickle."""

    key: str | int
    dtype: torch.dtype
    num_bytes: int


@dataclass(eq=False)
class Call:
    """A call that the file requests and that is not executed."""

    function: str
    arguments: tuple[Any, ...]
    state: Any = None
    """State that the file sets on the result of the call."""


def read_pickle(stream: Any, storages: dict[str | int, Storage] | None = None, most_objects: int = MOST_OBJECTS) -> Any:
    """Parse a pickle into containers, numbers, strings, :class:`Call`, :class:`Name` and :class:`Storage` objects.

    Args:
        stream: binary stream at the start of the pickle; its ``read(n)`` must not reserve more memory than the rest
            of the stream has.
        storages: gets the storages that the pickle refers to, by key.
        most_objects: largest allowed number of opcodes.

    Raises:
        Refused: the pickle names an object that weights files do not need, or is too large.
        Exception: almost any other exception, if the pickle is damaged.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop_to_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for number, (opcode, value, _) in enumerate(pickletools.genops(stream)):
        if number == most_objects:
            raise Refused(f"it has more than {most_objects} objects. Save only the model's state dict.")
        code = opcode.name
        if code in _VALUES:
            stack.append(_checked_number(value) if type(value) is int else value)
        elif code in _PUT:
            memo[_checked_index(value)] = stack[-1]
        elif code == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif code in _GET:
            stack.append(memo[_checked_index(value)])
        elif code == "MARK":
            marks.append(len(stack))
        elif code in _TUPLE_SIZES:
            start = len(stack) - _TUPLE_SIZES[code]
            stack[start:] = [tuple(stack[start:])]
        elif code in _CONSTANTS:
            stack.append(_CONSTANTS[code]())
        elif code == "TUPLE":
            stack.append(tuple(pop_to_mark()))
        elif code == "LIST":
            stack.append(pop_to_mark())
        elif code == "DICT":
            stack.append(_mapping(_pairs(pop_to_mark())))
        elif code == "GLOBAL":
            stack.append(_known_name(value.replace(" ", ".", 1)))
        elif code == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            stack.append(_known_name(f"{module}.{name}" if type(module) is type(name) is str else "nameless object"))
        elif code == "REDUCE":
            arguments = stack.pop()
            stack[-1] = _call(stack[-1], arguments)
        elif code == "BINPERSID":
            stack[-1] = _storage(*stack[-1])
            if storages is not None:
                storages.setdefault(stack[-1].key, stack[-1])
        elif code == "APPEND":
            item = stack.pop()
            _expect(list, stack[-1]).append(item)
        elif code == "APPENDS":
            items = pop_to_mark()
            _expect(list, stack[-1]).extend(items)
        elif code == "SETITEM":
            item, key = stack.pop(), stack.pop()
            _expect(dict, stack[-1]).update(_mapping([(key, item)]))
        elif code == "SETITEMS":
            items = pop_to_mark()
            _expect(dict, stack[-1]).update(_mapping(_pairs(items)))
        elif code == "BUILD":
            state = stack.pop()
            if type(stack[-1]) is not dict:  # attributes of a state dict are versions of layers, which are not used
                _expect(Call, stack[-1]).state = state
        elif code == "STOP":
            return stack.pop()
        elif code not in ("PROTO", "FRAME"):
            raise Refused(f"it uses pickle's {code}. Save only tensors, numbers and strings in lists and dicts.")


def _checked_number(value: int) -> int:
    if value.bit_length() > 256:  # arithmetic with longer numbers can take very long
        raise Refused(f"it contains a number of {value.bit_length()} bits. Save numbers of at most 256 bits.")
    return value


def _checked_index(value: Any) -> int:
    """Check that a value is a small number, because an attacker can choose large numbers whose hashes collide."""
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise ValueError("an index out of range")
    return value


def _expect(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} in place of a {kind.__name__}")
    return value


def _pairs(items: Sequence[Any]) -> Sequence[Any]:
    return list(zip(items[0::2], items[1::2], strict=True))


def checked_key(key: Any) -> str | int:
    """Check that a key is a string or a small number, before it is hashed: hashing a nested tuple may never end."""
    return key if type(key) is str else _checked_index(key)


def _mapping(pairs: Sequence[Any]) -> dict[str | int, Any]:
    return {checked_key(key): value for key, value in pairs}


def _known_name(path: str) -> Name:
    if path not in _KNOWN_NAMES:
        raise Refused(
            f"it contains a {path[:200]}, and reading this object could run code. Save only tensors, numpy arrays, "
            "numbers and strings."
        )
    return Name(path)


def _call(function: Any, arguments: Any) -> Any:
    path = _expect(Name, function).path
    _expect(tuple, arguments)
    if path in _MAPPINGS:
        entries = arguments[0] if arguments else {}
        return _mapping(list(entries.items()) if type(entries) is dict else _expect(list, entries))
    if path not in _CALLABLE:
        raise _without_values(path)
    return Call(path, arguments)


def _storage(kind: str, storage_type: Name, key: Any, location: str, num_elements: int, view: None = None) -> Storage:
    dtype = _STORAGE_TYPES[_expect(Name, storage_type).path]
    if kind != "storage" or view is not None:
        raise ValueError("no storage")
    return Storage(checked_key(key), dtype, _size((num_elements,))[0] * dtype.itemsize)


def _size(value: Any) -> tuple[int, ...]:
    if type(value) not in (tuple, list) or len(value) > 64 or any(type(n) is not int or n < 0 for n in value):
        raise ValueError("no shape")
    return tuple(value)


class Builder:
    """Builds tensors from the calls in the result of :func:`read_pickle`.

    Args:
        file_size: size of the file in bytes; the built tensors may exceed it only by a small factor.
        read_storage: function that returns the bytes of a storage.
    """

    def __init__(self, file_size: int, read_storage: Callable[[Storage], bytes]) -> None:
        self._bytes_left = _MOST_BYTES_PER_FILE_BYTE * file_size
        self._objects_left = MOST_OBJECTS
        self._read_storage = read_storage
        self._storages: dict[str | int, torch.Tensor] = {}
        self._built: dict[int, Any] = {}

    def build(self, value: Any, depth: int = 0) -> Any:
        """Return a copy of a value with tensors in place of calls.

        A container that occurs twice is copied twice, so the result has no cycles.
        """
        self._objects_left -= 1
        if self._objects_left < 0 or depth > _DEEPEST:
            raise Refused("its containers are nested too deeply or in cycles. Save only the model's state dict.")
        kind = type(value)
        if kind is dict:
            return {key: self.build(item, depth + 1) for key, item in value.items()}
        if kind is list or kind is tuple:
            return kind(self.build(item, depth + 1) for item in value)
        if kind is Call:
            if id(value) not in self._built:
                self._built[id(value)] = self._make(value)
            return self._built[id(value)]
        if kind is Name or kind is Storage:
            raise _without_values(str(value[0]))
        return value

    def _take(self, num_bytes: int) -> None:
        self._bytes_left -= num_bytes
        if self._bytes_left < 0:
            raise Refused("its arrays are larger than the file. Save arrays that do not share memory.")

    def _make(self, call: Call) -> Any:
        name = call.function.rpartition(".")[2]
        if name == "encode":
            return self._bytes(call)
        if name == "_reconstruct":
            shape, dtype, by_columns, values = call.state[-4:]
            return self._array(shape, dtype, by_columns, values)
        if name == "scalar":
            return self._array((), call.arguments[0], False, call.arguments[1]).numpy()[()]
        if name == "Size":
            return _size(*call.arguments)
        if name.startswith("_rebuild_parameter"):
            return self._make(_expect(Call, call.arguments[0]))
        if name == "_rebuild_from_type_v2":  # a tensor with attributes, which are dropped
            return self._make(_call(*call.arguments[0:3:2]))
        if name.startswith("_rebuild_tensor"):
            return self._tensor(*call.arguments)
        raise _without_values(call.function)

    def _bytes(self, value: Any) -> bytes:
        """Return a value as bytes: new and old pickle protocols and Python 2 write bytes in different ways."""
        if type(value) is Call and value.function == "_codecs.encode" and value.arguments[1] == "latin1":
            value = value.arguments[0]
        self._take(len(value))
        return value.encode("latin1") if type(value) is str else _expect(bytes, value)

    def _array(self, shape: Any, dtype: Any, by_columns: Any, values: Any) -> torch.Tensor:
        (code, order), shape = _element_type(dtype), _size(shape)
        data = self._bytes(values)
        if math.prod(shape) * int(code[1]) != len(data):
            raise Refused("the size of an array differs from its shape. The file is damaged; download it again.")
        if code == "b1":
            array = np.frombuffer(data, np.uint8) != 0
        else:
            array = np.frombuffer(data, order + code).astype(code)
        return torch.from_numpy(array.reshape(shape, order="F" if by_columns is True else "C").copy())

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> torch.Tensor:
        key, dtype, num_bytes = _expect(Storage, storage)
        if len(rest) > 2 and type(rest[2]) is Name:  # rest is requires_grad, hooks, element type
            dtype = _ELEMENT_TYPES[rest[2].path]
        size, stride, (offset,) = _size(size), _size(stride), _size((offset,))
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        num_elements, available = math.prod(size), num_bytes // dtype.itemsize
        if num_elements > available or (num_elements and last >= available):
            raise Refused(
                f"a tensor of shape {size} has only {available} values in the file. Save tensors with .contiguous()."
            )
        self._take(num_elements * dtype.itemsize)
        if key not in self._storages:
            data = self._read_storage(storage)
            if len(data) != num_bytes:
                raise Refused("the record of a tensor has a wrong size. The file is damaged; download it again.")
            self._storages[key] = torch.empty(num_bytes, dtype=torch.uint8)
            self._storages[key].numpy()[:] = np.frombuffer(data, np.uint8)
        flat = self._storages[key]
        if dtype == torch.bool:  # other bytes than 0 and 1 would be invalid in a bool tensor
            return flat.as_strided(size, stride, offset) != 0
        return flat.view(dtype).as_strided(size, stride, offset)


def _element_type(dtype: Any) -> tuple[str, str]:
    """Return the code ("f4") and the byte order ("<", ">", "=") of a numpy element type."""
    code = _expect(Call, dtype).arguments[0]
    if dtype.function != "numpy.dtype" or type(code) is not str or code not in _NUMPY_CODES:
        kind = code[:40] if type(code) is str else type(code).__name__
        raise Refused(f"it contains an array of {kind!r}, not of numbers. Save only arrays of numbers.")
    order = dtype.state[1] if type(dtype.state) is tuple else "="
    return code, order if order in ("<", ">") else "="
