"""Evaluation: the numbers against direct computation, sizes, limits, and the table."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rendseg.data import DataError
from rendseg.engine.assemble import load_trained
from rendseg.engine.config import ConfigError, EvalConfig
from rendseg.engine.evaluate import Details, evaluate, evaluate_checkpoint, format_table, summary
from rendseg.engine.runtime import make_accelerator
from rendseg.engine.train import train
from tests.engine.frameworks import FRAMEWORKS
from tests.engine.tiny import tiny_config
from tests.limits import TIMEOUT

REPO = Path(__file__).resolve().parents[2]


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
    from PIL import Image

    Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)


# ------------------------------------------------------------------------------- windows, scales, flip, conventions


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PointRend with random weights, its two classifiers scaled so that all classes are predicted, on images of odd
    size."""
    from rendseg.data import build_dataset

    config = tiny_config(tmp_path_factory.mktemp("eval"), "data.size=[53, 71]", iterations=1)
    train(config)
    path = config.run_dir / "last.pt"
    _, _, network, _ = load_trained(path)
    images = torch.stack([sample["image"] for sample in build_dataset(config.data, "val")])  # type: ignore[arg-type]
    for name in ("decoder.predictor", "head.predictor"):
        layer, seen = network.get_submodule(name), []
        hook = layer.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append(output))
        network.predict(images, return_points=True)  # type: ignore[operator]
        hook.remove()
        logits = torch.cat([output.flatten(2) for output in seen], 2)
        scale = 2 / logits.std((0, 2))
        with torch.no_grad():
            layer.bias.sub_(logits.mean((0, 2))).mul_(scale)
            layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))
    contents = torch.load(path, weights_only=True)
    torch.save({**contents, "model": network.state_dict()}, path)
    return path


def counted(pairs: list[tuple[np.ndarray, np.ndarray]], classes: int) -> np.ndarray:
    """Confusion matrix, pixel by pixel."""
    matrix = np.zeros((classes, classes), np.int64)
    for label, prediction in pairs:
        np.add.at(matrix, (label[label != 255], prediction[label != 255]), 1)
    return matrix


@pytest.mark.parametrize("windows", [None, ([32, 40], [20, 28])], ids=["whole", "sliding"])
@pytest.mark.parametrize("preset", FRAMEWORKS)
def test_eval_equals_plain_pytorch(checkpoint: Path, tmp_path: Path, preset: str, windows: Any) -> None:
    """`rendseg eval` with flip and three scales: every count of both confusion matrices, and the mIoU by NumPy."""
    scales = [0.5, 1.0, 1.3]
    window, stride = windows or (None, None)
    overrides = [f"eval.preset={preset}", f"eval.scales={scales}", "eval.flip=true", "eval.pictures=0"]
    if window:
        overrides += [f"eval.window={window}", f"eval.window_stride={stride}"]
    result = evaluate_checkpoint(checkpoint, overrides, tmp_path)

    config, classes, network, _ = load_trained(checkpoint)
    from rendseg.data import build_dataset

    dataset = build_dataset(config.data, "val")  # type: ignore[arg-type]

    @torch.no_grad()
    def both(images: Tensor) -> list[Tensor]:
        output: Any = network(images)
        coarse = F.interpolate(output.coarse, scale_factor=4, mode="bilinear", align_corners=False)
        return [coarse[:, :, : images.shape[2], : images.shape[3]], output.refined]

    extra = {}
    if preset == "pytorch_encoding":
        extra["fill"] = [-m / s for m, s in zip(dataset.mean, dataset.std, strict=True)]
    pairs: list[list[tuple[np.ndarray, np.ndarray]]] = [[], []]
    for index in range(len(dataset)):
        sample = dataset[index]
        found = FRAMEWORKS[preset](both, sample["image"][None], scales, True, window, stride, **extra)
        for kind, labels in zip(pairs, found, strict=True):
            kind.append((sample["label"].numpy(), labels.numpy()))
    for kind, stem, some in (("coarse", "confusion_coarse", pairs[0]), ("refined", "confusion", pairs[1])):
        wanted = counted(some, len(classes["names"]))
        written = np.load(tmp_path / f"{stem}.npy")
        assert np.array_equal(written, wanted), (kind, np.abs(written - wanted).sum())
        assert (wanted.sum(0) > 100).sum() >= 4  # one class everywhere would prove little
        rows = list(csv.reader((tmp_path / f"{stem}.csv").open()))
        assert rows[0][1:] == classes["names"] and [[int(v) for v in row[1:]] for row in rows[1:]] == wanted.tolist()
        assert result[kind]["miou"] == pytest.approx(numpy_miou(wanted, preset), abs=1e-12)


