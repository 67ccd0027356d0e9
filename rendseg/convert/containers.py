"""Files of weights: PyTorch's (zip and legacy), plain pickles (``.pkl``, ``.pdparams``), safetensors, and folders of
the Hub's layout. Which it is shows in the first bytes; the suffix does not matter.

``read(path)`` gives the tensors by name and the rest of what the file holds; nothing is executed (see ``unpickle.py``).
"""

from __future__ import annotations

import json
import os
import struct
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from .errors import ConversionError
from .unpickle import StorageType, load

# What training codes call the part of a checkpoint that holds the weights, the likeliest first.
_PARTS = ("state_dict", "model", "model_state_dict", "state_dict_ema", "model_state")
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LARGEST_HEADER = 100 << 20  # of safetensors, by its specification


class Source(NamedTuple):
    """What was read."""

    path: Path
    tensors: dict[str, Tensor]
    rest: dict[str, Any]
    """What a checkpoint holds beside its tensors; of a folder ``config.json``."""


def read(path: str | os.PathLike[str]) -> Source:
    """The weights in a file, or in a folder of the Hub's layout. ``ConversionError`` says in one line what is wrong."""
    path = Path(path)
    try:
        return _folder(path) if path.is_dir() else Source(path, *_weights(path, _content(path)))
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror or error}") from None
    except MemoryError:
        raise ConversionError(f"{path} does not fit into memory") from None


def _content(path: Path) -> Any:
    with open(path, "rb") as file:
        magic = file.read(9)
        file.seek(0)
        if magic[:4] == b"PK\x03\x04":
            return _zip(path)
        header = magic[8:9] == b"{"  # of safetensors, after its length, whose first byte may look like a pickle's
        if magic[:1] == b"\x80" and not (header and struct.unpack("<Q", magic[:8])[0] < path.stat().st_size):
            return _pickles(path, file)
        if header:
            return _safetensors(path, file)
    if not magic:
        raise ConversionError(f"{path} is empty")
    if magic[:7] == b"version":
        raise ConversionError(f"{path} is a Git LFS pointer, not the weights: fetch the file itself (git lfs pull)")
    raise ConversionError(
        f"{path} is no file of weights that is known here (PyTorch, pickle, .pdparams or safetensors)"
    )


