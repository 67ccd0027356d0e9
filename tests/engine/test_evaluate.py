"""Evaluation: the numbers against direct computation, sizes, limits, and the table."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rendseg.data import DataError
from rendseg.engine.config import ConfigError, EvalConfig
from rendseg.engine.evaluate import evaluate, evaluate_checkpoint, format_table, summary
from rendseg.engine.train import make_accelerator, train
from tests.engine.tiny import tiny_config


class Data:
    """Label maps of several sizes; the image holds the class in its first channel."""

    num_classes, class_names, ignore_index = 3, ["sky", "road", "car"], 255

    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = [torch.randint(0, 2, size, generator=generator) for size in sizes]
        for label in self.labels:
            label[0, 0] = 255

    def __len__(self) -> int:
        return len(self.labels)

    def sample(self, index: int, epoch: int) -> dict[str, Any]:
        label = self.labels[index]
        image = torch.zeros(3, *label.shape)
        image[0] = label.where(label != 255, torch.zeros_like(label))
        return {"image": image, "label": label, "name": str(index)}


class Network(nn.Module):
    """Refined: every pixel right. Coarse: what a map of half the size, upsampled bilinearly, gives."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def predict(self, images: Tensor, output: str) -> SimpleNamespace:
        assert output == "labels" and not self.training
        self.batches.append(len(images))
        logits = F.one_hot(images[:, 0].long(), 3).permute(0, 3, 1, 2).float()
        return SimpleNamespace(coarse=logits[:, :, ::2, ::2], labels=logits.argmax(1).to(torch.uint8))

    def upsample(self, coarse: Tensor, size: Any) -> Tensor:
        return F.interpolate(coarse, size=tuple(size), mode="bilinear")


def test_numbers(tmp_path: Path) -> None:
    data, network = Data([(8, 10), (8, 10), (6, 6), (8, 10)]), Network()
    accelerator = make_accelerator(tiny_config(tmp_path))
    result = evaluate(network, data, EvalConfig(batch_size=4, num_workers=0), accelerator)
    assert result is not None
    assert network.batches == [2, 1, 1]  # consecutive images of one size together
    assert result["refined"]["miou"] == 1.0 and result["refined"]["pixel_accuracy"] == 1.0
    assert result["refined"]["per_class_iou"] == {"sky": 1.0, "road": 1.0, "car": None}  # car is absent: left out
    right = total = 0
    for label in data.labels:
        valid = label != 255
        logits = F.one_hot(label.where(valid, torch.zeros_like(label)), 3).permute(2, 0, 1).float()[None, :, ::2, ::2]
        coarse = F.interpolate(logits, size=tuple(label.shape), mode="bilinear").argmax(1)[0]
        right += int((coarse == label)[valid].sum())
        total += int(valid.sum())
    assert result["coarse"]["pixel_accuracy"] == pytest.approx(right / total)
    assert result["images"] == 4

    table = format_table(result).splitlines()
    assert "boundary IoU" in table[0] and table[1].startswith("4 images, %")
    mean = next(line for line in table if line.startswith("mean")).split()
    assert mean[2] == "100.00" and mean[1] == f"{100 * result['coarse']['miou']:.2f}"
    assert next(line for line in table if line.startswith("car")).split()[1:] == ["-"] * 9
    assert "mIoU" in summary(result) and "-> 100.00" in summary(result)


def test_limit_stop_and_no_images(tmp_path: Path) -> None:
    accelerator = make_accelerator(tiny_config(tmp_path))
    data, network = Data([(8, 10)] * 5), Network()
    result = evaluate(network, data, EvalConfig(limit=2, num_workers=0), accelerator)
    assert result is not None and result["images"] == 2 and network.batches == [1, 1]
    assert evaluate(network, data, EvalConfig(num_workers=0), accelerator, stop=lambda: True) is None
    with pytest.raises(DataError, match="no images"):
        evaluate(network, Data([]), EvalConfig(num_workers=0), accelerator)


def test_a_checkpoint_evaluates_to_what_training_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path, iterations=2)
    trained = train(config)
    last = config.run_dir / "last.pt"
    result = evaluate_checkpoint(last)
    for kind in ("coarse", "refined"):
        assert result[kind] == trained["final"][kind]
    written = json.loads((config.run_dir / "last_eval" / "metrics.json").read_text())
    assert written["refined"] == result["refined"] and written["iteration"] == 2
    assert "pixel accuracy" in capsys.readouterr().out
    assert evaluate_checkpoint(last, ["eval.limit=1"], tmp_path / "other")["images"] == 1
    assert (tmp_path / "other" / "metrics.json").is_file()
    with pytest.raises(ConfigError, match="trained on 8 classes, the data at hand has 2"):
        images = tmp_path / "data"
        for folder in ("images/val", "labels/val", "images/train", "labels/train"):
            (images / folder).mkdir(parents=True)
            write_png(images / folder / "a.png")
        evaluate_checkpoint(last, [f"data={{name: folder, root: {images}, classes: 2}}"])


def write_png(path: Path) -> None:
    import numpy as np
    from PIL import Image

    Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