def numpy_miou(confusion: np.ndarray, preset: str) -> float:
    hit, truth, guess = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    union = truth + guess - hit
    with np.errstate(invalid="ignore"):
        if preset in ("paddleseg", "pytorch_encoding"):
            return float(np.mean([h / u if u else 0 for h, u in zip(hit, union, strict=True)]))
        if preset == "detectron2":
            return float((hit[truth > 0] / union[truth > 0]).mean())
        return float(np.nanmean(hit / union))


def test_everything_is_written(checkpoint: Path, tmp_path: Path) -> None:
    from PIL import Image

    options = ["eval.scales=[0.5,1]", "eval.window=40", "eval.pictures=2", "train.precision=fp32"]
    result = evaluate_checkpoint(checkpoint, options, tmp_path)
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert {key: report[key] for key in result} == json.loads(json.dumps(result))
    assert report["conventions"]["window"] == [40, 40] and report["conventions"]["window_stride"] == [26, 26]
    assert report["conventions"]["merge"] == "softmax" and report["conventions"]["preset"] == "rendseg"
    assert report["environment"]["processes"] == 1 and report["environment"]["torch"] == torch.__version__
    assert report["ms_per_image"] > 0
    matrix = np.load(tmp_path / "confusion.npy")
    assert report["confusion_sum"]["refined"] == matrix.sum() == report["refined"]["num_pixels"]
    assert report["class_names"] == list(report["refined"]["per_class_iou"])
    images = list(csv.DictReader((tmp_path / "images.csv").open()))
    assert [row["index"] for row in images] == ["0", "1", "2"]
    assert sum(int(row["pixels"]) for row in images) == matrix.sum()
    assert Image.open(tmp_path / "confusion.png").width > 200
    five_panels = Image.open(tmp_path / "worst.png")
    assert five_panels.width > 5 * 300 and five_panels.height > 2 * 250
    one = evaluate_checkpoint(checkpoint, [*options, "eval.limit=1", "eval.pictures=0"], tmp_path / "one")
    assert float(images[0]["refined"]) == pytest.approx(one["refined"]["miou"])
    assert not (tmp_path / "one" / "worst.png").exists()


