"""Pickles of weights, read without calling anything that a file names.

A pickle is a program: it may name any function of any module and call it. Here a name stands for something of this file
alone, and any other name is refused before anything is called. What comes out are tensors, numbers, texts and plain
containers of these. Arrays of numpy become tensors.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from .errors import ConversionError

Storages = Callable[[Any], Tensor]
"""From the persistent identifier of a storage to its numbers, one-dimensional."""

_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _STORAGES.values()}


class Refused(Exception):
    """A pickle names what is not loaded."""


class _Fixed:
    """Keeps a pickle from setting attributes of what it names."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a function has no state")


class _Call(_Fixed):
    """A function that a pickle may call."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __setattr__(self, name: str, value: Any) -> None:
        raise ValueError("a function has no state")

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


class StorageType(_Fixed):
    """A class of storages, by the dtype of its numbers."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class _Mapping(dict[Any, Any]):
    """In place of ``OrderedDict``; the attributes that modules add are dropped."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Ignored:
    """An object whose contents nobody needs."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Dtype:
    """A numpy dtype under construction."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or code[:1] not in "biufUS" or len(code) > 8:
            raise Refused(f"arrays of numpy's dtype {str(code)[:20]}")
        self.code, self.order = code, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = ">" if state[1] == ">" else "<"

    def numbers(self, data: Any) -> np.ndarray:
        raw = data.encode("latin1") if isinstance(data, str) else bytes(data)
        return np.frombuffer(raw, np.dtype(self.order + self.code))


class _Array:
    """A numpy array under construction; ``tensor`` when it is done."""

    def __init__(self, *_: Any) -> None:
        self.tensor: Any = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.tensor = _tensor(dtype.numbers(data), shape, "F" if fortran else "C")


def _tensor(flat: np.ndarray, shape: Any, order: Any) -> Any:
    values = flat.reshape(shape, order=order)
    if values.dtype.kind in "US":
        return values.tolist()
    return torch.from_numpy(np.array(values, dtype=values.dtype.newbyteorder("="), order="C"))


def _from_buffer(data: Any, dtype: _Dtype, shape: Any, order: Any) -> Any:
    return _tensor(dtype.numbers(data), shape, order)


def _scalar(dtype: _Dtype, data: Any = b"") -> Any:
    return dtype.numbers(data)[0].item()


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise Refused(f"_codecs.encode to {str(encoding)[:20]}")
    return text.encode("latin1")


def _bytes(data: bytes = b"") -> bytes:
    if not isinstance(data, bytes):
        raise Refused("builtins.bytes of a number")
    return data


def _attribute(owner: Any, name: Any) -> None:
    """Methods of mmengine's HistoryBuffer, which it saves with its numbers."""
    if owner is not _Ignored:
        raise Refused(f"builtins.getattr for {str(name)[:40]}")


def _rebuild(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    count = 1
    for side in size:
        count *= side
    if count > storage.numel() or min((*size, *stride, offset), default=0) < 0:
        raise ValueError("a tensor is larger than its storage")
    return torch.as_strided(storage, tuple(size), tuple(stride), offset)


_NAMES: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Mapping,
    ("collections", "defaultdict"): _Call(lambda *_: _Mapping()),
    ("builtins", "tuple"): _Call(tuple),
    ("builtins", "list"): _Call(list),
    ("builtins", "dict"): _Call(_Mapping),
    ("builtins", "set"): _Call(set),
    ("builtins", "bytes"): _Call(_bytes),
    ("builtins", "getattr"): _Call(_attribute),
    ("_codecs", "encode"): _Call(_encode),
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Call(_Array),
    ("numpy.core.multiarray", "scalar"): _Call(_scalar),
    ("numpy.core.numeric", "_frombuffer"): _Call(_from_buffer),
    ("mmengine.logging.history_buffer", "HistoryBuffer"): _Ignored,
    ("torch", "Size"): _Call(tuple),
    ("torch", "device"): _Call(lambda *_: "cpu"),
    ("torch._utils", "_rebuild_tensor"): _Call(_rebuild),
    ("torch._utils", "_rebuild_tensor_v2"): _Call(_rebuild),
    ("torch._utils", "_rebuild_parameter"): _Call(lambda data, *_: data),
    ("torch._utils", "_rebuild_parameter_with_state"): _Call(lambda data, *_: data),
    ("torch.storage", "UntypedStorage"): StorageType(torch.uint8),
    **{("torch", name): StorageType(dtype) for name, dtype in _STORAGES.items()},
    **{("torch", name): StorageType(dtype) for name, dtype in _DTYPES.items()},
}


