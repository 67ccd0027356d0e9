"""``rendseg predict`` and ``eval`` on the files, names and consoles of others, with a network for grey images."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from rendseg.cli import main
from rendseg.engine.predict import file_stem
from tests.engine.tiny import tiny_content

ODD = os.fsdecode(b"\xff\xe9 \xc3\xa4")  # bytes that are no text, and an umlaut
KINDS = ("labels", "overlay", "side_by_side")


def grey(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32), np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for grey images whose label maps hold 7 and 300 for two classes; one name is of any bytes."""
    root = tmp_path_factory.mktemp("grey")
    for split, name in (("train", "a"), ("train", "b"), ("val", ODD), ("val", "c"), ("val", "d")):
        grey(root / "images" / split / f"{name}.png", len(name))
        (root / "labels" / split).mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(len(name)).choice(np.array([7, 300], np.uint16), (32, 32))
        Image.fromarray(values).save(root / "labels" / split / f"{name}.png")
    content = tiny_content(root / "runs", iterations=1)
    content["model"]["backbone"]["in_chans"], content["eval"]["pictures"] = 1, 3
    content["data"] = {"name": "folder", "root": str(root), "class_map": {7: 0, 300: 1}, "crop_size": [32, 32]}
    (root / "grey.yaml").write_text(yaml.safe_dump(content))
    assert main(["train", str(root / "grey.yaml")]) == 0
    return root / "runs" / "tiny" / "last.pt"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_training_on_grey_images(trained: Path) -> None:
    assert (trained.parent / "pictures" / f"val_{ODD}.png").is_file()
    config = yaml.safe_load((trained.parent / "config.yaml").read_text())
    assert config["data"]["channels"] == config["model"]["backbone"]["in_chans"] == 1
    assert config["data"]["mean"] == [0.449]


@pytest.mark.bad_input
@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
def test_names_and_consoles(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    paths = [grey(tmp_path / "in" / f"{name}.png") for name in (ODD, "n" * 240, "\N{GREEK SMALL LETTER ALPHA}")]
    (tmp_path / "in" / "bad.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    images = [str(tmp_path / "empty"), str(tmp_path / "in")]
    assert main(["predict", str(trained), *images, "--out", str(tmp_path / "out")]) == 3
    told = []
    for stream in streams:
        stream.flush()
        told.append(stream.buffer.getvalue().decode(encoding))  # type: ignore[attr-defined]
    stems = {file_stem(path.stem) for path in paths}
    assert names(tmp_path / "out") == {f"{stem}_{kind}.png" for stem in stems for kind in KINDS}
    assert "\\udcff\\udce9" in told[0] and "bad.png" in told[1] and "2 of 5 images" in told[1]
    assert "empty: holds no images" in told[1]


def test_long_names_stay_apart() -> None:
    long = ["x" * 240 + end for end in "ab"]
    assert file_stem("short") == "short" and file_stem(long[0]) != file_stem(long[1])
    assert all(len(os.fsencode(file_stem(name))) <= 200 for name in (*long, "\N{GREEK SMALL LETTER ALPHA}" * 120))


def test_results_in_the_folder_of_the_images_are_no_input(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grey(tmp_path / "a.png")
    own = grey(tmp_path / "a_labels.png").read_bytes()  # the user's, in spite of its name
    arguments = ["predict", str(trained), str(tmp_path), "--out", str(tmp_path)]
    assert main(arguments) == 0
    first = names(tmp_path)
    assert {"a_2_labels.png", "a_labels_labels.png"} < first and len(first) == 8
    assert main(arguments) == 0
    assert names(tmp_path) == first and "not predicted: 6 files" in capsys.readouterr().out
    assert (tmp_path / "a_labels.png").read_bytes() == own


@pytest.mark.bad_input
def test_a_result_that_cannot_be_written_ends_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        grey(tmp_path / "in" / f"{name}.png")
    (tmp_path / "out" / "a_labels.png").mkdir(parents=True)
    assert main(["predict", str(trained), str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 3
    assert "could not write" in capsys.readouterr().err and f"b_{KINDS[2]}.png" in names(tmp_path / "out")
    (tmp_path / "file").touch()
    assert main(["predict", str(trained), str(tmp_path / "in"), "--out", str(tmp_path / "file" / "x")]) == 2
    assert "choose another --out" in capsys.readouterr().err
    (tmp_path / "in" / "a.png").unlink()
    (tmp_path / "in" / "b.png").write_bytes(b"no image")
    assert main(["predict", str(trained), str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 2


def test_label_maps_in_the_values_of_the_data_set(trained: Path, tmp_path: Path) -> None:
    path = grey(tmp_path / "a.png")
    found = []
    for labels in ("classes", "dataset"):
        out = tmp_path / labels
        assert main(["predict", str(trained), str(path), "--out", str(out), "--labels", labels]) == 0
        found.append(np.array(Image.open(out / "a_labels.png")))
    assert found[0].dtype == np.uint8 and set(np.unique(found[0])) <= {0, 1}
    assert np.array_equal(np.array([7, 300])[found[0]], found[1])


@pytest.mark.bad_input
def test_eval_without_the_images_that_cannot_be_read(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    val = trained.parents[2] / "images" / "val"
    sound = (val / "c.png").read_bytes()
    (val / "c.png").write_bytes(b"no image")
    out = tmp_path / "out"
    try:
        assert main(["eval", str(trained), "--out", str(out), "--labels", "dataset"]) == 3
        told = capsys.readouterr().err
        assert "val/c.png: image cannot be read" in told and "1 of 3 images could not be read" in told
    finally:
        (val / "c.png").write_bytes(sound)
    with open(out / "images.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["index"], row["name"]) for row in rows] == [("1", "val_d"), ("2", "val_\\udcff\\udce9 \xe4")]
    report = json.loads((out / "metrics.json").read_text())
    assert report["images"] == 2 and len(report["left_out"]) == 1 and report["confusion_sum"]["refined"] == 2 * 32 * 32
    assert names(out / "labels") == {"val_d.png", f"val_{ODD}.png"} and "worst.png" in names(out)
    assert set(np.unique(np.array(Image.open(out / "labels" / "val_d.png")))) <= {7, 300}


def test_predict_turns_images_by_their_tag(trained: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    pixels = np.random.default_rng(3).integers(0, 256, (32, 48), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "tag.png", exif=exif)
    Image.fromarray(np.ascontiguousarray(np.rot90(pixels, -1))).save(tmp_path / "turned.png")
    assert main(["predict", str(trained), str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    labels = [np.array(Image.open(tmp_path / "out" / f"{name}_labels.png")) for name in ("tag", "turned")]
    assert labels[0].shape == (48, 32) and np.array_equal(*labels)
