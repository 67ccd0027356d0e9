"""The command line: train, eval, predict end to end; every kind of bad input ends with one line and code 2."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from rendseg.cli import main
from tests import fresh
from tests.engine.tiny import tiny_content

REPO = Path(__file__).resolve().parents[1]


def write_config(folder: Path, **changes: Any) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**tiny_content(folder / "runs", iterations=2), **changes}))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    assert main(["train", str(write_config(folder)), "train.log_every=1"]) == 0
    return folder / "runs" / "tiny"


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rendseg: ")]
    assert len(lines) == 1
    return lines[0]


def test_train_then_eval(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(json.loads((trained / "metrics.json").read_text())["history"]) == 2
    assert main(["eval", str(trained / "last.pt"), "eval.limit=2", "--out", str(trained / "out")]) == 0
    out = capsys.readouterr().out
    assert "coarse" in out and "refined" in out and "2 images" in out
    assert json.loads((trained / "out" / "metrics.json").read_text())["images"] == 2


def test_predict(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, odd, bad, cut = (tmp_path / name for name in ("a.png", "b.jpg", "c.png", "d.png"))
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(good)
    Image.fromarray(rng.integers(0, 256, (33, 47), dtype=np.uint8)).save(odd)
    bad.write_text("no picture")
    cut.write_bytes(good.read_bytes()[:300])
    out = tmp_path / "out"
    images = [str(p) for p in (bad, good, tmp_path / "missing.png", cut, odd)]
    assert main(["predict", str(trained / "last.pt"), *images, "--out", str(out)]) == 3
    errors = capsys.readouterr().err
    assert all(f"{p}" in errors for p in (bad, cut, tmp_path / "missing.png"))
    assert "3 of 5 images or folders could not be predicted" in errors
    assert sorted(p.name for p in out.iterdir()) == [
        f"{name}_{kind}.png" for name in "ab" for kind in ("labels", "overlay", "side_by_side")
    ]
    labels = np.asarray(Image.open(out / "b_labels.png"))
    assert labels.shape == (33, 47) and labels.max() < 8
    assert Image.open(out / "a_overlay.png").size == (50, 40)
    assert main(["predict", str(trained / "last.pt"), str(good), "--out", str(out)]) == 0


def test_images_of_one_name_do_not_overwrite_each_other(trained: Path, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / folder / "a.png")
    out = tmp_path / "out"
    assert (
        main(
            ["predict", str(trained / "last.pt"), str(tmp_path / "one"), str(tmp_path / "two/a.png"), "--out", str(out)]
        )
        == 0
    )
    assert {p.name for p in out.glob("*_labels.png")} == {"a_labels.png", "a_2_labels.png"}


def folder_data(root: Path, label: np.ndarray | None = None, image: bytes | None = None) -> dict[str, Any]:
    """A data set of the folder layout with one good training image and one that the arguments spoil."""
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for name in ("good", "spoilt"):
            Image.fromarray(np.full((32, 32, 3), 99, np.uint8)).save(root / "images" / split / f"{name}.png")
            Image.fromarray(np.zeros((32, 32), np.uint8)).save(root / "labels" / split / f"{name}.png")
    if label is not None:
        Image.fromarray(label).save(root / "labels/train/spoilt.png")
    if image is not None:
        path = root / "images/train/spoilt.png"
        path.write_bytes(path.read_bytes()[: len(image)] if image == b"?" * len(image) else image)
    return {"name": "folder", "root": str(root), "classes": 3, "crop_size": [32, 32]}


BAD_DATA = {
    "label outside the classes": (dict(label=np.full((32, 32), 77, np.uint8)), ["spoilt.png", "77"]),
    "image and label of different size": (dict(label=np.zeros((16, 32), np.uint8)), ["spoilt.png", "32x16"]),
    "unreadable image": (dict(image=b"text"), ["spoilt.png", "cannot be read"]),
    "truncated image": (dict(image=b"?" * 70), ["spoilt.png", "cannot be read"]),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str, workers: int) -> None:
    spoil, words = BAD_DATA[case]
    config = write_config(tmp_path, data=folder_data(tmp_path / "data", **spoil))
    assert main(["train", str(config), f"train.num_workers={workers}"]) == 2
    line = one_line(capsys)
    assert all(word in line for word in words), line


@pytest.mark.bad_input
def test_bad_input(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(write_config(tmp_path))
    text = tmp_path / "text.pt"
    text.write_text("hello")
    cut = tmp_path / "cut.pt"
    cut.write_bytes((trained / "last.pt").read_bytes()[:5000])
    for arguments, words in (
        (["train", str(tmp_path / "nowhere.yaml")], "no configuration file"),
        (["train", config, "train.iteration=3"], "'train.iterations'"),
        (["train", config, "model.backbone.nam=x"], "name"),
        (["train", config, f"data={{name: camvid, root: {tmp_path / 'nowhere'}}}"], "no such folder"),
        (["train", config, "model.backbone.name=resnet1800"], "resnet1800"),
        (["train", config, f"resume={text}"], "not a rendseg checkpoint"),
        (["train", config, f"resume={trained / 'last.pt'}", "model.decoder.channels=8"], "another model"),
        (["eval", str(tmp_path / "nowhere.pt")], "there is no checkpoint"),
        (["eval", str(text)], "not a rendseg checkpoint"),
        (["eval", str(cut)], "truncated"),
        (["eval", str(trained / "last.pt"), "model.decoder.channels=8"], "another model"),
        (["predict", str(text), "x.png", "--out", str(tmp_path)], "not a rendseg checkpoint"),
    ):
        assert main(arguments) == 2, arguments
        assert words in one_line(capsys), arguments
    assert main(["predict", str(trained / "last.pt"), "x.png"]) == 2  # no --out
    assert main(["trian"]) == 2


@pytest.mark.bad_input
def test_an_error_inside_a_step_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(write_config(tmp_path)), "train.batch_size=1", "train.iterations=1"]) == 2
    line = one_line(capsys)
    assert "a batch norm cannot train on a single value per channel: set train.batch_size=2 or more" in line


def test_debug_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rendseg.engine.config import ConfigError

    monkeypatch.setenv("RENDSEG_DEBUG", "1")
    with pytest.raises(ConfigError):
        main(["train", str(tmp_path / "nowhere.yaml")])


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("train", "eval", "predict", "doctor"))
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("rendseg 0.")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n in ("timm", "yaml") else find(n, *a))
    assert main(["train", "x.yaml"]) == 2
    error = capsys.readouterr().err
    assert "pyyaml, timm" in error and "pip install 'rendseg[train]'" in error


def test_doctor_imports_no_package_of_the_trainer() -> None:
    script = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in 'typer pydantic yaml timm accelerate torchvision tqdm'.split():\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from rendseg.cli import main\n"
        "sys.exit(main(['doctor']))\n"
    )
    process = fresh.run(script, dict(os.environ), REPO)
    assert process.returncode == 0, process.stderr
    assert "torch" in process.stdout
