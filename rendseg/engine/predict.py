"""Label maps and pictures: ``rendseg predict`` for image files, and the pictures at the end of training."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from rendseg.data import DataError, DatasetOptions, InstanceDataset, file_values, parse_options
from rendseg.data.augment import to_sample
from rendseg.data.images import as_rgb, find_images, read_image
from rendseg.engine.assemble import load_trained
from rendseg.engine.checkpoint import CheckpointError, write_atomically
from rendseg.engine.config import Config, ConfigError, EvalConfig
from rendseg.engine.inference import black, is_plain, predict_labels
from rendseg.engine.objects import object_pictures, predict_objects, shown_objects, write_objects
from rendseg.engine.runtime import make_accelerator
from rendseg.engine.visualize import boundary_zoom, objects_side_by_side, overlay, side_by_side, to_uint8

if TYPE_CHECKING:
    from accelerate import Accelerator

MARK = "rendseg"  # in the PNG files that are written, so that they are not predicted in their turn
LONGEST = 200  # bytes of a file name before its ending; file systems take 255 altogether
PARTS = ("labels.png", "overlay.png", "side_by_side.png")  # what is written of each image: NAME_labels.png ...
OBJECT_PARTS = ("objects.json", "side_by_side.png")
BAND = 256  # rows that are normalised at a time


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
        output = network.predict(images, output="labels", return_points=True)
        coarse = network.upsample(output.coarse, size).argmax(1)
    points = [step[0].float().cpu().numpy() for step in output.points or []]
    return Prediction(coarse[0].cpu().numpy(), output.labels[0].cpu().numpy(), points)


def make_pictures(
    network: nn.Module,
    dataset: Any,
    count: int,
    accelerator: Accelerator,
    zoom: bool = False,
    threshold: float = 0.5,
) -> Iterator[tuple[str, Image.Image]]:
    """Names and pictures (image, coarse, refined, points, label) of ``count`` images spread over a data set; with
    ``zoom`` each is followed by the window in which refinement changed most, enlarged. Objects are shown from the score
    ``threshold`` on."""
    count = min(count, len(dataset))
    indices = [len(dataset) * i // count for i in range(count)]
    if isinstance(dataset, InstanceDataset):
        yield from object_pictures(network, dataset, indices, accelerator, threshold, zoom)
        return
    for index in indices:
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


def save_pictures(
    network: nn.Module, dataset: Any, count: int, folder: Path, accelerator: Accelerator, threshold: float = 0.5
) -> None:
    """Write ``make_pictures`` as ``folder/<name>.png`` and ``folder/<name>_zoom.png``."""
    for name, picture in make_pictures(network, dataset, count, accelerator, zoom=True, threshold=threshold):
        save_png(folder / f"{file_stem(name)}.png", picture)


def file_stem(name: str) -> str:
    """A name as a file can have it with an ending: a longer one is cut and made unique by a hash."""
    raw = os.fsencode(name)
    if len(raw) <= LONGEST:
        return name
    return f"{raw[: LONGEST - 9].decode('utf-8', 'ignore')}_{hashlib.sha256(raw).hexdigest()[:8]}"


def save_png(path: Path, picture: Image.Image) -> None:
    """Write a picture; ``CheckpointError`` says why if that fails."""
    about = PngInfo()
    about.add_text("Software", MARK)
    try:
        write_atomically(path, lambda file: picture.save(file, format="PNG", pnginfo=about))
    except OSError as error:
        raise CheckpointError(f"could not write {path}: {error}") from error


def label_values(config: Config, num_classes: int, own: bool) -> np.ndarray:
    """What stands for each class in a label map that is written: its number, or ``own``: its value in the label maps of
    the data set; [C], or colours [C, 3]."""
    values = file_values(config.data) if own else None
    values = np.arange(num_classes) if values is None else values
    return values.astype(np.uint8 if values.ndim == 2 or values.max() < 256 else np.uint16)


def save_labels(path: Path, labels: np.ndarray, values: np.ndarray) -> None:
    """Write a label map [H, W] in the ``values`` of :func:`label_values`."""
    save_png(path, Image.fromarray(values[labels]))


def _expand(images: Sequence[Path], out: Path) -> tuple[list[Path], list[str]]:
    """Files as given, and for each folder the images in it, without what an earlier run wrote to ``out``; and a line
    for each folder without images."""
    paths: list[Path] = []
    problems: list[str] = []
    for path in images:
        try:
            paths += find_images(path) if path.is_dir() else [path]
        except DataError as error:
            problems.append(str(error))
    kept = [path for path in paths if not (_same(path.parent, out) and _is_result(path))]
    if len(kept) < len(paths):
        print(f"not predicted: {len(paths) - len(kept)} files in {out} that rendseg wrote itself")
    return kept, problems


def _same(folder: Path, other: Path) -> bool:
    return folder.is_dir() and other.is_dir() and folder.samefile(other)


def _is_result(path: Path) -> bool:
    if path.suffix != ".png":
        return False
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == MARK
    except Exception:  # what is wrong with it is said where it is read
        return False


def predict_files(
    checkpoint: str | Path, images: Sequence[Path], out: Path, overrides: Sequence[str] = (), own_values: bool = False
) -> tuple[int, int]:
    """``rendseg predict``: for every image NAME write ``NAME_labels.png`` (class numbers; ``own_values``: the values of
    the data set's own label maps), ``NAME_overlay.png`` and ``NAME_side_by_side.png`` (image, coarse, refined, points)
    to ``out``. Of objects: ``NAME_objects.json`` (COCO's form of results, of ``eval.score_threshold`` on; images are
    numbered from 0) and ``NAME_side_by_side.png``.

    Windows, scales and flip are those of the section ``eval``; with several views no points are shown. What goes wrong
    with one image is reported and the others are still done. Returns how many were done, how many failed.
    """
    config, classes, network, _ = load_trained(checkpoint, overrides)
    if config.learns_objects and own_values:
        raise ConfigError("--labels is for label maps: leave it out with model.name pointrend_rcnn")
    values = label_values(config, len(classes["names"]), own_values)
    parts = OBJECT_PARTS if config.learns_objects else PARTS
    accelerator = make_accelerator(config)
    network.to(accelerator.device)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"could not write to {out}: {error}; choose another --out") from error
    paths, problems = _expand(images, out)
    for problem in problems:
        print(f"rendseg: {problem}", file=sys.stderr)
    done, failed = 0, len(problems)
    ending = ".png" if parts is PARTS else ""
    written = f"{{{','.join(part.removesuffix(ending) for part in parts)}}}{ending}"
    taken = {path.name for path in paths if _same(path.parent, out)}  # files that must not be written: images
    for number, path in enumerate(paths):
        name, n = file_stem(path.stem), 1
        while any(f"{name}_{part}" in taken for part in parts):  # and images of one name from several folders
            n += 1
            name = f"{file_stem(path.stem)}_{n}"
        try:
            if config.learns_objects:
                _predict_objects(path, out / name, number, network, accelerator, config, classes)
            else:
                _predict_file(path, out / name, network, accelerator, config, classes, values)
        except Exception as error:  # one of many: the others must not suffer for it
            if os.environ.get("RENDSEG_DEBUG") == "1":
                raise
            known = isinstance(error, (DataError, CheckpointError))
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"rendseg: {reason if known else f'{path}: could not be predicted: {reason}'}", file=sys.stderr)
            failed += 1
            continue
        taken.add(f"{name}_{parts[0]}")
        print(f"{path} -> {out / name}_{written}")
        done += 1
    return done, failed


def _predict_file(
    path: Path,
    target: Path,
    network: nn.Module,
    accelerator: Accelerator,
    config: Config,
    classes: Mapping[str, Any],
    values: np.ndarray,
) -> None:
    """Predict one image; ``target`` is the beginning of the files' names."""
    data, palette = parse_options(config.data), np.array(classes["palette"], np.uint8)
    pixels = read_image(path, data)
    found = predict_image(network, _normalised(pixels, data), accelerator, config.eval, data.mean, data.std)
    pixels = as_rgb(pixels)
    save_labels(target.with_name(f"{target.name}_labels.png"), found.refined, values)
    save_png(target.with_name(f"{target.name}_overlay.png"), overlay(pixels, found.refined, palette))
    points = found.points or None
    picture = side_by_side(pixels, found.coarse, found.refined, points, palette=palette, class_names=classes["names"])
    save_png(target.with_name(f"{target.name}_side_by_side.png"), picture)


def _predict_objects(
    path: Path,
    target: Path,
    number: int,
    network: nn.Module,
    accelerator: Accelerator,
    config: Config,
    classes: Mapping[str, Any],
) -> None:
    """Predict the objects of one image, the one of this ``number``."""
    data, threshold = parse_options(config.data), config.eval.score_threshold
    pixels = read_image(path, data)
    found = predict_objects(network, [_normalised(pixels, data).to(accelerator.device)], accelerator)[0]
    write_objects(target.with_name(f"{target.name}_objects.json"), found, number, path.name, classes, threshold)
    kinds = {kind: shown_objects(found, kind, threshold) for kind in ("coarse", "refined")}
    palette = np.array(classes["palette"], np.uint8)
    picture = objects_side_by_side(as_rgb(pixels), kinds, palette, classes["names"])
    save_png(target.with_name(f"{target.name}_side_by_side.png"), picture)


def _normalised(pixels: np.ndarray, data: DatasetOptions) -> Tensor:
    """float32 [C, H, W] of uint8 [H, W, C], made a few rows at a time, since a large image has no room for copies."""
    height, width, channels = pixels.shape
    image = torch.empty(channels, height, width)
    for top in range(0, height, BAND):
        rows = torch.from_numpy(pixels[top : top + BAND]).permute(2, 0, 1)
        image[:, top : top + BAND] = to_sample(rows, rows[0], data.mean, data.std, None, data.channel_order)[0]
    return image
