"""Label maps and pictures: ``rendseg predict`` for image files, and the pictures at the end of training."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from rendseg.data import DataError, parse_options
from rendseg.data.augment import to_sample
from rendseg.data.images import find_images, read_image
from rendseg.engine.assemble import load_trained
from rendseg.engine.checkpoint import CheckpointError, write_atomically
from rendseg.engine.config import EvalConfig
from rendseg.engine.inference import black, is_plain, predict_labels, predicted
from rendseg.engine.runtime import make_accelerator
from rendseg.engine.visualize import boundary_zoom, overlay, side_by_side, to_uint8

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Prediction:
    """Label maps [H, W] of one image, and the points of every step, each [P, 2] of (x, y) in [0, 1]; none where the
    image was predicted from several views."""

    coarse: np.ndarray
    refined: np.ndarray
    points: list[np.ndarray]


@torch.no_grad()
def predict_image(
    network: Any,
    image: Tensor,
    accelerator: Accelerator,
    options: EvalConfig | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> Prediction:
    """Predict one image [3, H, W], normalised by `mean` and `std`, as ``options`` say (windows, scales, flip; None: as
    it is), and keep the points that were chosen."""
    network.eval()
    size = (image.shape[-2], image.shape[-1])
    images = image[None].to(accelerator.device)
    with accelerator.autocast():
        if options is not None and not is_plain(*size, size, options):
            found = predict_labels(network, images, size, options, black(mean, std))
            return Prediction(found["coarse"][0].cpu().numpy(), found["refined"][0].cpu().numpy(), [])
        output = predicted(network, images, output="labels", return_points=True)
        coarse = network.upsample(output.coarse, size).argmax(1)
    points = [step[0].float().cpu().numpy() for step in output.points or []]
    return Prediction(coarse[0].cpu().numpy(), output.labels[0].cpu().numpy(), points)


def make_pictures(
    network: nn.Module, dataset: Any, count: int, accelerator: Accelerator, zoom: bool = False
) -> Iterator[tuple[str, Image.Image]]:
    """Names and pictures (image, coarse, refined, points, label) of ``count`` images spread over a data set; with
    ``zoom`` each is followed by the window in which refinement changed most, enlarged."""
    count = min(count, len(dataset))
    for index in (len(dataset) * i // count for i in range(count)):
        sample = dataset[index]
        pixels = to_uint8(sample["image"], dataset.mean, dataset.std, dataset.channel_order)
        found = predict_image(network, sample["image"], accelerator)
        name, label, points = sample["name"], sample["label"], found.points or None
        yield (
            name,
            side_by_side(
                pixels, found.coarse, found.refined, points, label, dataset.palette, class_names=dataset.class_names
            ),
        )
        if zoom:
            yield (
                f"{name}_zoom",
                boundary_zoom(pixels, found.coarse, found.refined, label, dataset.palette, points=points),
            )


def save_pictures(network: nn.Module, dataset: Any, count: int, folder: Path, accelerator: Accelerator) -> None:
    """Write ``make_pictures`` as ``folder/<name>.png`` and ``folder/<name>_zoom.png``."""
    for name, picture in make_pictures(network, dataset, count, accelerator, zoom=True):
        save_png(folder / f"{name}.png", picture)


def save_png(path: Path, picture: Image.Image) -> None:
    """Write a picture; ``CheckpointError`` says why if that fails."""
    try:
        write_atomically(path, lambda file: picture.save(file, format="PNG"))
    except OSError as error:
        raise CheckpointError(f"could not write {path}: {error}") from error


def _expand(images: Sequence[Path]) -> list[Path]:
    """Files as given, and for each folder the images in it."""
    paths: list[Path] = []
    for path in images:
        paths += find_images(path) if path.is_dir() else [path]
    return paths


def predict_files(
    checkpoint: str | Path, images: Sequence[Path], out: Path, overrides: Sequence[str] = ()
) -> tuple[int, int]:
    """``rendseg predict``: for every image NAME write ``NAME_labels.png`` (class numbers), ``NAME_overlay.png`` and
    ``NAME_side_by_side.png`` (image, coarse, refined, points) to ``out``.

    Windows, scales and flip are those of the section ``eval``; with several views no points are shown. A file that
    cannot be read is reported and the others are still done. Returns how many were done, how many failed.
    """
    config, classes, network, _ = load_trained(checkpoint, overrides)
    accelerator = make_accelerator(config)
    network.to(accelerator.device)
    palette = np.array(classes["palette"], np.uint8)
    data = parse_options(config.data)
    done, failed, taken = 0, 0, set()
    for path in _expand(images):
        try:
            pixels = read_image(path)
        except DataError as error:
            print(f"rendseg: {error}", file=sys.stderr)
            failed += 1
            continue
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        image, _ = to_sample(image, torch.zeros(pixels.shape[:2]), data.mean, data.std, None, data.channel_order)
        found = predict_image(network, image, accelerator, config.eval, data.mean, data.std)
        name, n = path.stem, 1
        while name in taken:  # images of one name from several folders
            n += 1
            name = f"{path.stem}_{n}"
        taken.add(name)
        labels = found.refined.astype(np.uint8 if len(palette) <= 256 else np.uint16)
        save_png(out / f"{name}_labels.png", Image.fromarray(labels))
        save_png(out / f"{name}_overlay.png", overlay(pixels, labels, palette))
        points = found.points or None
        picture = side_by_side(
            pixels, found.coarse, found.refined, points, palette=palette, class_names=classes["names"]
        )
        save_png(out / f"{name}_side_by_side.png", picture)
        print(f"{path} -> {out / name}_{{labels,overlay,side_by_side}}.png")
        done += 1
    return done, failed