def _weights(path: Path, content: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a checkpoint by name, and the rest of it."""
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not weights by name")
    part = next((name for name in _PARTS if isinstance(content.get(name), dict)), None)
    state = content if part is None else content[part]
    tensors, rest = {}, {} if part is None else {key: value for key, value in content.items() if key != part}
    for name, value in state.items():
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Tensor):
            value = value[1]  # of Paddle: the parameter's own name, its value
        if isinstance(value, Tensor) and isinstance(name, str):
            tensors[name] = value
        else:
            rest[name] = value
    if not tensors:
        raise ConversionError(f"{path} holds no tensors by name (its entries: {', '.join(map(str, content))[:80]})")
    return tensors, rest


# ------------------------------------------------------------------------------------------------------- PyTorch


def _storage_type(pid: Any) -> tuple[torch.dtype, str, int]:
    """dtype, key and length of a storage, from its persistent identifier."""
    kind, stored, key, _, count, *_ = pid
    if kind != "storage" or not isinstance(stored, StorageType) or not isinstance(count, int) or count < 0:
        raise ValueError("an unknown kind of storage")
    return stored.dtype, str(key), count


def _zip(path: Path) -> Any:
    """A file of ``torch.save`` since PyTorch 1.6."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2]: name for name in archive.namelist()}
            if "data.pkl" not in names:
                inner = next((name for name in archive.namelist() if name.endswith((".pth", ".pt", ".tar"))), None)
                remedy = f"unpack it, and convert {inner}" if inner else "it has no data.pkl"
                raise ConversionError(f"{path} is a zip file, but not one of torch.save: {remedy}")
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ConversionError(f"{path} is not a file of torch.save: its parts are compressed")
            if sum(entry.file_size for entry in entries) > size:
                raise ConversionError(f"{path} is damaged: its parts are larger than the file")
            if "byteorder" in names and archive.read(names["byteorder"]).strip() != sys.byteorder.encode():
                raise ConversionError(f"{path} was saved on a machine of another byte order: save it again there")
            storages: dict[str, Tensor] = {}

            def storage(pid: Any) -> Tensor:
                dtype, key, count = _storage_type(pid)
                if key not in storages:
                    storages[key] = torch.frombuffer(bytearray(archive.read(names[f"data/{key}"])), dtype=torch.uint8)
                return storages[key].view(dtype)[:count]

            with archive.open(names["data.pkl"]) as file:
                return load(file, path, storage)  # type: ignore[arg-type]
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ConversionError(f"{path} is truncated or damaged: {error}") from None


def _pickles(path: Path, file: BinaryIO) -> Any:
    """A plain pickle, or a file of ``torch.save`` before PyTorch 1.6: five pickles, then the storages."""
    size = path.stat().st_size
    storages: dict[str, Tensor] = {}

    def storage(pid: Any) -> Tensor:
        dtype, key, count = _storage_type(pid)
        if count * dtype.itemsize > size:
            raise ValueError("a storage is larger than the file")
        if key not in storages:
            storages[key] = torch.empty(count, dtype=dtype)
        view = pid[5] if len(pid) > 5 else None
        return storages[key] if view is None else storages[key][view[1] : view[1] + view[2]]

    first = load(file, path)
    if first != _LEGACY_MAGIC:
        return first
    version, machine = load(file, path), load(file, path)
    if version != 1001 or not machine.get("little_endian", True):
        raise ConversionError(f"{path} was saved by a PyTorch that is not known here, or on another kind of machine")
    content, order = load(file, path, storage), load(file, path)
    for key in order:
        count = struct.unpack("<q", file.read(8).ljust(8, b"\0"))[0]
        target = storages.get(str(key))
        if target is None:
            raise ConversionError(f"{path} is damaged: the storage {str(key)[:20]} belongs to no tensor")
        data = file.read(target.nbytes)
        if count != len(target) or len(data) != target.nbytes:
            raise ConversionError(f"{path} is truncated or damaged: the storage {str(key)[:20]} is incomplete")
        if data:
            target.view(torch.uint8).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return content


# -------------------------------------------------------------------------------------------- safetensors, folders


def _safetensors(path: Path, file: BinaryIO) -> Any:
    from safetensors import SafetensorError, safe_open

    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(_LARGEST_HEADER, path.stat().st_size - 8):
        raise ConversionError(f"{path} is truncated or damaged: its header is {length} bytes long")
    try:
        with safe_open(str(path), "pt") as content:
            return {**{name: content.get_tensor(name) for name in content.keys()}, **(content.metadata() or {})}  # noqa: SIM118
    except SafetensorError as error:
        raise ConversionError(f"{path} is truncated or damaged: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The mapping of a JSON file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConversionError(f"{path} must hold a mapping, got a {type(content).__name__}")
    return content


def _folder(path: Path) -> Source:
    """``config.json`` with ``model.safetensors`` or ``pytorch_model.bin``, whole or in numbered parts."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{name}.index.json"
        if (path / name).is_file():
            parts = [path / name]
        elif index.is_file():
            mapping = read_json(index).get("weight_map")
            names = set(mapping.values()) if isinstance(mapping, Mapping) else set()
            if not names or not all(isinstance(n, str) and os.path.basename(n) == n for n in names):
                raise ConversionError(f"{index} must have a weight_map from tensors to files of its folder")
            parts = [path / part for part in sorted(names)]
        else:
            continue
        tensors: dict[str, Tensor] = {}
        for part in parts:
            tensors |= _weights(part, _content(part))[0]
        configs = (path / "config.json", path / "preprocessor_config.json")
        return Source(path, tensors, {file.name: read_json(file) for file in configs if file.is_file()})
    raise ConversionError(f"{path} holds neither model.safetensors nor pytorch_model.bin: give the file of weights")
