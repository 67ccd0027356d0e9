"""Models as files that run elsewhere: ``rendseg export`` and :func:`load`.

============ ==================================================================================================
``pt2``      a graph of ``torch.export``, run by Python with torch and ``import rendseg.ops``
``aoti``     that graph compiled by AOTInductor for this machine's processor, run by Python or by C++ (see
             ``examples/cpp/segment.cpp``), for which CMake builds ``librendseg_ops``
``onnx``     standard ONNX operators only (``rendseg/onnx/ops.py``), run by onnxruntime and others
============ ==================================================================================================

``pt2`` and ``aoti`` call the operators of rendseg. Every artefact has one input, ``images``: float32 ``[N, 3, H, W]``,
RGB, normalised as in training, ``(value / 255 - mean) / std``; or, with ``preprocessing``, uint8 ``[N, H, W, 3]``, RGB.
Its one output is ``labels`` ``[N, H, W]`` (uint8, int16 beyond 256 classes) or ``logits`` ``[N, C, H, W]`` float32.

What is needed to use it travels in the artefact as a flat mapping of strings, see :func:`metadata`: in ``pt2`` as the
extra file ``metadata.json``, in ``aoti`` as the metadata of the package, in ``onnx`` as ``metadata_props``.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rendseg import __version__, backend
from rendseg.engine.checkpoint import _sync_folder
from rendseg.onnx import files as onnx_files
from rendseg.onnx.ops import StandardOps

FORMATS = ("pt2", "aoti", "onnx")
OUTPUTS = ("labels", "logits")
SUFFIXES = {"pt2": ".pt2", "aoti": ".aoti.pt2", "onnx": ".onnx"}
OPSETS = (18, 23)
_EXTRA = "metadata.json"
_CHECKED = (1, 3)  # batches that are compared where the batch is free; the example has 2
_TOLERANCE = 0.01  # of the pixels; what near-ties of an untrained network do not reach


class ExportError(Exception):
    """A model cannot be exported, or an artefact cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class ExportOptions:
    """What to export. ``size`` is (height, width); it remains the size of the example where the size is free."""

    format: str
    size: tuple[int, int]
    output: str = "labels"
    dynamic_batch: bool = True
    """Any number of images; else ``batch``."""
    dynamic_size: bool = False
    """Any height and width that are multiples of ``step(network)``, at least two of them."""
    batch: int = 1
    preprocessing: bool = False
    """Input uint8 ``[N, H, W, 3]`` instead of normalised float32."""
    opset: int | None = None
    """Of ONNX; ``None``: that of torch.onnx, 18."""

    def __post_init__(self) -> None:
        for name, allowed in (("format", FORMATS), ("output", OUTPUTS)):
            if getattr(self, name) not in allowed:
                raise ExportError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if len(self.size) != 2 or min(self.size) < 1:
            raise ExportError(f"size must be a positive height and width, got {','.join(map(str, self.size))}")
        if self.batch < 1:
            raise ExportError(f"batch must be at least 1, got {self.batch}")
        if self.opset is not None:
            if self.format != "onnx":
                raise ExportError(f"opset is an option of format onnx, not of {self.format}")
            if not OPSETS[0] <= self.opset <= OPSETS[1]:
                raise ExportError(f"opset must lie between {OPSETS[0]} and {OPSETS[1]}, got {self.opset}")


class Exportable(nn.Module):
    """A model of ``rendseg.models`` with one tensor in and one out, ready to be traced; see the module's docstring.

    ``mean`` and ``std`` (of values in [0, 1], in ``channel_order``) make the input uint8 ``[N, H, W, 3]``, RGB.
    """

    def __init__(
        self,
        network: nn.Module,
        output: str = "labels",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        channel_order: str = "rgb",
    ) -> None:
        super().__init__()
        self.network = network
        self.output = output
        self.bgr = channel_order == "bgr"
        self.scale: Tensor | None
        self.shift: Tensor | None
        if mean is not None and std is not None:  # the arithmetic of rendseg.data.augment.to_sample
            deviation = torch.tensor(std, dtype=torch.float32)
            self.register_buffer("scale", (1 / (255 * deviation))[:, None, None])
            self.register_buffer("shift", (-torch.tensor(mean, dtype=torch.float32) / deviation)[:, None, None])
        else:
            self.scale = self.shift = None

    def forward(self, images: Tensor) -> Tensor:
        if self.scale is not None and self.shift is not None:
            images = images.flip(3) if self.bgr else images
            images = torch.addcmul(self.shift, images.permute(0, 3, 1, 2).float(), self.scale)
        found = self.network._predict(images, self.output, False)  # type: ignore[operator]
        return found.labels if self.output == "labels" else found.refined