def test_without_matplotlib(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    evaluate_checkpoint(checkpoint, ["eval.limit=1", "eval.pictures=0"], tmp_path)
    assert "no confusion.png: it needs the package matplotlib" in capsys.readouterr().out
    assert (tmp_path / "confusion.npy").is_file() and not (tmp_path / "confusion.png").exists()


class Exact(nn.Module):
    """Sums of products of multiples of 1/64 in float64: no rounding, so that no order of adding up can matter."""

    align_corners = False

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.weight = torch.randint(-9, 10, (4, 3, 3, 3), generator=generator).double()

    def predict(self, images: Tensor, output: str = "logits") -> SimpleNamespace:
        refined = F.conv2d((16 * images.double()).round(), self.weight, padding=1)
        coarse = F.avg_pool2d(F.pad(refined, (0, refined.shape[3] % 2, 0, refined.shape[2] % 2)), 2)
        return SimpleNamespace(coarse=coarse, refined=refined, labels=refined.argmax(1))

    def upsample(self, coarse: Tensor, size: Any) -> Tensor:
        return F.interpolate(coarse, scale_factor=2, mode="bilinear")[:, :, : size[0], : size[1]]


class Noise:
    """Images of two sizes in turn by twos and threes, with the label that one of the channels suggests."""

    num_classes, class_names, ignore_index = 4, list("abcd"), 255
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __len__(self) -> int:
        return 7

    def sample(self, index: int, epoch: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        size = (17, 26) if index % 5 < 3 else (20, 14)
        image = torch.randint(-16, 17, (3, *size), generator=generator).float() / 16
        label = torch.randint(0, 4, size, generator=generator)
        label[image[0] > 0.9] = 255
        return {"image": image, "label": label, "name": f"{index}"}


MANY_VIEWS = {"scales": [0.5, 1.0, 2.0], "flip": True, "window": [12, 16], "window_stride": [8, 12], "num_workers": 0}


@pytest.mark.parametrize("merge", ["logits", "softmax", "exp"])
def test_the_batch_size_does_not_change_the_counts(tmp_path: Path, merge: str) -> None:
    accelerator = make_accelerator(tiny_config(tmp_path))
    results, confusions = [], []
    for batch_size in (1, 2, 3):
        details = Details()
        options = EvalConfig(batch_size=batch_size, merge=merge, **MANY_VIEWS)
        result = evaluate(Exact(), Noise(), options, accelerator, details=details)
        assert result is not None and result.pop("ms_per_image") > 0 and result.pop("seconds") >= 0
        results.append(result)
        confusions.append(details)
    assert results[0] == results[1] == results[2]
    for other in confusions[1:]:
        assert other.images == confusions[0].images and [row["index"] for row in other.images] == list(range(7))
        assert all(np.array_equal(other.confusion[kind], confusions[0].confusion[kind]) for kind in other.confusion)
    plain = evaluate(Exact(), Noise(), EvalConfig(merge=merge, **MANY_VIEWS), accelerator)  # without details
    assert plain is not None and plain["refined"] == results[0]["refined"] and plain["coarse"] == results[0]["coarse"]


TWO_PROCESSES = """
import json, pathlib, sys
sys.path.insert(0, {repo!r})
import torch
torch.set_num_threads(1)
from rendseg.engine.config import EvalConfig
from rendseg.engine.evaluate import Details, evaluate, evaluate_checkpoint
from rendseg.engine.runtime import make_accelerator
from tests.engine.test_evaluate import MANY_VIEWS, Exact, Noise
from tests.engine.tiny import tiny_config
out = pathlib.Path({out!r})
accelerator = make_accelerator(tiny_config(out))
details = Details()
result = evaluate(Exact(), Noise(), EvalConfig(**MANY_VIEWS), accelerator, details=details)
counts = {{kind: matrix.tolist() for kind, matrix in details.confusion.items()}}
(out / f"rank{{accelerator.process_index}}.json").write_text(json.dumps([result, counts, details.images]))
evaluate_checkpoint({checkpoint!r}, {overrides!r}, out / "two")
"""


def test_two_processes_count_the_same(checkpoint: Path, tmp_path: Path) -> None:
    """Seven and three images over two gloo processes: the counts of one process, and one set of files."""
    overrides = ["eval.preset=mmseg", "eval.scales=[0.5,1]", "eval.flip=true", "eval.pictures=1"]
    script = tmp_path / "script.py"
    script.write_text(
        TWO_PROCESSES.format(repo=str(REPO), out=str(tmp_path), checkpoint=str(checkpoint), overrides=overrides)
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in ("0", "1")
    ]
    outputs = [process.communicate(timeout=TIMEOUT) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], [error[-2000:] for _, error in outputs]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    details = Details()
    one = evaluate(Exact(), Noise(), EvalConfig(**MANY_VIEWS), make_accelerator(tiny_config(tmp_path)), details=details)
    assert one is not None
    for result, counts, images in ranks:
        assert counts == {kind: matrix.tolist() for kind, matrix in details.confusion.items()}
        assert images == details.images
        assert result["refined"] == one["refined"] and result["coarse"] == one["coarse"] and result["images"] == 7
    assert ranks[0][0]["ms_per_image"] == ranks[1][0]["ms_per_image"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        evaluate_checkpoint(checkpoint, overrides, tmp_path / "one")
    finally:
        torch.set_num_threads(threads)
    assert {p.name for p in (tmp_path / "two").iterdir()} == {p.name for p in (tmp_path / "one").iterdir()}
    for name in ("confusion.npy", "confusion_coarse.npy", "images.csv"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert json.loads((tmp_path / "two" / "metrics.json").read_text())["environment"]["processes"] == 2
    assert "written to" in outputs[0][0] and "written to" not in outputs[1][0]


def test_predict_takes_the_same_views(checkpoint: Path, tmp_path: Path) -> None:
    """`rendseg predict` with scales, flip and windows writes the labels that evaluation counts."""
    from PIL import Image

    from rendseg.data import build_dataset
    from rendseg.engine.predict import predict_files
    from rendseg.engine.visualize import to_uint8

    config, classes, _, _ = load_trained(checkpoint)
    dataset = build_dataset(config.data, "val")  # type: ignore[arg-type]
    labels = []
    for index in range(len(dataset)):
        sample = dataset[index]
        Image.fromarray(to_uint8(sample["image"], dataset.mean, dataset.std)).save(tmp_path / f"{index}.png")
        labels.append(sample["label"].numpy())
    views = ["eval.scales=[0.5,1.3]", "eval.window=[40,48]"]
    for overrides in ([], ["data.channel_order=bgr"], ["eval.preset=pytorch_encoding", *views]):
        out = tmp_path / f"out{len(overrides)}"
        assert predict_files(checkpoint, sorted(tmp_path.glob("*.png")), out, overrides) == (3, 0)
        evaluate_checkpoint(checkpoint, [*overrides, "eval.pictures=0"], out)
        found = [np.asarray(Image.open(out / f"{index}_labels.png")) for index in range(3)]
        pairs = list(zip(labels, found, strict=True))
        assert np.array_equal(counted(pairs, len(classes["names"])), np.load(out / "confusion.npy")), overrides
