"""What a data set of several tasks (``broden``) adds to the engine: the classes that its model needs, and the metrics
of the tasks besides ``object``. The order of its batches is in ``order.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rendseg.engine.config import Config, ConfigError
from rendseg.engine.loader import Sample
from rendseg.models.registry import decoder_names, decoder_options_class

if TYPE_CHECKING:
    from accelerate import Accelerator


# ------------------------------------------------------------------------------------------------------ configuration


def with_tasks(config: Config, dataset: Any) -> Config:
    """``config`` with the decoder's numbers of classes and ``loss.ignore_index`` as the data set has them.

    Raises ``ConfigError`` where the configuration says otherwise, and for a decoder of one task on data of several.
    """
    classes: dict[str, list[str]] | None = getattr(dataset, "task_classes", None)
    if classes is None:
        return config
    decoder = dict(config.model["decoder"])
    found = decoder_options_class(decoder["name"]).of_tasks(classes, dataset.object_parts)
    if found is None and len(classes) > 1:
        able = [name for name in decoder_names() if decoder_options_class(name).of_tasks({}, ()) is not None]
        raise ConfigError(
            f"the data has the tasks {', '.join(classes)}, the decoder {decoder['name']!r} only object: set "
            f"model.decoder.name={' or '.join(able)}, or data.tasks=[object]"
        )
    for key, value in (found or {}).items():
        if decoder.get(key) not in (None, value):
            raise ConfigError(f"model.decoder.{key} differs from what the data has ({value}): remove the key")
        decoder[key] = value
    loss = {**config.model["loss"], "ignore_index": dataset.ignore_index}
    return dataclasses.replace(config, model={**config.model, "decoder": decoder, "loss": loss})


# ------------------------------------------------------------------------------------------------------------ metrics


class TaskMetrics:
    """Counts of the tasks besides ``object``, as int64, so that they add up over batches and processes.

    ``part``, ``material`` and ``texture``: a confusion matrix ``[C, C + 1]`` over labelled pixels, whose last column
    is "none" (a part where the object predicted has none). ``scene``, and ``texture`` where one class covers all
    labelled pixels of an image: images, and those whose class (of texture: the most frequent one) is right.
    """

    def __init__(self, task_classes: Mapping[str, Sequence[str]], ignore_index: int, device: torch.device) -> None:
        self.names = {task: list(names) for task, names in task_classes.items() if task != "object"}
        self.ignore_index = ignore_index
        self.counts: dict[str, Tensor] = {}
        for task, names in self.names.items():
            if task != "scene":
                size = (len(names), len(names) + 1)
                self.counts[task] = torch.zeros(size, dtype=torch.int64, device=device)
            if task in ("scene", "texture"):
                self.counts[f"{task} images"] = torch.zeros(2, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, network: Any, images: Tensor, samples: Sequence[Sample]) -> None:
        """Predict ``images [B, 3, H, W]`` and count them against the ``labels`` of their samples."""
        if not any(task in sample["labels"] for sample in samples for task in self.names):
            return
        predicted = network.predict_tasks(images)
        for i, sample in enumerate(samples):
            for task, label in sample["labels"].items():
                if task in self.names:
                    self._count(task, predicted[task][i], label.to(images.device))

    def _count(self, task: str, guess: Tensor, label: Tensor) -> None:
        valid = label != self.ignore_index
        if task == "scene":
            self.counts["scene images"] += torch.stack([valid, valid & (guess == label)]).long()
            return
        classes = len(self.names[task])
        truth, found = label[valid], guess[valid]
        found = torch.where(found < 0, classes, found)
        key = truth * (classes + 1) + found
        self.counts[task] += torch.bincount(key, minlength=classes * (classes + 1)).view(classes, classes + 1)
        if task == "texture" and truth.numel() and bool((truth == truth[0]).all()):
            right = torch.bincount(found, minlength=classes).argmax() == truth[0]
            self.counts["texture images"] += torch.stack([torch.ones_like(right), right]).long()

    def reduce(self, accelerator: Accelerator) -> TaskMetrics:
        """Sums the counts over all processes, in place. Call it once."""
        for name, value in self.counts.items():
            self.counts[name] = accelerator.reduce(value, reduction="sum")  # type: ignore[assignment]
        return self

    def compute(self) -> dict[str, Any]:
        """Plain numbers by task. IoU as in :class:`SegmentationMetrics`: a class that is neither labelled nor predicted
        (on labelled pixels) is None and left out of the mean; what has nothing to count is None."""
        result: dict[str, Any] = {}
        for task, names in self.names.items():
            values: dict[str, Any] = {}
            if task != "scene":
                confusion = self.counts[task].cpu().double()
                hit, truth, guess = confusion.diagonal(), confusion.sum(1), confusion.sum(0)[: len(names)]
                union = truth + guess - hit
                iou = [h / u if u else None for h, u in zip(hit.tolist(), union.tolist(), strict=True)]
                present = [value for value in iou if value is not None]
                pixels = float(truth.sum())
                values = {
                    "miou": sum(present) / len(present) if present else None,
                    "pixel_accuracy": float(hit.sum()) / pixels if pixels else None,
                    "per_class_iou": dict(zip(names, iou, strict=True)),
                    "num_pixels": int(pixels),
                }
            if f"{task} images" in self.counts:
                images, right = self.counts[f"{task} images"].tolist()
                values["image_accuracy"] = right / images if images else None
                values["num_images"] = images
            result[task] = values
        return result


def task_metrics(network: nn.Module, dataset: Any, device: torch.device) -> TaskMetrics | None:
    """Metrics for the tasks of a data set besides ``object``; None where it has none."""
    classes = getattr(dataset, "task_classes", {})
    if len(classes) < 2:
        return None
    known = getattr(getattr(network, "decoder", None), "classes", {})
    for task, names in classes.items():
        if known.get(task) != len(names):
            raise ConfigError(
                f"the data has {len(names)} classes of {task}, the model {known.get(task, 0)}: use the data that it "
                "was trained on, or set data.tasks"
            )
    return TaskMetrics(classes, dataset.ignore_index, device)


def task_lines(result: Mapping[str, Any]) -> list[str]:
    """Lines for the table of an evaluation, in percent; none without tasks."""
    lines = []
    for task, values in result.get("tasks", {}).items():
        shown = (("mIoU", "miou"), ("pixel accuracy", "pixel_accuracy"), ("image accuracy", "image_accuracy"))
        parts = [f"{title} {100 * values[key]:.2f}" for title, key in shown if values.get(key) is not None]
        lines.append(f"{task}: {', '.join(parts) or 'no labels'}")
    return lines