def step(network: Any) -> int:
    """What a free height and width must be multiples of: every map then has a whole number of cells.

    (A fixed size need not be: the padding that a size wants is then part of the artefact.)
    """
    return math.lcm(network.size_divisor, *network.backbone.strides)


# ---- metadata


def metadata(
    network: Any,
    options: ExportOptions,
    classes: Mapping[str, Any],
    mean: Sequence[float],
    std: Sequence[float],
    channel_order: str = "rgb",
) -> dict[str, str]:
    """What travels with an artefact. Values that are no plain words are JSON.

    ``rendseg``, ``torch`` (versions), ``format``; ``classes`` (names), ``palette``, ``ignore_index``; ``output``;
    ``preprocessing``; ``mean`` and ``std`` in [0, 1], in the order of ``channel_order``, which is that of a float
    input (a uint8 one is RGB); ``batch`` and ``size`` ``[H, W]`` of the example; which of them are free,
    ``dynamic_batch`` and ``dynamic_size``; ``step``, of which a free size is a multiple.
    """
    plain = {
        "rendseg": __version__,
        "torch": str(torch.__version__),
        "format": options.format,
        "output": options.output,
    }
    rest = {
        "classes": list(classes["names"]),
        "palette": [list(map(int, colour)) for colour in classes["palette"]],
        "ignore_index": classes["ignore_index"],
        "preprocessing": options.preprocessing,
        "mean": [float(v) for v in mean],
        "std": [float(v) for v in std],
        "channel_order": channel_order,
        "batch": options.batch,
        "size": list(options.size),
        "dynamic_batch": options.dynamic_batch,
        "dynamic_size": options.dynamic_size,
        "step": step(network),
    }
    return plain | {key: json.dumps(value) for key, value in rest.items()}


# ---- export


def needs(format: str, device: str = "cpu") -> None:
    """Raise ``ExportError`` unless this machine has what an export to ``format`` on ``device`` takes."""
    if format == "onnx":
        missing = onnx_files.missing_packages()
        if missing:
            raise ExportError(
                f"format onnx needs {', '.join(missing)}, not installed here: pip install 'rendseg[export]'"
            )
    if format == "aoti":
        compiler = os.environ.get("CXX") or "g++"
        if shutil.which(compiler) is None:
            raise ExportError(
                f"format aoti needs a C++ compiler, and {compiler!r} is not found: install g++, or set CXX to another"
            )
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ExportError(f"device {device} is asked for, but torch finds no GPU: export with --device cpu")


