"""Evaluation of the coarse prediction (bilinearly upsampled) and the refined one side by side, and what it shares with
training and prediction: building the data and the network, and bringing images to the device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rendseg.data import DataError, build_dataset
from rendseg.engine.checkpoint import load_checkpoint, load_weights, write_json
from rendseg.engine.config import Config, ConfigError, EvalConfig, build_config
from rendseg.engine.loader import Sample, evaluation_samples
from rendseg.engine.metrics import SegmentationMetrics
from rendseg.engine.tasks import task_lines, task_metrics

if TYPE_CHECKING:
    from accelerate import Accelerator

KINDS = ("coarse", "refined")


def build_data(config: Config, split: str) -> Any:
    """The data set of a split; ``DataError`` names what is wrong with it."""
    return build_dataset(config.data, split, augment_seed=config.seed)  # type: ignore[arg-type]


def build_network(config: Config, num_classes: int, initialise: bool = True) -> nn.Module:
    """The model of a configuration; ``initialise=False`` does without the backbone's pretrained weights."""
    from rendseg.models import build_model

    options = dict(config.model)
    if not initialise:
        options["backbone"] = {**options["backbone"], "pretrained": False, "checkpoint": None}
    try:
        return build_model(options, num_classes)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise ConfigError(f"the model cannot be built: {error}") from error


def load_trained(
    path: str | Path, overrides: Sequence[str] = ()
) -> tuple[Config, Mapping[str, Any], nn.Module, dict[str, Any]]:
    """Configuration, classes, network with the trained weights, and raw contents of a checkpoint."""
    contents = load_checkpoint(path)
    config = build_config(contents["config"], overrides, source=f"the configuration in {path}")
    classes = contents["classes"]
    network = build_network(config, len(classes["names"]), initialise=False)
    load_weights(network, contents["model"], path)
    return config, classes, network.eval(), contents


def move(batch: tuple[Tensor, Any], device: torch.device) -> tuple[Tensor, Any]:
    """Images and labels (or a dictionary of them) on the device; the copy overlaps with computation where memory is
    pinned."""
    images, labels = batch
    if isinstance(labels, Mapping):
        moved: Any = {task: label.to(device, non_blocking=True) for task, label in labels.items()}
    else:
        moved = labels.to(device, non_blocking=True)
    return images.to(device, non_blocking=True), moved


@torch.no_grad()
def predict_both(network: Any, images: Tensor) -> dict[str, Tensor]:
    """Label maps [B, H, W] of the coarse logits, upsampled bilinearly, and of the refined prediction."""
    output = network.predict(images, output="labels")
    coarse = network.upsample(output.coarse, images.shape[-2:]).argmax(1)
    return {"coarse": coarse, "refined": output.labels}


