"""Label maps and pictures: ``rendseg predict`` for image files, and the pictures at the end of training."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from rendseg.data import DataError, parse_options
from rendseg.data.augment import to_sample
from rendseg.data.images import find_images, read_image
from rendseg.engine.checkpoint import write_atomically
from rendseg.engine.evaluate import load_trained
from rendseg.engine.visualize import overlay, side_by_side

if TYPE_CHECKING:
    from accelerate import Accelerator


@torch.no_grad()
def predict_with_points(network: Any, image: Tensor, accelerator: Accelerator) -> tuple[Tensor, Tensor, Tensor | None]:
    """Coarse labels [H, W], refined labels [H, W] and the points of the last step [P, 2] (None without refinement).

    ``image`` is normalised, [3, H, W]; points are (x, y) in [0, 1] of the image.
    """
    network.eval()
    with accelerator.autocast():
        output = network.predict(image[None].to(accelerator.device), output="labels", return_points=True)
        coarse = network.upsample(output.coarse, image.shape[-2:]).argmax(1)
    points = output.points[-1][0].float().cpu() if output.points else None
    return coarse[0].cpu(), output.labels[0].cpu(), points


def make_picture(
    network: nn.Module, image: Tensor, pixels: np.ndarray, palette: np.ndarray, accelerator: Accelerator
) -> tuple[np.ndarray, np.ndarray]:
    """The refined label map [H, W] and the side-by-side picture of image, coarse, refined and points, uint8 [h, w, 3]."""
    coarse, refined, points = predict_with_points(network, image, accelerator)
    labels = refined.numpy()
    picture = side_by_side(pixels, coarse.numpy(), labels, None if points is None else points.numpy(), palette)
    return labels, np.asarray(picture)


def make_pictures(
    network: nn.Module, dataset: Any, count: int, accelerator: Accelerator
) -> list[tuple[str, np.ndarray]]:
    """Side-by-side pictures of ``count`` images spread over a data set, with their names."""
    pictures = []
    count = min(count, len(dataset))
    for index in (len(dataset) * i // count for i in range(count)):
        sample = dataset[index]
        pixels = to_pixels(sample["image"], dataset.mean, dataset.std)
        pictures.append(
            (sample["name"], make_picture(network, sample["image"], pixels, dataset.palette, accelerator)[1])
        )
    return pictures


def to_pixels(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """uint8 [H, W, 3] of a normalised image [3, H, W]."""
    values = image.cpu() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return (values * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def save_pictures(network: nn.Module, dataset: Any, count: int, folder: Path, accelerator: Accelerator) -> None:
    """Write ``make_pictures`` as ``folder/<name>.png``."""
    for name, picture in make_pictures(network, dataset, count, accelerator):
        save_png(folder / f"{name}.png", picture)


def save_png(path: Path, values: np.ndarray) -> None:
    """Write uint8 [H, W] or [H, W, 3], or uint16 [H, W], as PNG."""
    write_atomically(path, lambda file: Image.fromarray(values).save(file, format="PNG"))


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

    A file that cannot be read is reported and the others are still done. Returns how many were done and how many failed.
    """
    from rendseg.engine.train import make_accelerator

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
        image, _ = to_sample(image, torch.zeros(pixels.shape[:2]), data.mean, data.std)
        labels, picture = make_picture(network, image, pixels, palette, accelerator)
        name, n = path.stem, 1
        while name in taken:  # images of one name from several folders
            n += 1
            name = f"{path.stem}_{n}"
        taken.add(name)
        save_png(out / f"{name}_labels.png", labels.astype(np.uint8 if len(palette) <= 256 else np.uint16))
        save_png(out / f"{name}_overlay.png", np.asarray(overlay(pixels, labels, palette)))
        save_png(out / f"{name}_side_by_side.png", picture)
        print(f"{path} -> {out / name}_{{labels,overlay,side_by_side}}.png")
        done += 1
    return done, failed