def _named(module: str, name: str) -> Any:
    module = {"__builtin__": "builtins"}.get(module, module).replace("numpy._core.", "numpy.core.")
    if (module, name.partition(".")[0]) == ("mmengine.logging.history_buffer", "HistoryBuffer"):
        return _Ignored
    if (module, name) not in _NAMES:
        raise Refused(f"{module}.{name}"[:100])
    return _NAMES[module, name]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, storages: Storages | None) -> None:
        super().__init__(file, encoding="latin1")
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        return _named(module, name)

    def persistent_load(self, pid: Any) -> Any:
        if self._storages is None:
            raise Refused("a persistent identifier")
        return self._storages(pid)


def load(file: BinaryIO, path: Any, storages: Storages | None = None) -> Any:
    """The next pickle of ``file``; ``path`` is the file that errors name."""
    try:
        start = file.tell()
        _scan(file)
        file.seek(start)
        return _finished(_Unpickler(file, storages).load(), set())
    except Refused as refusal:
        raise ConversionError(
            f"{path} is refused: it asks for {refusal}, and nothing that a file names is called here; save the weights "
            "alone, as a state dict"
        ) from None
    except MemoryError:
        raise ConversionError(f"{path} does not fit into memory") from None
    except Exception as error:  # a damaged pickle can raise any
        reason = (str(error).splitlines() or [""])[0][:80] or type(error).__name__
        raise ConversionError(f"{path} is truncated, damaged or no file of weights: {reason}") from None


class _Bounded:
    """A file of which nobody can ask for more than there is."""

    def __init__(self, file: BinaryIO) -> None:
        start = file.tell()
        self.end, self.tell, self.readline = file.seek(0, 2), file.tell, file.readline
        self._file = file
        file.seek(start)

    def read(self, count: int) -> bytes:
        self.check(count)
        return self._file.read(count)

    def check(self, count: int) -> None:
        """``ValueError`` unless that many bytes are left."""
        if count > self.end - self.tell():
            raise ValueError("a length in it is beyond its end")


def _scan(file: BinaryIO) -> None:
    """Read over the pickle once. Names that stand in it as they are get refused before anything else is read; every
    length is then known to be within the file, and no memo larger than the pickle, so that a few bytes cannot ask for
    much memory."""
    bounded = _Bounded(file)
    argument: Any
    for count, (opcode, argument, _) in enumerate(pickletools.genops(bounded)):  # type: ignore[arg-type]
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= argument <= count:
            raise ValueError(f"memo {argument} after {count} operations")
        if opcode.name in ("GLOBAL", "INST"):
            _named(*argument.split(" ", 1))
        elif opcode.name == "FRAME":
            bounded.check(argument)


def _finished(value: Any, seen: set[int]) -> Any:
    """``value`` with tensors in place of arrays."""
    if isinstance(value, _Array):
        return value.tensor
    if isinstance(value, tuple):
        return tuple(_finished(item, seen) for item in value) if len(value) < 4 else value
    if not isinstance(value, (dict, list)) or id(value) in seen:
        return value
    seen.add(id(value))
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(item, (_Array, dict, list, tuple)):
            value[key] = _finished(item, seen)
    return value