def export(
    network: nn.Module,
    path: str | os.PathLike[str],
    options: ExportOptions,
    *,
    classes: Mapping[str, Any],
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    channel_order: str = "rgb",
    check: bool = True,
    say: Callable[[str], object] = print,
) -> dict[str, str]:
    """Write ``network`` (in evaluation mode, where its parameters are) to ``path``; returns the metadata.

    ``classes`` is ``{"names", "palette", "ignore_index"}``. With ``check`` the artefact is run on random images and
    compared with the network before it gets its name; ``say`` is told the result. A file that was there before stays
    whole until then. Raises ``ExportError``.
    """
    path = Path(path)
    parameter = next(network.parameters())
    needs(options.format, str(parameter.device))
    _check_size(network, options)
    about = metadata(network, options, classes, mean, std, channel_order)
    channels = network.backbone.in_chans  # type: ignore[union-attr]
    if options.preprocessing and channels != 3:
        raise ExportError(f"preprocessing takes RGB, the network takes {channels} channels")
    network.eval()
    model = Exportable(network, options.output, *((mean, std, channel_order) if options.preprocessing else ())).to(
        parameter.device
    )
    write = {"pt2": _write_pt2, "aoti": _write_aoti, "onnx": _write_onnx}[options.format]
    # A folder, not a file, of another name: archives hold the name under which they were first written.
    folder = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    temporary = folder / path.name
    try:
        folder.mkdir(parents=True)
        # The graph names the operators, not the backend of this process: the one who runs it chooses.
        with _parameters_without_gradient(model), torch.no_grad(), backend("auto"):
            write(model, temporary, options, about)
            if check:
                _compare(model, load(temporary, parameter.device), options, say)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ExportError(f"could not write {path}: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _sync_folder(path.parent)
    return about


def _check_size(network: Any, options: ExportOptions) -> None:
    multiple = step(network)
    if options.dynamic_size and any(side % multiple or side < 2 * multiple for side in options.size):
        up = [max(2, -(-side // multiple)) * multiple for side in options.size]
        raise ExportError(
            f"with a free size, height and width are multiples of {multiple}, at least {2 * multiple}: "
            f"got --size {options.size[0]},{options.size[1]}, take --size {up[0]},{up[1]}, or fix the size"
        )


@contextmanager
def _parameters_without_gradient(model: nn.Module) -> Iterator[None]:
    """The graph of inference: no operator must wonder whether a gradient is wanted."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for p in wanted:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)


def example(model: Exportable, options: ExportOptions, batch: int, seed: int = 0) -> Tensor:
    """Random images: smooth structures under noise, of the kind and on the device that ``model`` takes."""
    generator = torch.Generator().manual_seed(seed)
    height, width = options.size
    network: Any = model.network
    channels = network.backbone.in_chans
    coarse = torch.randn(batch, channels, -(-height // 16) + 1, -(-width // 16) + 1, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True)
    images = images + 0.1 * torch.randn(images.shape, generator=generator)
    if options.preprocessing:
        images = (images * 64 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return images.to(next(model.parameters()).device)


def _trace(model: Exportable, options: ExportOptions) -> torch.export.ExportedProgram:
    from torch.export import Dim

    free: dict[int, Any] = {}
    if options.dynamic_batch:
        free[0] = Dim("batch", min=1)
    if options.dynamic_size:
        multiple = step(model.network)
        first = 1 if options.preprocessing else 2
        free[first] = multiple * Dim("height", min=2)  # type: ignore[operator]
        free[first + 1] = multiple * Dim("width", min=2)  # type: ignore[operator]
    images = example(model, options, 2 if options.dynamic_batch else options.batch)
    try:
        return torch.export.export(model, (images,), dynamic_shapes=(free or None,))
    except Exception as error:  # noqa: BLE001 - torch.export raises many kinds
        remedy = "; with a fixed size it may work: leave out --dynamic-size" if options.dynamic_size else ""
        raise ExportError(f"torch.export cannot trace this network: {_first_line(error)}{remedy}") from error


def _write_pt2(model: Exportable, path: Path, options: ExportOptions, about: Mapping[str, str]) -> None:
    program = _trace(model, options)
    with warnings.catch_warnings():  # weights in channels_last are not contiguous: each is saved whole all the same
        warnings.filterwarnings("ignore", "No complete tensor found")
        torch.export.save(program, path, extra_files={_EXTRA: json.dumps(about)})


def _write_aoti(model: Exportable, path: Path, options: ExportOptions, about: Mapping[str, str]) -> None:
    program = _trace(model, options)
    try:
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs={"aot_inductor.metadata": dict(about)}
        )
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - the compiler's kinds are many
        raise ExportError(f"AOTInductor cannot compile this network: {_first_line(error)}") from error


def _write_onnx(model: Exportable, path: Path, options: ExportOptions, about: Mapping[str, str]) -> None:
    network: Any = model.network
    layout, network.channels_last = network.channels_last, False  # a layout is nothing that ONNX knows
    try:
        with StandardOps():
            program = _trace(model, options)
    finally:
        network.channels_last = layout
    try:
        made = onnx_files.translate(program, options.output, options.opset)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - the exporter raises many kinds
        raise ExportError(f"torch.onnx cannot translate this network: {_first_line(error)}") from error
    onnx_files.save(made, path, about, channels=3 if options.preprocessing else 1)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


# ---- comparison


@dataclass(frozen=True)
class Difference:
    """Of an artefact to the network: the share of pixels with another label, the largest difference of logits."""

    pixels: int
    labels: float
    logits: float | None

    def __str__(self) -> str:
        text = f"{100 * self.labels:.4f} % of {self.pixels} pixels have another label"
        return text if self.logits is None else f"{text}, logits differ by at most {self.logits:.2e}"


def difference(output: Tensor, wanted: Tensor) -> Difference:
    """Compare two label maps ``[N, H, W]`` or logits ``[N, C, H, W]``; ``ExportError`` where shape or dtype differ."""
    output = output.to(wanted.device)
    if output.shape != wanted.shape or output.dtype != wanted.dtype:
        raise ExportError(
            f"the artefact returns {output.dtype} {list(output.shape)}, the network {wanted.dtype} {list(wanted.shape)}"
        )
    largest = None
    if wanted.dim() == 4:
        largest = float((output - wanted).abs().max())
        output, wanted = output.argmax(1), wanted.argmax(1)
    return Difference(wanted.numel(), float((output != wanted).float().mean()), largest)


def _compare(model: Exportable, artefact: Artefact, options: ExportOptions, say: Callable[[str], object]) -> None:
    for batch in _CHECKED if options.dynamic_batch else (options.batch,):
        images = example(model, options, batch, seed=batch)
        found = difference(artefact(images), model(images))
        shape = " x ".join(map(str, images.shape))
        say(f"checked on random images {shape}: {found}")
        if found.labels > _TOLERANCE:
            raise ExportError(
                f"the exported model differs from the network: {found}. An untrained network is full of "
                "near-ties; if that is the cause, --no-check writes the file all the same"
            )


# ---- use


class Artefact:
    """An exported model: ``artefact(images)`` returns labels or logits; ``metadata`` as :func:`metadata` made it."""

    def __init__(self, run: Callable[[Tensor], Tensor], about: Mapping[str, str], path: Path) -> None:
        self._run = run
        self.path = path
        self.metadata = dict(about)

    def value(self, key: str) -> Any:
        """An entry of ``metadata``, parsed."""
        text = self.metadata[key]
        return text if key in ("rendseg", "torch", "format", "output") else json.loads(text)

    def __call__(self, images: Tensor) -> Tensor:
        """Errors: ``TypeError`` and ``ValueError`` for images that the artefact does not take."""
        uint8 = self.value("preprocessing")
        dtype = torch.uint8 if uint8 else torch.float32
        height, width = (1, 2) if uint8 else (2, 3)
        if images.dtype != dtype:
            raise TypeError(f"{self.path.name} takes images of {dtype}, got {images.dtype}")
        batch: Any = "N" if self.value("dynamic_batch") else self.value("batch")
        size: list[Any] = ["H", "W"] if self.value("dynamic_size") else self.value("size")
        channels = len(self.value("mean"))
        shape = [batch, *size, channels] if uint8 else [batch, channels, *size]
        if images.dim() != 4 or any(
            isinstance(w, int) and w != got for w, got in zip(shape, images.shape, strict=True)
        ):
            wanted = ", ".join(map(str, shape))
            raise ValueError(f"{self.path.name} takes images of shape [{wanted}], got {list(images.shape)}")
        multiple = self.value("step")
        if self.value("dynamic_size") and any(
            images.shape[i] % multiple or images.shape[i] == 0 for i in (height, width)
        ):
            raise ValueError(
                f"{self.path.name} takes heights and widths that are multiples of {multiple}, got "
                f"{images.shape[height]} x {images.shape[width]}: pad right and below, and crop the result"
            )
        with torch.no_grad():
            return self._run(images.contiguous())  # compiled packages read memory in that order


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Artefact:
    """Load what ``rendseg export`` wrote, whichever format it is.

    ``device`` is where a ``pt2`` is to run; an ``aoti`` package runs where it was compiled for, ONNX on the CPU.
    Raises ``ExportError`` for a file that is no such artefact.
    """
    import rendseg.ops  # noqa: F401 - registers the operators that the graphs call

    path = Path(path)
    if not path.is_file():
        raise ExportError(f"there is no exported model {path}" + (": it is a folder" if path.is_dir() else ""))
    kind = _kind(path)
    try:
        artefact = {"pt2": _load_pt2, "aoti": _load_aoti, "onnx": _load_onnx}[kind](path, torch.device(device))
    except ExportError:
        raise
    except Exception as error:  # noqa: BLE001 - zip, pickle, protobuf and compiled code fail in many ways
        raise ExportError(f"{path} cannot be loaded as {kind}: {_first_line(error)}") from error
    missing = [key for key in ("classes", "size", "step", "preprocessing") if key not in artefact.metadata]
    if missing:
        raise ExportError(f"{path} was not written by rendseg export: it has no metadata {missing[0]!r}")
    return artefact


def _kind(path: Path) -> str:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any("/data/aotinductor/" in name for name in names):
            return "aoti"
        if any(name.endswith("archive_format") for name in names):
            return "pt2"
    elif path.suffix == ".onnx":
        return "onnx"
    raise ExportError(f"{path} is no exported model: it is neither a .pt2 of torch.export or AOTInductor nor a .onnx")


def _load_pt2(path: Path, device: torch.device) -> Artefact:
    extra = {_EXTRA: ""}
    program = torch.export.load(path, extra_files=extra)
    if device.type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    return Artefact(program.module(), json.loads(extra[_EXTRA] or "{}"), path)


def _load_aoti(path: Path, device: torch.device) -> Artefact:
    compiled = torch._inductor.aoti_load_package(str(path))
    return Artefact(compiled, compiled.get_metadata(), path)


def _load_onnx(path: Path, device: torch.device) -> Artefact:
    if importlib.util.find_spec("onnxruntime") is None:
        raise ExportError(f"{path} needs onnxruntime, not installed here: pip install 'rendseg[export]'")
    run, about = onnx_files.open_file(path)
    return Artefact(run, about, path)


# ---- command


def parse_size(text: str) -> tuple[int, int]:
    """``"360,480"`` or ``"360x480"``, height first."""
    parts = text.lower().replace("x", ",").split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise ExportError(f"--size is written height,width, such as 360,480: got {text!r}")
    return int(parts[0]), int(parts[1])


def default_size(data: Any) -> tuple[int, int]:
    """The size that the configuration trains with."""
    size = getattr(data, "crop_size", None) or getattr(data, "size", None)
    if size is None:
        raise ExportError("the configuration names no size of images (data.crop_size is null): give --size H,W")
    return int(size[0]), int(size[1])


def export_checkpoint(
    checkpoint: str | os.PathLike[str],
    format: str,
    out: str | os.PathLike[str] | None = None,
    *,
    size: tuple[int, int] | None = None,
    device: str = "cpu",
    overrides: Sequence[str] = (),
    check: bool = True,
    say: Callable[[str], object] = print,
    **options: Any,
) -> Path:
    """``rendseg export``: returns the path written, by default the checkpoint's with another suffix.

    ``options`` are those of :class:`ExportOptions`. Raises ``ExportError``, ``CheckpointError``, ``ConfigError``.
    """
    from rendseg.data import parse_options
    from rendseg.engine.assemble import load_trained

    if format not in FORMATS:
        raise ExportError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    needs(format, device)
    checkpoint = Path(checkpoint)
    config, classes, network, _ = load_trained(checkpoint, overrides)
    if config.model["name"] == "pointrend_rcnn":
        raise ExportError(
            f"{checkpoint} is a detector with masks: how many boxes it finds depends on the image, and torch.export "
            "cannot trace torchvision's choice of them; use it from Python (rendseg predict, load_trained)"
        )
    data = parse_options(config.data)
    chosen = ExportOptions(format, size or default_size(data), **options)
    path = Path(out) if out is not None else checkpoint.with_suffix(SUFFIXES[format])
    if path.is_dir():
        raise ExportError(f"--out {path} is a folder: name a file")
    wanted = ".onnx" if format == "onnx" else ".pt2"
    if path.suffix != wanted:
        raise ExportError(f"--out {path} must end in {wanted} for format {format}")
    try:
        network.to(device)
    except RuntimeError as error:
        raise ExportError(f"device {device} cannot be used: {_first_line(error)}") from error
    export(
        network,
        path,
        chosen,
        classes=classes,
        mean=data.mean,
        std=data.std,
        channel_order=data.channel_order,
        check=check,
        say=say,
    )
    say(f"written to {path} ({path.stat().st_size / 2**20:.1f} MiB)")
    return path
