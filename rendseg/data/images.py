"""Reading of images and label maps, with errors that name the file and the remedy."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from .options import AugmentOptions, DataError

IGNORE = 255
EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".gif"}
_DEFAULTS = AugmentOptions()


# ------------------------------------------------------------------------------------------------ folders and lists


def data_root() -> Path:
    """``$RENDSEG_DATA``, else ``../shared/data`` beside the checkout."""
    given = os.environ.get("RENDSEG_DATA")
    return Path(given).expanduser() if given else Path(__file__).resolve().parents[2].parent / "shared" / "data"


def dataset_root(root: str | None, default: str, what: str) -> Path:
    """The folder of a data set: `root`, or `default` within :func:`data_root`; DataError if it is absent."""
    path = Path(root).expanduser() if root else data_root() / default
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; put {what} there, or set data.root or RENDSEG_DATA")
    return path


def read_list(path: Path, key: str) -> list[str]:
    """The lines of a list file that are neither blank nor comments (#): text in UTF-8, with or without a mark at its
    start, or UTF-16. Bytes that are no UTF-8 become what they are in the names of files (surrogates)."""
    if not path.is_file():
        raise DataError(f"{path}: no such list file of image names; create it or name it in data.{key}")
    try:
        content = path.read_bytes()
        if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
            text = content.decode("utf-16")
        elif b"\0" in content:
            text = content.decode("utf-16-be" if content[:1] == b"\0" else "utf-16-le")
        else:
            text = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    except (OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: the list cannot be read ({reason}); save it as plain text") from error
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise DataError(f"{path}: the list is empty; write one image name per line")
    return lines


def find_images(folder: Path, recursive: bool = False) -> list[Path]:
    """The image files of a folder, sorted by their path within it, so that the order is the same on every machine.

    Symbolic links are followed, but not into a folder that holds the link; names that begin with "." are skipped.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; set data.root (and the folder names) to where the images are")
    try:
        above = tuple((status.st_dev, status.st_ino) for status in (p.stat() for p in folder.resolve().parents))
        paths = [path for path in _files(folder, recursive, above) if path.suffix.lower() in EXTENSIONS]
    except OSError as error:
        raise DataError(f"{error.filename or folder}: cannot be listed ({error.strerror}); make it readable") from error
    if not paths:
        raise DataError(
            f"{folder}: holds no images ({', '.join(sorted(EXTENSIONS))}); put the images there or change data.root"
        )
    return sorted(paths, key=lambda path: path.relative_to(folder).parts)


def _files(folder: Path, recursive: bool, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """The files in a folder; `above` are device and number of the folders that it lies in."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_file():
                yield folder / entry.name
            elif recursive and entry.is_dir():
                yield from _files(folder / entry.name, recursive, (*above, here))


# ------------------------------------------------------------------------------------------------------ opening


def _open(path: Path, kind: str, max_pixels: int = _DEFAULTS.max_pixels, page: int = 0) -> Image.Image:
    if not path.is_file():
        raise DataError(f"{path}: {kind} is missing; add the file or remove its partner")
    # Another library may have told PIL to fill what is missing of a truncated file with grey.
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # PIL's own knows no key
    try:
        with Image.open(path) as image:
            _check_size(path, kind, image.width * image.height, max_pixels)
            if page:
                image.seek(page)
            _note_stored(image)
            image.load()
            return image
    except DataError:
        raise
    except Exception as error:  # decoders raise nearly anything on a damaged file
        reason = " ".join(str(error).replace(str(path), "file").split()) or type(error).__name__
        raise DataError(f"{path}: {kind} cannot be read ({reason}); replace or remove the file") from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient
        Image.MAX_IMAGE_PIXELS = limit


def _check_size(path: Path, kind: str, pixels: int, most: int) -> None:
    if pixels > most:
        raise DataError(
            f"{path}: {kind} has {pixels} pixels, more than data.max_pixels={most}, a guard against files made to fill "
            f"the memory; set data.max_pixels={pixels} if you trust the file"
        )


def _note_stored(image: Image.Image) -> None:
    """What PIL is going to change: ``info["stored"]``, the largest value of the file's bits, where it brings values to
    0..255 or 0..65535; ``info["cut"]`` where it drops the low bytes of a colour image of 16 bits."""
    tile = image.tile[0] if getattr(image, "tile", None) else None  # type: ignore[attr-defined]
    if tile is None:
        return
    arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
    raw = arguments[0] if arguments and isinstance(arguments[0], str) else ""
    if ";16" in raw and image.mode in ("LA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK"):
        image.info["cut"] = True
    if image.format == "PPM" and image.mode in ("L", "I") and isinstance(arguments[-1], int):
        image.info["stored"] = arguments[-1]
    elif raw[:3] in ("L;2", "L;4"):
        image.info["stored"] = 2 ** int(raw[2]) - 1


def orientation(path: Path) -> int:
    """The EXIF tag "Orientation" of an image file, 1 (as stored) where there is none."""
    try:
        with Image.open(path) as image:
            if image.format == "PNG" and "exif" not in image.info:  # PIL would decode it all to look further
                return 1
            return _orientation(image)
    except Exception:  # what is wrong with the file is said where it is read
        return 1


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(274, 1))
    except Exception:  # a damaged EXIF block does no harm to the image
        return 1


# --------------------------------------------------------------------------------------------------------- images


@dataclass(frozen=True)
class _Tiff:
    """Number of pages as large as the first, which are no masks; bands of the first, and what they mean."""

    pages: int
    bands: int
    bits: int
    width: int
    height: int
    photometric: int
    extra: tuple[int, ...]
    orientation: int


def _inspect_tiff(path: Path) -> _Tiff | None:
    """None: no TIFF, or one whose tags cannot be read."""
    try:
        with open(path, "rb") as file:
            header = file.read(8)
            if header[2:3] == b"\x2b" or header[3:4] == b"\x2b":
                header += file.read(8)
            directory = ImageFileDirectory_v2(header)
            pages: list[dict[int, Any]] = []
            seen: set[int] = set()
            while directory.next and directory.next not in seen:
                seen.add(directory.next)
                file.seek(directory.next)
                directory.load(file)
                pages.append(dict(directory))
        first = pages[0]
        size = first[256], first[257]
        full = [page for page in pages if not page.get(254, 0) & 5 and (page[256], page[257]) == size]
        extra = first.get(338, ())
        return _Tiff(
            max(1, len(full)),
            first.get(277, 1),
            max(first.get(258, (1,))),
            *size,
            first.get(262, 1),
            extra if isinstance(extra, tuple) else (extra,),
            first.get(274, 1),
        )
    except Exception:  # _open says what is wrong with it
        return None


def read_image(path: Path, options: AugmentOptions = _DEFAULTS) -> np.ndarray:
    """uint8 ``[H, W, C]`` of ``options.channels``, turned as its EXIF tag says. Of 3 channels: RGB; grey becomes three,
    alpha is dropped. Of 1: grey. Of more: the bands of the file, or its pages. 16-bit values lose their low byte, or
    are scaled by ``options.image_max``.

    Raises:
        DataError: a file that cannot be read or has other channels; names the file and the remedy.
    """
    tiff = _inspect_tiff(path) if path.suffix.lower() in (".tif", ".tiff") else None
    values = None if tiff is None else _read_bands(path, tiff, options)
    by_pil, tag = values is None or tiff is None or tiff.pages > 1, 1 if tiff is None else tiff.orientation
    if values is None:
        try:
            image = _open(path, "image", options.max_pixels)
        except DataError as error:
            if tiff is None or not isinstance(error.__cause__, UnidentifiedImageError):
                raise
            values, by_pil = _by_tifffile(path, "a TIFF of this kind"), False
        else:
            values = _read_by_pil(image, path, options)
            tag = _orientation(image) if tiff is None else tag
    values = _of_channels(_to_bytes(values, path, options.image_max), path, options)
    if tiff is not None and by_pil:  # PIL has turned it
        return values if options.exif_orientation else _turned(values, {6: 8, 8: 6}.get(tag, tag))
    return _turned(values, tag) if options.exif_orientation else values


def _read_by_pil(image: Image.Image, path: Path, options: AugmentOptions) -> np.ndarray:
    """``[H, W]`` or ``[H, W, bands]`` as stored, of 8 bits or of what ``options.image_max`` will scale."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return np.asarray(image)
    try:
        values = np.array(image.convert({1: "L", 3: "RGB"}.get(options.channels, image.mode)))
    except ValueError as error:
        raise DataError(f"{path}: image has mode {image.mode}, which has no RGB; convert it to 8-bit RGB") from error
    if "cut" in image.info and options.image_max not in (None, 65535):
        return _read_16_bits(path, options)
    if "cut" in image.info and options.image_max is None:
        _check_range(int(values.max()) << 8, path)
    return values


def _turned(values: np.ndarray, tag: int) -> np.ndarray:
    """``[H, W, C]`` as the EXIF tag Orientation says."""
    values = values.swapaxes(0, 1) if tag in (5, 6, 7, 8) else values
    values = values[::-1] if tag in (3, 4, 7, 8) else values
    values = values[:, ::-1] if tag in (2, 3, 6, 7) else values
    return np.ascontiguousarray(values)


def as_rgb(image: np.ndarray) -> np.ndarray:
    """What is shown of uint8 ``[H, W, C]``: its first three channels, or of fewer the first one as grey."""
    return image[..., :3] if image.shape[2] >= 3 else np.repeat(image[..., :1], 3, axis=2)


def _of_channels(values: np.ndarray, path: Path, options: AugmentOptions) -> np.ndarray:
    """``[H, W]`` or ``[H, W, bands]`` as ``[H, W, C]``: grey for all three colours."""
    if values.ndim == 2:
        values = np.repeat(values[..., None], 3 if options.channels == 3 else 1, axis=2)
    if values.shape[2] != options.channels:
        raise _wrong_bands(path, values.shape[2], "bands" if values.shape[2] > 1 else "band", options)
    return values


def _wrong_bands(path: Path, count: int, what: str, options: AugmentOptions) -> DataError:
    return DataError(
        f"{path}: image has {count} {what}, the network takes {options.channels} channels; set "
        f"model.backbone.in_chans={count} (and leave data.mean and data.std out, or give them {count} values), or save "
        f"the image with {options.channels}"
    )


def _read_bands(path: Path, tiff: _Tiff, options: AugmentOptions) -> np.ndarray | None:
    """``[H, W, C]`` of a TIFF of several pages or of more bands than PIL reads; None: PIL can."""
    _check_size(path, "image", tiff.width * tiff.height, options.max_pixels)
    if tiff.pages > 1:
        if tiff.pages != options.channels or tiff.bands != 1:
            raise _wrong_bands(path, tiff.pages, "pages", options)
        pages = [np.asarray(_open(path, "image", options.max_pixels, page)) for page in range(tiff.pages)]
        return np.stack(pages, axis=2)
    alpha = bool(tiff.extra) and tiff.extra[0] in (1, 2)
    colour = tiff.photometric in (2, 5, 6, 8) or (tiff.bands == 2 and alpha)  # RGB, CMYK, YCbCr, Lab; grey and alpha
    if tiff.bands == 1 or (options.channels in (1, 3) and colour and tiff.bands <= 4):
        return None
    if tiff.bands != options.channels:
        raise _wrong_bands(path, tiff.bands, "bands", options)
    if tiff.bands == 4 and tiff.photometric == 2 and tiff.bits == 8 and alpha:
        return None
    return _by_tifffile(path, f"a TIFF of {tiff.bands} bands")


def _by_tifffile(path: Path, what: str) -> np.ndarray:
    """The first page, ``[H, W]`` or ``[H, W, bands]``."""
    try:
        import tifffile
    except ImportError as error:
        raise DataError(
            f"{path}: {what} is read by tifffile, not installed here: pip install tifffile imagecodecs"
        ) from error
    try:
        with tifffile.TiffFile(path) as file:
            values, axes = file.pages[0].asarray(), file.pages[0].axes
    except Exception as error:
        reason = " ".join(str(error).replace(str(path), "file").split()) or type(error).__name__
        remedy = "pip install imagecodecs" if "imagecodecs" in reason else "replace or remove the file"
        raise DataError(f"{path}: image cannot be read ({reason}); {remedy}") from error
    return np.moveaxis(values, 0, 2) if axes.startswith("S") else values


def _read_16_bits(path: Path, options: AugmentOptions) -> np.ndarray:
    """uint16 ``[H, W, C]`` of a colour image, which PIL would cut to 8 bits."""
    with open(path, "rb") as file:
        if file.read(4) != b"\x89PNG":
            return _by_tifffile(path, "a colour TIFF of 16 bits")[..., : options.channels]
    try:
        from torchvision.io import ImageReadMode, decode_image
    except ImportError as error:  # they are to leave torchvision one day
        raise DataError(
            f"{path}: colour PNG of 16 bits, of which PIL reads 8; save it as TIFF or with 8 bits"
        ) from error
    content = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return decode_image(content, ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()[..., : options.channels]


def _to_bytes(values: np.ndarray, path: Path, image_max: float | None) -> np.ndarray:
    """uint8; see :func:`read_image`."""
    if values.dtype in (np.uint8, np.bool_):
        return values.astype(np.uint8, copy=False)
    if image_max is not None:
        return (np.clip(values.astype(np.float32) / np.float32(image_max), 0, 1) * 255 + 0.5).astype(np.uint8)
    what = "of floating point values" if values.dtype.kind == "f" else "holds values outside 0..65535"
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise DataError(
            f"{path}: image {what}; convert it to 8 or 16 bits, or set data.image_max to the value that is white "
            f"({values.max():g} is its largest)"
        )
    _check_range(int(values.max()), path)
    return (values.astype(np.int64) >> 8).astype(np.uint8)


def _check_range(top: int, path: Path) -> None:
    """Refuses 10, 12 or 14 bits stored in 16, which would be nearly black."""
    if 0 < top < 1 << 14:
        bits = next(bits for bits in (8, 10, 12, 14) if top < 1 << bits)
        raise DataError(
            f"{path}: the largest value of this 16-bit image is {top}, so its range may be {bits} bits; set "
            f"data.image_max={(1 << bits) - 1} (or 65535 if the image is only dark)"
        )


# --------------------------------------------------------------------------------------------------------- labels


SMALLEST_VALUE, LARGEST_VALUE = -32768, 65535  # of a label map


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
        self._table = np.full(LARGEST_VALUE - SMALLEST_VALUE + 1, -1, np.int16)
        for value, label in mapping.items():
            self._table[value - SMALLEST_VALUE] = label
        self.identity = class_map is None and not color_map
        if color_map:
            keys = np.array([(r << 16) | (g << 8) | b for r, g, b in color_map], np.int64)
            order = np.argsort(keys)
            self._colors = keys[order]
            self._color_labels = np.array(list(color_map.values()), np.uint8)[order]

    def __call__(self, path: Path, max_pixels: int = _DEFAULTS.max_pixels) -> np.ndarray:
        """uint8 ``[H, W]`` with classes and 255.

        Raises:
            DataError: unreadable file, or a value that is no class; names the file, the value and the pixel.
        """
        if self.color_map:
            image = open_label(path, max_pixels)
            return self._from_colors(np.asarray(image.convert("RGB")), path)
        return self.translate(read_values(path, max_pixels), path)

    def translate(self, values: np.ndarray, path: Path) -> np.ndarray:
        """uint8 ``[H, W]`` of integers or booleans ``[H, W]`` that were read from `path`; errors as on calling."""
        if values.dtype.kind == "u" and values.dtype.itemsize <= 2:
            labels = self._table[-SMALLEST_VALUE:][values]
            bad = labels < 0
        else:
            wide = values.astype(np.int64)
            outside = (wide < SMALLEST_VALUE) | (wide > LARGEST_VALUE)
            labels = self._table[np.where(outside, 0, wide) - SMALLEST_VALUE]
            bad = outside | (labels < 0)
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
            f"{shown}{more}; {_occurrences(values[bad])}); {self._hint(values, bad)}{self.remedy}"
        )

    def _hint(self, values: np.ndarray, bad: np.ndarray) -> str:
        """Where one value is unknown and one class does not occur, the line that makes the one the other."""
        unknown, known = np.unique(values[bad]).tolist(), set(np.unique(values[~bad]).tolist())
        absent = [c for c in range(self.num_classes) if c not in known]
        if not self.identity or len(unknown) != 1 or len(absent) != 1:
            return ""
        line = class_map_line(self.num_classes, unknown[0], absent[0])
        return f"if {unknown[0]} is class {absent[0]}, set {line}; else "


def class_map_line(num_classes: int, value: int, label: int) -> str:
    """The key to paste that makes `value` class `label` and leaves the other classes as they are."""
    mapping = {c: c for c in range(num_classes) if c != label} | {value: label}
    inner = ", ".join(f"{key}: {mapped}" for key, mapped in mapping.items())
    return f'"data.class_map={{{inner}}}"'


def open_label(path: Path, max_pixels: int = _DEFAULTS.max_pixels) -> Image.Image:
    image = _open(path, "label map", max_pixels)
    if image.format in ("JPEG", "MPO"):
        raise DataError(
            f"{path}: label map is a JPEG, whose compression changes values, mostly at the boundaries; make it again "
            "as PNG from what it was drawn in"
        )
    return image


def read_values(path: Path, max_pixels: int = _DEFAULTS.max_pixels) -> np.ndarray:
    """The integers ``[H, W]`` of a label map as they are stored (PIL scales those of 1, 2 and 4 bits)."""
    try:
        image = open_label(path, max_pixels)
    except DataError as error:
        tiff = _inspect_tiff(path)
        if tiff is None or tiff.bands > 1 or not isinstance(error.__cause__, UnidentifiedImageError):
            raise
        values = _by_tifffile(path, "a label map of this kind")
        if values.dtype.kind not in "iub":
            raise DataError(f"{path}: label map holds {values.dtype}, wanted integers; save class numbers") from error
        return values
    return stored_values(image, path)


def stored_values(image: Image.Image, path: Path) -> np.ndarray:
    """Those of an opened image of one channel."""
    tiff = _inspect_tiff(path) if path.suffix.lower() in (".tif", ".tiff") else None
    if tiff is not None and (tiff.pages > 1 or tiff.bands > 1):
        what = f"{tiff.pages} pages" if tiff.pages > 1 else f"{tiff.bands} bands"
        raise DataError(f"{path}: label map has {what}, wanted one of integers; save that one alone")
    if image.mode not in ("L", "P", "1", "I") and not image.mode.startswith("I;16"):
        raise DataError(
            f"{path}: label map has mode {image.mode}, wanted one channel of integers; "
            "save class numbers as grey PNG or give data.color_map (split: data set 'folder')"
        )
    values = np.asarray(image)
    if "stored" in image.info:
        largest = image.info["stored"]
        full = 65535 if largest > 255 else 255
        values = ((values.astype(np.int64) * largest + full // 2) // full).astype(np.uint16)
    return values


def _occurrences(values: np.ndarray, form: str = "{}", most: int = 8) -> str:
    """``"5 such pixels: 3 of 12, 2 of 77"``, the most frequent value first."""
    found, counts = np.unique(values, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most]
    listed = ", ".join(f"{counts[i]} of {form.format(int(found[i]))}" for i in order)
    more = f", and {len(found) - most} other values" if len(found) > most else ""
    return f"{values.size} such pixel{'s' if values.size > 1 else ''}: {listed}{more}"