def _batches(samples: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    """Up to ``size`` consecutive samples of one image size."""
    for _, group in groupby(samples, key=lambda sample: sample["image"].shape):
        while batch := list(islice(group, size)):
            yield batch


def evaluate(
    network: nn.Module,
    dataset: Any,
    options: EvalConfig,
    accelerator: Accelerator,
    stop: Callable[[], bool] | None = None,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Any] | None:
    """Metrics over a data set, the same in every process; None if ``stop()`` became true on the way.

    Each process takes every W-th image and the counts are added up, so no image counts twice.
    """
    count = min(len(dataset), options.limit or len(dataset))
    if count == 0:
        raise DataError("the validation split holds no images")
    metrics = {
        kind: SegmentationMetrics(
            dataset.num_classes, ignore_index=dataset.ignore_index, boundary_ratio=options.boundary_ratio
        ).to(accelerator.device)
        for kind in KINDS
    }
    tasks = task_metrics(network, dataset, accelerator.device)
    network.eval()
    started = time.perf_counter()
    mine = range(accelerator.process_index, count, accelerator.num_processes)
    for batch in _batches(evaluation_samples(dataset, options.num_workers, mine), options.batch_size):
        if stop is not None and stop():
            return None
        images, labels = move(
            (torch.stack([s["image"] for s in batch]), torch.stack([s["label"] for s in batch])), accelerator.device
        )
        with accelerator.autocast():
            predictions = predict_both(network, images)
            if tasks is not None:
                tasks.update(network, images, batch)
        for kind, prediction in predictions.items():
            metrics[kind].update(prediction, labels)
        if progress is not None:
            progress(len(batch))
    result: dict[str, Any] = {"images": count, "seconds": round(time.perf_counter() - started, 3)}
    for kind in KINDS:
        result[kind] = _plain(metrics[kind].reduce(accelerator).compute(), dataset.class_names)
    if tasks is not None:
        result["tasks"] = tasks.reduce(accelerator).compute()
    return result


def _plain(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The metrics with class names as keys and None for what is not defined."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list):
            result[key] = dict(zip(names, value, strict=True))
        else:
            result[key] = None if isinstance(value, float) and math.isnan(value) else value
    return result


# ------------------------------------------------------------------------------------------------------ printing


def summary(result: Mapping[str, Any]) -> str:
    """One line: mIoU, boundary IoU and pixel accuracy, coarse -> refined, in percent."""
    titles = (("mIoU", "miou"), ("boundary IoU", "boundary_iou"), ("pixel accuracy", "pixel_accuracy"))
    return ", ".join(
        f"{title} {_percent(result['coarse'][key])} -> {_percent(result['refined'][key])}" for title, key in titles
    )


def format_table(result: Mapping[str, Any]) -> str:
    """The table that is printed, in percent: IoU and boundary IoU of the coarse and the refined prediction and the
    gain, as the mean over classes and for each class, and the pixel accuracy."""
    coarse, refined = result["coarse"], result["refined"]
    rows = [
        ("mean", [coarse["miou"], refined["miou"], coarse["boundary_iou"], refined["boundary_iou"]]),
        ("pixel accuracy", [coarse["pixel_accuracy"], refined["pixel_accuracy"]]),
    ]
    classes = [
        (name, [part[key][name] for key in ("per_class_iou", "per_class_boundary_iou") for part in (coarse, refined)])
        for name in coarse["per_class_iou"]
    ]
    title = f"{result['images']} images, %"
    width = max(len(name) for name in [title, *(name for name, _ in [*rows, *classes])])
    head = f"{'coarse':>9}{'refined':>9}{'gain':>8}"
    rule = "-" * (width + 2 * len(head) + 3)
    lines = [
        f"{'':<{width}}{'IoU':>{len(head)}}   {'boundary IoU':>{len(head)}}",
        f"{title:<{width}}{head}   {head}",
    ]
    for block in (rows, classes):
        lines.append(rule)
        for name, values in block:
            pairs = zip(values[::2], values[1::2], strict=True)
            lines.append(f"{name:<{width}}" + "   ".join(_pair(a, b) for a, b in pairs))
    return "\n".join([*lines, *task_lines(result)])


def _pair(coarse: float | None, refined: float | None) -> str:
    gain = "-" if coarse is None or refined is None else f"{100 * (refined - coarse):+.2f}"
    return f"{_percent(coarse):>9}{_percent(refined):>9}{gain:>8}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


# ------------------------------------------------------------------------------------------------------- command


def evaluate_checkpoint(path: str | Path, overrides: Sequence[str] = (), out: Path | None = None) -> dict[str, Any]:
    """``rendseg eval``: evaluate a checkpoint on its validation data, print the table, write ``metrics.json``.

    The file goes to ``out``, by default ``<checkpoint without extension>_eval`` beside the checkpoint.
    """
    from tqdm import tqdm

    from rendseg.engine.train import make_accelerator

    config, classes, network, contents = load_trained(path, overrides)
    accelerator = make_accelerator(config)
    dataset = build_data(config, "val")
    if dataset.num_classes != len(classes["names"]):
        raise ConfigError(
            f"{path} was trained on {len(classes['names'])} classes, the data at hand has {dataset.num_classes}"
        )
    network.to(accelerator.device)
    total = min(len(dataset), config.eval.limit or len(dataset))
    with tqdm(total=total, desc="eval", unit="image", disable=not accelerator.is_main_process) as bar:
        step = accelerator.num_processes
        result = evaluate(network, dataset, config.eval, accelerator, progress=lambda n: bar.update(n * step))
    assert result is not None
    if accelerator.is_main_process:
        print(format_table(result))
        out = out or Path(path).parent / f"{Path(path).stem}_eval"
        iteration = contents["training"]["progress"]["iteration"]
        write_json(out / "metrics.json", {"checkpoint": str(path), "iteration": iteration, **result})
        print(f"written to {out / 'metrics.json'}")
    return result
