"""Files of weights: every container gives the same tensors, and no file gets anything called."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from rendseg.convert import ConversionError, read

WANTED = {
    "a.weight": torch.arange(24, dtype=torch.float32).view(2, 3, 4),
    "a.half": torch.tensor([0.5, -2.0], dtype=torch.float16),
    "b.count": torch.tensor(7),
    "view": torch.arange(12.0).view(3, 4).t(),  # a view of a storage, not contiguous
}
CALLED = []


def _mark(text):
    CALLED.append(text)


class Evil:
    """Unpickled, it would call ``function`` with ``arguments``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _numpy():
    return {name: np.array(tensor.numpy(), order="C") for name, tensor in WANTED.items()}


def _write(kind, path, extra=None):
    """``WANTED`` in a container of ``kind``; ``extra`` is one more thing that stands in it."""
    more = {} if extra is None else {"extra": extra}
    if kind == "zip":
        torch.save({"meta": more, "state_dict": OrderedDict(WANTED)}, path)
    elif kind == "legacy":
        torch.save({**WANTED, **more}, path, _use_new_zipfile_serialization=False)
    elif kind == "parameters":
        torch.save({name: torch.nn.Parameter(t, False) for name, t in WANTED.items()} | more, path)
    elif kind.startswith("pickle"):
        content = {"model": _numpy(), "__author__": "someone", **more}
        path.write_bytes(pickle.dumps(content, protocol=int(kind[-1])))
    elif kind == "pdparams":
        pairs = {name: (f"parameter_{name}", array) for name, array in _numpy().items()}
        path.write_bytes(pickle.dumps({**pairs, "StructuredToParameterName@@": {"a.weight": "w"}, **more}, protocol=2))


@pytest.mark.parametrize("kind", ["zip", "legacy", "parameters", "pickle2", "pickle4", "pickle5", "pdparams"])
def test_containers_give_the_same_tensors(kind, tmp_path):
    _write(kind, tmp_path / "weights")
    found = read(tmp_path / "weights").tensors
    assert found.keys() == WANTED.keys()
    for name, tensor in WANTED.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name


def test_folders_of_the_hub(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    parts = {"one.safetensors": ["a.weight", "a.half"], "two.safetensors": ["b.count", "view"]}
    for file, names in parts.items():
        save_file({name: WANTED[name].contiguous() for name in names}, tmp_path / file)
    index = {"weight_map": {name: file for file, names in parts.items() for name in names}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text('{"model_type": "upernet"}')
    source = read(tmp_path)
    assert all(torch.equal(source.tensors[name], tensor) for name, tensor in WANTED.items())
    assert source.rest == {"config.json": {"model_type": "upernet"}}
    index["weight_map"]["view"] = "../two.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConversionError, match="weight_map"):
        read(tmp_path)


def test_what_mmengine_saves_beside_the_weights(tmp_path, monkeypatch):
    module = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __getstate__(self):
            return {"numbers": np.arange(3.0), "methods": {"mean": HistoryBuffer.mean}, "last": np.float64(2)}

        def mean(self):
            pass

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    HistoryBuffer.mean.__module__, HistoryBuffer.mean.__qualname__ = module.__name__, "HistoryBuffer.mean"
    module.HistoryBuffer = HistoryBuffer
    for name in ("mmengine", "mmengine.logging", module.__name__):
        monkeypatch.setitem(sys.modules, name, module if name == module.__name__ else types.ModuleType(name))
    torch.save({"state_dict": WANTED, "message_hub": {"loss": HistoryBuffer()}, "lr": np.float32(0.5)}, tmp_path / "a")
    source = read(tmp_path / "a")
    assert source.tensors.keys() == WANTED.keys() and source.rest["lr"] == 0.5


@pytest.mark.bad_input
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle2", "pickle4", "pdparams"])
@pytest.mark.parametrize(
    "evil, name",
    [
        (Evil(os.system, "true"), "posix.system"),
        (Evil(_mark, "called"), "_mark"),
        (Evil(eval, "CALLED.append(1)"), "builtins.eval"),
        (Evil(getattr, os, "system"), None),
        (Evil(np.load, "x"), "numpy.load"),
    ],
)
def test_what_a_file_wants_to_call_is_named_and_not_called(kind, evil, name, tmp_path):
    if name is None:  # a module cannot be pickled; what getattr is asked of can
        evil, name = Evil(getattr, OrderedDict, "fromkeys"), "builtins.getattr"
    _write(kind, tmp_path / "weights", evil)
    with pytest.raises(ConversionError, match=rf"weights is refused: it asks for .*{name}") as error:
        read(tmp_path / "weights")
    assert not CALLED and "\n" not in str(error.value)


@pytest.mark.bad_input
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle2", "pickle4", "pdparams"])
def test_truncated_files(kind, tmp_path):
    _write(kind, tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    for length in (3, 30, len(data) // 2, len(data) - 7):
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(ConversionError) as error:
            read(tmp_path / "cut")
        assert "cut" in str(error.value) and "\n" not in str(error.value)


def _zip_with(compression):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    return file.getvalue()


def _storage(count):
    """A legacy file whose storage claims ``count`` numbers."""
    file = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, file, _use_new_zipfile_serialization=False)
    return file.getvalue().replace(b"K\x02N", b"J" + struct.pack("<i", count) + b"N")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"hello, world", "no file of weights"),
        (pickle.dumps([1, 2]), "holds a list"),
        (pickle.dumps({"a": 1}), "no tensors by name"),
        (b"\x80\x02}r\xff\xff\xff\x7f.", "memo"),  # two gigabytes of memo
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b".", "truncated"),
        (struct.pack("<Q", 2**50) + b"{}", "header"),
        (struct.pack("<Q", 20) + b'{"a":{"dtype":"F32" ', "damaged"),
        (_zip_with(zipfile.ZIP_DEFLATED), "compressed"),
        (_zip_with(zipfile.ZIP_STORED), "no tensors by name"),
        (_storage(2**30), "larger than the file"),
    ],
)
def test_foreign_and_hostile_files(data, message, tmp_path):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ConversionError, match=message) as error:
        read(tmp_path / "file")
    assert "\n" not in str(error.value)


@pytest.mark.bad_input
def test_a_zip_around_the_weights_names_them(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("encnet.pth", b"")
    with pytest.raises(ConversionError, match="unpack it, and convert encnet.pth"):
        read(tmp_path / "a.zip")
    with pytest.raises(ConversionError, match="cannot be read"):
        read(tmp_path / "nowhere.pth")
