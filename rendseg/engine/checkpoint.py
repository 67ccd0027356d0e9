"""Checkpoints: written so that a kill or a full disk at any moment leaves the previous one usable, read without
executing anything they hold, and refused with a plain reason when they are not what they should be.

A checkpoint is one dictionary of tensors, numbers, strings and containers of these:

=============== =======================================================================================
``format``      ``"rendseg-checkpoint"``; ``version`` is the layout's number
``config``      the resolved configuration as a plain dictionary
``classes``     ``{"names", "palette", "ignore_index"}`` of the data it was trained on; of objects ``"ids"`` too, the
                numbers of the classes in detections
``model``       the model's ``state_dict``
``training``    what resuming needs: iteration, optimizer, scaler, RNG states, history
=============== =======================================================================================
"""

from __future__ import annotations

import json
import os
import pickle
import secrets
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from rendseg.engine.checkpoint_check import problem

FORMAT = "rendseg-checkpoint"
VERSION = 1
LAST, BEST = "last.pt", "best.pt"


class CheckpointError(Exception):
    """A checkpoint cannot be written, read or used; the message says which file and why."""


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file beside ``path``, force it to the disk, and only then give it the name ``path``.

    Until the last step ``path`` is untouched, so that a kill or a full disk leaves the previous file whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path.parent)
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _temporary(folder: Path) -> Path:
    """A name that no other writer uses, and that is short for a file of any name."""
    return folder / f".rendseg-{os.getpid()}-{secrets.token_hex(8)}.tmp"


def remove_temporaries(folder: Path) -> None:
    """Remove what writers that were killed left in a folder; nobody else may be writing there."""
    for old in folder.rglob(".rendseg-*.tmp"):
        old.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; not every file system can, and then there is nothing more to do."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def write_json(path: Path, content: object) -> None:
    """Write ``content`` as JSON, atomically; NaN and infinities become null so that any parser can read the file."""
    write_text(path, json.dumps(_without_nan(content), indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` in UTF-8, atomically; ``CheckpointError`` says why if that fails."""
    try:
        write_atomically(path, lambda file: _write_all(file, text.encode()))
    except OSError as error:
        raise CheckpointError(f"could not write {path}: {error.strerror}") from error


def _write_all(file: BinaryIO, content: bytes) -> None:
    file.write(content)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {str(k): _without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    return value


def save_checkpoint(path: Path, contents: Mapping[str, Any], aliases: tuple[str, ...] = ()) -> None:
    """Save ``contents`` as ``path`` and under each further name of ``aliases`` in the same folder, all atomically.

    Raises ``CheckpointError`` when the disk is full or cannot be written, or when a weight is not finite; the files
    that were there before are then unchanged.
    """
    bad = first_non_finite(contents["model"])
    if bad is not None:
        raise CheckpointError(f"not saving {path}: {bad} holds NaN or infinity; the previous checkpoint is kept")
    try:
        write_atomically(path, lambda file: torch.save({"format": FORMAT, "version": VERSION, **contents}, file))
        for alias in aliases:
            _link(path, path.with_name(alias))
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise CheckpointError(f"could not save {path}: {cause}; the previous checkpoint is kept") from error


def _link(source: Path, target: Path) -> None:
    """Give a finished checkpoint a second name without writing it again; copy where links are not supported."""
    temporary = _temporary(target.parent)
    try:
        os.link(source, temporary)
    except OSError:
        write_atomically(target, lambda file: _write_all(file, source.read_bytes()))
        return
    os.replace(temporary, target)
    _sync_folder(target.parent)


def first_non_finite(state: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or an infinity, or None."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return name
    return None


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and validate a checkpoint onto the CPU; nothing in the file is executed (``weights_only=True``).

    Raises ``CheckpointError`` if the file is missing, truncated, damaged or not a rendseg checkpoint, and with the name
    of the field that is not what it must be (``checkpoint_check.py``).
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}" + (": it is a folder" if path.is_dir() else ""))
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not magic:
        raise CheckpointError(f"{path} is empty: a truncated file")
    if magic != b"PK\x03\x04":
        raise CheckpointError(f"{path} is not a rendseg checkpoint: it does not begin like a file of torch.save")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not compare checksums
        if damaged is not None:
            raise CheckpointError(f"{path} is truncated or damaged: the checksum of its part {damaged} is wrong")
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not a rendseg checkpoint: it holds more than tensors and plain values, which is not loaded"
        ) from error
    except Exception as error:  # a damaged file can raise any
        raise CheckpointError(f"{path} is truncated or damaged: {_first_line(error)}") from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise CheckpointError(f'{path} is not a rendseg checkpoint: it has no entry format = "{FORMAT}"')
    if contents.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has checkpoint layout {contents.get('version')}, this version of rendseg reads layout {VERSION}"
        )
    wrong = problem(contents)
    if wrong is not None:
        raise CheckpointError(f"{path} is not a sound rendseg checkpoint: {wrong}")
    _add_switches(contents["config"].get("model"))
    return contents


def _add_switches(model: Any) -> None:
    """To the configuration of a network of before there was ``model.pad``: what it computed without these switches,
    which presets would now set otherwise."""
    if not isinstance(model, dict) or "pad" in model or model.get("name") == "pointrend_rcnn":
        return
    model["pad"] = "stride"
    sections = {
        "backbone": dict.fromkeys(("output_norm", "pad_before_shift", "stride_in_1x1"), False),
        "decoder": {"output_last": True},
    }
    for name, switches in sections.items():
        section = model.get(name)
        if isinstance(section, dict) and (name == "backbone" or section.get("name") == "semantic_fpn"):
            model[name] = {**switches, **section}


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def load_weights(model: nn.Module, state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Load ``state`` into ``model`` if every key and shape agrees; otherwise change nothing and say what differs.

    Raises ``CheckpointError`` naming the first missing, unexpected and differently shaped entries.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [key for key in own if key in state and own[key].shape != state[key].shape]
    problems = []
    if missing:
        problems.append(f"{len(missing)} entries are missing, first {missing[0]}")
    if unexpected:
        problems.append(f"{len(unexpected)} are unexpected, first {unexpected[0]}")
    if shapes:
        key = shapes[0]
        problems.append(
            f"{len(shapes)} differ in shape, first {key}: {list(state[key].shape)} in the file, "
            f"{list(own[key].shape)} in the model"
        )
    if problems:
        raise CheckpointError(f"{path} is a checkpoint of another model: {'; '.join(problems)}")
    for key, value in state.items():
        if value.is_floating_point() != own[key].is_floating_point():
            raise CheckpointError(f"{path}: model.{key} holds {value.dtype}, the model {own[key].dtype}")
    model.load_state_dict(state)


def numbered_checkpoints(folder: Path) -> list[Path]:
    """The ``iteration_*.pt`` files of a run, newest first."""
    return sorted(folder.glob("iteration_*.pt"), reverse=True)


def newest_usable(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run that can be read: ``last.pt``, else the numbered ones; None if there is none.

    Raises ``CheckpointError`` if there are checkpoints and none of them can be read.
    """
    candidates = [path for path in (folder / LAST, *numbered_checkpoints(folder), folder / BEST) if path.is_file()]
    first: CheckpointError | None = None
    for path in candidates:
        try:
            return path, load_checkpoint(path)
        except CheckpointError as error:
            first = first or error
    if first is not None:
        raise first
    return None
