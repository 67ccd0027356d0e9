"""Reading of images and label maps, with errors that name the file and the remedy."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from .options import DataError

IGNORE = 255
EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".gif"}


def data_root() -> Path:
    """``$RENDSEG_DATA``, else ``../shared/data`` beside the checkout."""
    return Path(os.environ.get("RENDSEG_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data")


def dataset_root(root: str | None, default: str, what: str) -> Path:
    """The folder of a data set: `root`, or `default` within :func:`data_root`; DataError if it is absent."""
    path = Path(root).expanduser() if root else data_root() / default
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; put {what} there, or set data.root or RENDSEG_DATA")
    return path


def read_list(path: Path, key: str) -> list[str]:
    """The lines of a list file that are neither blank nor comments (#)."""
    if not path.is_file():
        raise DataError(f"{path}: no such list file of image names; create it or name it in data.{key}")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: the list cannot be read ({reason}); save it as plain text") from error
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise DataError(f"{path}: the list is empty; write one image name per line")
    return lines


def find_images(folder: Path, recursive: bool = False) -> list[Path]:
    """The image files of a folder, sorted by their path within it, so that the order is the same on every machine."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; set data.root (and the folder names) to where the images are")
    paths = [p for p in (folder.rglob("*") if recursive else folder.iterdir()) if p.suffix.lower() in EXTENSIONS]
    paths = sorted(
        (p for p in paths if not p.name.startswith(".") and p.is_file()), key=lambda p: p.relative_to(folder).parts
    )
    if not paths:
        raise DataError(
            f"{folder}: holds no images ({', '.join(sorted(EXTENSIONS))}); put the images there or change data.root"
        )
    return paths


def _open(path: Path, kind: str) -> Image.Image:
    if not path.is_file():
        raise DataError(f"{path}: {kind} is missing; add the file or remove its partner")
    # Another library may have told PIL to fill what is missing of a truncated file with grey.
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except Exception as error:  # decoders raise nearly anything on a damaged file
        reason = " ".join(str(error).replace(str(path), "file").split()) or type(error).__name__
        raise DataError(f"{path}: {kind} cannot be read ({reason}); replace or remove the file") from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def read_image(path: Path) -> np.ndarray:
    """RGB as uint8 ``[H, W, 3]``. Grey becomes three channels, 16-bit grey loses its low byte, alpha is dropped."""
    image = _open(path, "image")
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise DataError(f"{path}: image holds values outside 0..65535; convert it to 8 or 16 bits")
        return np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode == "F":
        raise DataError(f"{path}: image of floating point values; convert it to 8 or 16 bits")
    try:
        return np.array(image.convert("RGB"))
    except ValueError as error:
        raise DataError(f"{path}: image has mode {image.mode}, which has no RGB; convert it to 8-bit RGB") from error


class LabelReader:
    """Reads label maps: value (or colour) in the file -> class.

    Args:
        num_classes: classes are 0 to num_classes - 1.
        class_map: value -> class or 255; None: a value is its class.
        color_map: (r, g, b) -> class or 255, for label maps in colour.
        ignore_values: values in the file that become 255 unless `class_map` has them.
        remedy: what to do about a value that is no class.
    """

    def __init__(
        self,
        num_classes: int,
        class_map: dict[int, int] | None = None,
        color_map: dict[tuple[int, int, int], int] | None = None,
        ignore_values: tuple[int, ...] = (IGNORE,),
        remedy: str = "correct the file or map the value in data.class_map (255 ignores it)",
    ) -> None:
        self.num_classes = num_classes
        self.remedy = remedy
        self.color_map = color_map
        mapping = {value: IGNORE for value in ignore_values}
        mapping.update(class_map if class_map is not None else {c: c for c in range(num_classes)})
        self._known = sorted(mapping)
        self._table = np.full(65536, -1, np.int16)
        for value, label in mapping.items():
            self._table[value] = label
        if color_map:
            keys = np.array([(r << 16) | (g << 8) | b for r, g, b in color_map], np.int64)
            order = np.argsort(keys)
            self._colors = keys[order]
            self._color_labels = np.array(list(color_map.values()), np.uint8)[order]

    def __call__(self, path: Path) -> np.ndarray:
        """uint8 ``[H, W]`` with classes and 255.

        Raises:
            DataError: unreadable file, or a value that is no class; names the file, the value and the pixel.
        """
        image = _open(path, "label map")
        if self.color_map:
            return self._from_colors(np.asarray(image.convert("RGB")), path)
        if image.mode not in ("L", "P", "1", "I") and not image.mode.startswith("I;16"):
            raise DataError(
                f"{path}: label map has mode {image.mode}, wanted one channel of integers; "
                "save class numbers as grey PNG or give data.color_map (split: data set 'folder')"
            )
        return self.translate(np.asarray(image), path)

    def translate(self, values: np.ndarray, path: Path) -> np.ndarray:
        """uint8 ``[H, W]`` of integers or booleans ``[H, W]`` that were read from `path`; errors as on calling."""
        known = values.astype(np.int64) if values.dtype.itemsize > 2 or values.dtype.kind != "u" else values
        outside = (known < 0) | (known > 65535) if known.dtype == np.int64 else None
        if outside is not None and outside.any():
            known = np.where(outside, 0, known)
        else:
            outside = None
        labels = self._table[known]
        bad = labels < 0 if outside is None else outside | (labels < 0)
        if bad.any():
            raise self._unknown(path, values, bad)
        return labels.astype(np.uint8)

    def _from_colors(self, rgb: np.ndarray, path: Path) -> np.ndarray:
        keys = (rgb[..., 0].astype(np.int64) << 16) | (rgb[..., 1].astype(np.int64) << 8) | rgb[..., 2]
        index = np.minimum(np.searchsorted(self._colors, keys), len(self._colors) - 1)
        bad = self._colors[index] != keys
        if bad.any():
            row, column = (int(v) for v in np.argwhere(bad)[0])
            raise DataError(
                f"{path}: colour #{int(keys[row, column]):06x} at row {row}, column {column} is not in data.color_map "
                f"({len(self._colors)} colours; {_occurrences(keys[bad], '#{:06x}')}); add it (255 ignores it) or "
                "correct the file"
            )
        return self._color_labels[index]

    def _unknown(self, path: Path, values: np.ndarray, bad: np.ndarray) -> DataError:
        row, column = (int(v) for v in np.argwhere(bad)[0])
        known = self._known
        shown, more = ", ".join(map(str, known[:12])), ", ..." if len(known) > 12 else ""
        return DataError(
            f"{path}: label value {int(values[row, column])} at row {row}, column {column} is no class (known values: "
            f"{shown}{more}; {_occurrences(values[bad])}); {self.remedy}"
        )


def _occurrences(values: np.ndarray, form: str = "{}", most: int = 8) -> str:
    """``"5 such pixels: 3 of 12, 2 of 77"``, the most frequent value first."""
    found, counts = np.unique(values, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most]
    listed = ", ".join(f"{counts[i]} of {form.format(int(found[i]))}" for i in order)
    more = f", and {len(found) - most} other values" if len(found) > most else ""
    return f"{values.size} such pixel{'s' if values.size > 1 else ''}: {listed}{more}"
