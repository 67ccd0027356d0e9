"""Checkpoints: what is refused and how, and that the previous one survives whatever happens during a save."""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rendseg.engine import checkpoint as module
from rendseg.engine.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_weights,
    newest_usable,
    save_checkpoint,
    write_json,
)
from rendseg.engine.config import ConfigError
from rendseg.engine.train import Run, train
from tests.engine.tiny import tiny_config


def contents(value: float = 1.0, size: int = 4) -> dict[str, Any]:
    return {
        "config": {"name": "x"},
        "classes": {"names": ["a"], "palette": [[0, 0, 0]], "ignore_index": 255},
        "model": {"weight": torch.full((size,), value)},
        "training": {"progress": {"iteration": 3}},
    }


class Gone:
    """Marks an entry that is taken out."""


NAN, INF = float("nan"), float("inf")
WEIGHT = "model|first"
STATE = "training|optimizer|state|0"
# Where in a checkpoint, what is put there, and what the message must name (by default the last part of where).
MUTATIONS: list[tuple[str, Any, str]] = [
    *((key, Gone, "") for key in ("config", "classes", "model", "training")),
    *((key, wrong, "") for key in ("config", "classes", "model", "training") for wrong in (None, [1], 3)),
    ("rendseg", 3, ""),
    ("config|train", Gone, ""),
    ("config|train", [], ""),
    ("config|train|batch_size", "many", ""),
    ("config|model", None, ""),
    ("config|model|decoder", 3, ""),
    ("config|name", "..", ""),
    ("classes|names", Gone, ""),
    ("classes|names", [], ""),
    ("classes|names", [1, 2], ""),
    ("classes|names", ["one"], "palette has"),
    ("classes|palette", [[0, 0]], ""),
    ("classes|palette", [[0, 0, 999]], ""),
    ("classes|palette", "blue", ""),
    ("classes|ignore_index", "none", ""),
    ("classes|ignore_index", 1.5, ""),
    ("classes|ignore_index", True, ""),
    (WEIGHT, Gone, ""),
    (WEIGHT, 3, ""),
    (WEIGHT, lambda w: w * NAN, ""),
    (WEIGHT, lambda w: w - INF, ""),
    (WEIGHT, lambda w: w.to(torch.complex64), ""),
    (WEIGHT, lambda w: w.long(), ""),
    (WEIGHT, lambda w: w[:1], ""),
    (WEIGHT, lambda w: w.to_sparse(), ""),
    ("model|extra", torch.zeros(1), ""),
    ("training|progress", Gone, ""),
    ("training|progress", 3, ""),
    ("training|progress|iteration", Gone, ""),
    ("training|progress|iteration", -1, ""),
    ("training|progress|iteration", 10**9, ""),
    ("training|progress|iteration", 1.0, ""),
    ("training|progress|iteration", "1", ""),
    ("training|progress|samples", 0, ""),
    ("training|progress|samples", None, ""),
    ("training|progress|seconds", NAN, ""),
    ("training|progress|seconds", -1.0, ""),
    ("training|progress|best", "good", ""),
    ("training|progress|best", INF, ""),
    ("training|progress|history", {}, ""),
    ("training|progress|history", [1], ""),
    ("training|progress|history", [{"iteration": 10**9}], ""),
    ("training|progress|evaluations", [{}], ""),
    ("training|progress|window", {"loss": NAN}, ""),
    ("training|progress|window", [], ""),
    ("training|progress|window_size", 7, ""),
    ("training|progress|more", 7, ""),
    ("training|optimizer", Gone, ""),
    ("training|optimizer", [], ""),
    ("training|optimizer|state", [], ""),
    ("training|optimizer|state", {"0": {}}, ""),
    ("training|optimizer|state", {10**6: {}}, "optimizer state of another model"),
    (STATE, 3, "optimizer.state.0"),
    (f"{STATE}|momentum_buffer", lambda m: m * NAN, ""),
    (f"{STATE}|momentum_buffer", lambda m: m.to(torch.complex64), ""),
    (f"{STATE}|momentum_buffer", lambda m: m[:1], "optimizer.state.0"),
    (f"{STATE}|momentum_buffer", "fast", ""),
    ("training|optimizer|param_groups", {}, ""),
    ("training|optimizer|param_groups", [], "optimizer state of another model"),
    ("training|optimizer|param_groups", [{}], ""),
    ("training|optimizer|param_groups", [{"params": ["a"]}], ""),
    ("training|scaler", 3, ""),
    ("training|scaler", {"scale": NAN}, ""),
    ("training|rng", Gone, ""),
    ("training|rng", [], ""),
    ("training|rng", None, ""),
    ("training|rng", [3], ""),
    ("training|rng|0|python", [3, torch.zeros(5), None], ""),
    ("training|rng|0|numpy", ["MT19937", torch.zeros(2).long(), 0, 0, 0.0], ""),
    ("training|rng|0|torch", torch.zeros(3, dtype=torch.uint8), ""),
    ("training|rng|0|torch", lambda state: state.float(), ""),
    ("training|rng|0|cuda", 3, ""),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(tmp_path_factory.mktemp("checkpoint"), "eval.pictures=0", "train.iterations=1")
    train(config)
    return config.run_dir / "last.pt"


@pytest.mark.bad_input
def test_no_mutation_is_continued(trained: Path, tmp_path: Path) -> None:
    """Each is refused on one line that names the file and the field."""
    path = tmp_path / "mutated.pt"
    config = tiny_config(tmp_path, f"resume={path}", "eval.pictures=0", "train.iterations=1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "validate", lambda _: pytest.fail("it was accepted"))
        for where, wrong, named in MUTATIONS:
            whole = torch.load(trained, weights_only=True)
            *parents, last = where.split("|")
            holder: Any = whole
            for parent in parents:
                holder = holder[int(parent) if parent.isdigit() else parent]
            last = next(iter(holder)) if where == WEIGHT else last
            if wrong is Gone:
                del holder[last]
            else:
                key = int(last) if last.isdigit() else last
                holder[key] = wrong(holder[key]) if callable(wrong) else wrong
            torch.save(whole, path)
            with pytest.raises((CheckpointError, ConfigError)) as error:
                train(config)
            message = str(error.value)
            assert "\n" not in message and str(path) in message and (named or last) in message, (where, wrong, message)


@pytest.mark.bad_input
def test_a_flipped_bit_is_noticed(trained: Path, tmp_path: Path) -> None:
    """In every part of the archive: weights, the pickled structure, and what else torch.save writes."""
    path, whole = tmp_path / "flipped.pt", trained.read_bytes()
    with zipfile.ZipFile(trained) as archive:
        parts = [(info.filename, info.header_offset, info.file_size) for info in archive.infolist() if info.file_size]
    for name, offset, size in parts[:3] + parts[-3:]:
        name_length, extra_length = struct.unpack("<HH", whole[offset + 26 : offset + 30])
        damaged = bytearray(whole)
        damaged[offset + 30 + name_length + extra_length + size // 2] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"damaged: the checksum of its part {name} is wrong"):
            load_checkpoint(path)


def value(path: Path) -> float:
    return float(load_checkpoint(path)["model"]["weight"][0])


def test_round_trip_and_aliases(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last.pt", contents(1.0), ("best.pt", "iteration_0000001.pt"))
    save_checkpoint(tmp_path / "last.pt", contents(2.0), ("iteration_0000002.pt",))
    assert value(tmp_path / "last.pt") == 2.0
    assert value(tmp_path / "best.pt") == 1.0
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best.pt",
        "iteration_0000001.pt",
        "iteration_0000002.pt",
        "last.pt",
    ]


def test_copies_where_links_are_not_supported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", no_links)
    save_checkpoint(tmp_path / "last.pt", contents(), ("best.pt",))
    assert value(tmp_path / "best.pt") == 1.0


@pytest.mark.parametrize("cause", ["replace", "save"])
def test_a_failure_during_a_save_leaves_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, contents(1.0))

    def die(*args: Any) -> None:
        if cause == "save":
            args[1].write(b"PK\x03\x04 the first part of a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((os, "replace") if cause == "replace" else (module.torch, "save")), die)
    with pytest.raises(CheckpointError, match="No space left on device.*previous checkpoint is kept"):
        save_checkpoint(path, contents(2.0))
    monkeypatch.undo()
    assert value(path) == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_full_disk(tmp_path: Path) -> None:
    """A real failed write: the kernel refuses to let any file grow beyond 100 kB."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, contents(1.0))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match="previous checkpoint is kept"):
            save_checkpoint(path, contents(2.0, size=1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert value(path) == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last.pt", contents(1.0))
    with pytest.raises(CheckpointError, match="weight holds NaN"):
        save_checkpoint(tmp_path / "last.pt", contents(float("nan")))
    assert value(tmp_path / "last.pt") == 1.0


@pytest.mark.bad_input
def test_truncated_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, contents(size=1000))
    whole = path.read_bytes()
    for length in (5, 100, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            load_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="empty"):
        load_checkpoint(path)


class Malicious:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("executed",))


@pytest.mark.bad_input
def test_nothing_in_the_file_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({**contents(), "format": module.FORMAT, "version": 1, "extra": Malicious()}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match="more than tensors and plain values"):
        load_checkpoint(tmp_path / "bad.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(CheckpointError, match="not a rendseg checkpoint"):
        load_checkpoint(tmp_path / "raw.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.bad_input
def test_not_a_rendseg_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    for other in ({"state_dict": {}}, [1, 2], torch.zeros(3)):
        torch.save(other, path)
        with pytest.raises(CheckpointError, match="not a rendseg checkpoint"):
            load_checkpoint(path)
    path.write_text("a text")
    with pytest.raises(CheckpointError, match="not a rendseg checkpoint"):
        load_checkpoint(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    torch.save({**contents(), "format": module.FORMAT, "version": 99}, path)
    with pytest.raises(CheckpointError, match="layout 99"):
        load_checkpoint(path)
    torch.save({"format": module.FORMAT, "version": module.VERSION, "config": {}}, path)
    with pytest.raises(CheckpointError, match="it has no classes"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "nowhere.pt")
    with pytest.raises(CheckpointError, match="it is a folder"):
        load_checkpoint(tmp_path)


@pytest.mark.bad_input
def test_another_model_names_the_first_difference() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = state["0.weight"].clone()
    load_weights(model, state, "x.pt")
    with pytest.raises(
        CheckpointError, match=r"x\.pt is a checkpoint of another model: 1 entries are missing, first 1\.bias"
    ):
        load_weights(model, {k: v + 1 for k, v in state.items() if k != "1.bias"}, "x.pt")
    with pytest.raises(CheckpointError, match=r"1 are unexpected, first extra"):
        load_weights(model, {**state, "extra": torch.zeros(1)}, "x.pt")
    with pytest.raises(
        CheckpointError, match=r"1 differ in shape, first 0\.bias: \[5\] in the file, \[3\] in the model"
    ):
        load_weights(model, {**state, "0.weight": before + 1, "0.bias": torch.zeros(5)}, "x.pt")
    assert torch.equal(model[0].weight, before)  # nothing was loaded


def test_newest_usable_falls_back(tmp_path: Path) -> None:
    assert newest_usable(tmp_path) is None
    save_checkpoint(tmp_path / "last.pt", contents(1.0), ("iteration_0000001.pt",))
    save_checkpoint(tmp_path / "last.pt", contents(2.0), ("iteration_0000002.pt",))
    (tmp_path / "last.pt").unlink()
    (tmp_path / "last.pt").write_bytes(b"PK\x03\x04")
    found = newest_usable(tmp_path)
    assert found is not None and found[0].name == "iteration_0000002.pt"
    for path in tmp_path.iterdir():
        path.unlink()
        path.write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match="last.pt is truncated"):
        newest_usable(tmp_path)


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "m.json", {"a": float("nan"), "b": [1.5, float("inf"), None], "c": {3: "x"}})
    assert json.loads((tmp_path / "m.json").read_text()) == {"a": None, "b": [1.5, None, None], "c": {"3": "x"}}


def test_a_network_of_before_the_switches_keeps_what_it_computes(tmp_path: Path) -> None:
    """Its configuration names presets that now say otherwise."""
    old = {"backbone": {"name": "swin_tiny_patch4_window7_224"}, "decoder": {"name": "upernet", "preset": "mmseg"}}
    fpn = {"decoder": {"name": "semantic_fpn"}, "pointrend": {"preset": "paddleseg"}}
    new = {"pad": 32, "decoder": {"name": "semantic_fpn"}}
    found = []
    for model in (old, fpn, new):
        save_checkpoint(tmp_path / "x.pt", {**contents(), "config": {"model": model}})
        found.append(load_checkpoint(tmp_path / "x.pt")["config"]["model"])
    switches = dict.fromkeys(("output_norm", "pad_before_shift", "stride_in_1x1"), False)
    assert found[0] == {**old, "pad": "stride", "backbone": {**old["backbone"], **switches}}
    assert found[1] == {**fpn, "pad": "stride", "decoder": {"name": "semantic_fpn", "output_last": True}}
    assert found[2] == new
