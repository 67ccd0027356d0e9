"""Unified Perceptual Parsing (Xiao et al. 2018), section 3.2: UPerNet with heads for several kinds of labels at once.

N images, H W their size; h w the size of the finest level, of stride s.

========== ======== =============================== ==================================== ==================
task       on       head                            labels                               loss, weight
========== ======== =============================== ==================================== ==================
object     fused    3x3, 1x1                        ``[N, H, W]``                        as every decoder's
part       fused    3x3, 1x1 for all objects' parts ``[N, H, W]``                        see below, 0.5
material   p2       3x3, 1x1                        ``[N, H, W]``                        cross-entropy, 1
texture    p2, no   four 3x3 of 128, 1x1            ``[N, H, W]``, or ``[N]``: the whole cross-entropy, 1
           gradient                                 image
scene      PPM      3x3, mean over the map, 1x1     ``[N]``                              cross-entropy, 0.25
========== ======== =============================== ==================================== ==================

The object task is the decoder's own (``coarse``), so that PointRend, evaluation and export treat the model like any
other. A batch holds the labels of some tasks; a task without labels costs nothing and has loss 0, whose graph reaches
the head's parameters, so that processes of a distributed run agree on what has gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._options import Count, NonNegative, Whole, read
from ..nn.conv import ConvNorm, make_classifier
from .auxiliary import labels_at_cells
from .backbones import Backbone
from .decoder import DecoderOutput, Targets
from .losses import segmentation_loss, widened
from .pointrend import PointRend
from .registry import register_decoder
from .segmenter import Segmenter
from .upernet import UPerNet, UPerNetOptions, UPerNetPreset

TASKS = ("object", "part", "material", "texture", "scene")


class UPPOptions(UPerNetOptions):
    """Options of ``upp``: those of ``upernet``, and the tasks. Numbers of classes left ``None`` come from the data set
    (which fills them in before training); a task without classes has no head."""

    preset: UPerNetPreset = "rendseg"
    """As for ``upernet``, but ``rendseg`` has the layers of ``csail``, and that has ``pool`` prroi, as in the authors'
    multi-task code."""
    scene_classes: Whole | None = None
    part_classes: Whole | None = None
    """Names of parts: what ``part`` labels count."""
    material_classes: Whole | None = None
    texture_classes: Whole | None = None
    object_parts: tuple[tuple[int, ...], ...] | None = None
    """``[object, part, part, ...]`` for every object that has parts: which of the parts are its."""
    scene_weight: NonNegative = 0.25
    part_weight: NonNegative = 0.5
    material_weight: NonNegative = 1.0
    texture_weight: NonNegative = 1.0
    texture_channels: Count = 128
    texture_convs: Count = 4
    """3x3 convolutions of the texture head."""

    @classmethod
    def of_tasks(
        cls, classes: Mapping[str, Sequence[str]], object_parts: Sequence[Sequence[int]]
    ) -> dict[str, Any] | None:
        found: dict[str, Any] = {f"{task}_classes": len(names) for task, names in classes.items() if task != "object"}
        return {**found, "object_parts": [list(group) for group in object_parts]}


def _head(channels: int, classes: int, norm: str, width: int | None = None, convs: int = 1) -> nn.Sequential:
    """``convs`` 3x3 convolutions with norm and ReLU, then a 1x1 one."""
    width = width or channels
    widths = [channels, *[width] * convs]
    layers = [ConvNorm(a, b, 3, norm=norm) for a, b in zip(widths, widths[1:], strict=False)]
    return nn.Sequential(*layers, make_classifier(width, classes))


class UPP(UPerNet):
    """UPerNet whose classifier is the object task, with the heads of the other tasks.

    ``forward`` gives the object task's coarse logits alone; ``task_logits`` the others', ``task_losses`` their
    losses, of which ``UnifiedSegmenter`` has the labels. Modules are called ``classifier`` (the object head),
    ``scene_head``, ``part_head``, ``material_head`` and ``texture_head``.

    Parts: an object of ``object_parts`` owns one channel for "no part" and one for each of its parts. In an image where
    at least one of them is labelled, its pixels (by the object labels) are classified among these, where a pixel
    without a part of the object counts as "no part"; the loss is the sum over objects of the mean over these pixels.
    """

    def __init__(
        self,
        in_channels: Mapping[str, int],
        strides: Mapping[str, int],
        num_classes: int,
        options: UPPOptions | None = None,
        **switches: Any,
    ) -> None:
        s = read(UPPOptions, switches, start=options)
        if s.preset in ("rendseg", "csail"):
            s = dataclasses.replace(s, preset="csail", pool=s.pool or "prroi")
        super().__init__(in_channels, strides, num_classes, s)
        counts = {task: getattr(s, f"{task}_classes") for task in TASKS[1:]}
        self.weights = {task: getattr(s, f"{task}_weight") for task in TASKS[1:]}
        self.classes = {"object": num_classes, **{task: count for task, count in counts.items() if count}}
        self.object_parts = self._check_parts(s.object_parts or (), num_classes, s.part_classes or 0)
        channels, fused = self.feature_channels[self.outputs[0]], self.feature_channels["fused"]
        if isinstance(self.classifier, nn.Conv2d) and self.classifier.kernel_size == (1, 1):
            self.classifier = _head(fused, num_classes, s.norm)
        if s.scene_classes:
            self.scene_head = _head(channels, s.scene_classes, s.norm)
        if s.part_classes:
            self.part_head = _head(fused, sum(map(len, self.object_parts)), s.norm)
        if s.material_classes:
            self.material_head = _head(channels, s.material_classes, s.norm)
        if s.texture_classes:
            self.texture_head = _head(channels, s.texture_classes, s.norm, s.texture_channels, s.texture_convs)
        self._part_tables(num_classes, s.part_classes or 0)

    @staticmethod
    def _check_parts(
        object_parts: Sequence[Sequence[int]], num_classes: int, part_classes: int
    ) -> tuple[tuple[int, ...], ...]:
        if bool(object_parts) != bool(part_classes):
            raise ValueError(
                f"part_classes ({part_classes}) and object_parts ({len(object_parts)} objects) need each other"
            )
        seen = set()
        for owner, *parts in object_parts:
            if not 0 <= owner < num_classes or owner in seen:
                raise ValueError(f"object_parts must begin with different objects 0..{num_classes - 1}, got {owner}")
            seen.add(owner)
            if not parts or len(set(parts)) < len(parts) or not all(0 <= p < part_classes for p in parts):
                raise ValueError(
                    f"object_parts of object {owner} must be different parts 0..{part_classes - 1}, got {parts}"
                )
        return tuple(tuple(group) for group in object_parts)

    def _part_tables(self, num_classes: int, part_classes: int) -> None:
        """``group_of [num_classes]``: object -> group or -1. ``slots [G, K]``: channels of a group's "no part" and
        parts, -1 beyond. ``place [G, part_classes + 1]``: part -> place among the slots, 0 for "no part"."""
        groups = len(self.object_parts)
        group_of = torch.full((num_classes,), -1)
        slots = torch.full((groups, max(map(len, self.object_parts), default=1)), -1)
        place = torch.zeros(groups, part_classes + 1, dtype=torch.int64)
        first = 0
        for g, (owner, *parts) in enumerate(self.object_parts):
            group_of[owner] = g
            slots[g, : 1 + len(parts)] = torch.arange(first, first + 1 + len(parts))
            place[g, parts] = torch.arange(1, 1 + len(parts))
            first += 1 + len(parts)
        for name, table in (("group_of", group_of), ("slots", slots), ("place", place)):
            self.register_buffer(name, table, persistent=False)

    group_of: Tensor
    slots: Tensor
    place: Tensor

    def task_logits(self, output: DecoderOutput, task: str) -> Tensor:
        """Logits of a task other than ``object``: ``[N, classes, h, w]``; of ``scene`` ``[N, classes]``; of ``part``
        the channels of all groups."""
        finest = output.features[self.outputs[0]]
        if task == "scene":
            *convs, last = self.scene_head
            x = output.features[self.outputs[-1]]
            for layer in convs:
                x = layer(x)
            return last(x.mean((2, 3), keepdim=True)).flatten(1)
        if task == "part":
            return self.part_head(output.features["fused"])
        if task == "material":
            return self.material_head(finest)
        return self.texture_head(finest.detach())

    def extra_losses(
        self, output: DecoderOutput, labels: Tensor, ignore_index: int, **shared: Any
    ) -> dict[str, Tensor]:
        return self.task_losses(output, Targets(labels), ignore_index)

    def task_losses(self, output: DecoderOutput, targets: Targets, ignore_index: int) -> dict[str, Tensor]:
        """The weighted losses of the tasks besides ``object``, whose labels are ``targets.tasks``."""
        losses = {}
        for task in self.classes:
            if task == "object":
                continue
            if task not in targets.tasks:
                head = getattr(self, f"{task}_head")
                losses[f"loss_{task}"] = torch.stack([p.float().sum() for p in head.parameters()]).sum() * 0
                continue
            logits = self.task_logits(output, task)
            wanted = targets.tasks[task]
            if task == "scene":
                value = segmentation_loss(logits, wanted, ignore_index=ignore_index)
            elif task == "part":
                size = (logits.shape[2], logits.shape[3])
                objects, parts = (labels_at_cells(labels, size) for labels in (targets.labels, wanted))
                value = self._part_loss(logits, objects, parts, ignore_index)
            else:
                size = (logits.shape[2], logits.shape[3])
                value = segmentation_loss(logits, labels_at_cells(wanted, size), ignore_index=ignore_index)
            losses[f"loss_{task}"] = self.weights[task] * value
        return losses

    def _part_loss(self, logits: Tensor, objects: Tensor, parts: Tensor, ignore_index: int) -> Tensor:
        """``logits [N, channels, h, w]``, ``objects`` and ``parts [N, h, w]`` with ``ignore_index`` -> scalar."""
        logits = widened(logits)
        images, groups = logits.shape[0], len(self.object_parts)
        known = objects != ignore_index
        group = torch.where(known, self.group_of[objects.masked_fill(~known, 0)], -1)
        owned, group = group >= 0, group.clamp(min=0)
        last = self.place.shape[1] - 1  # its column says "no part" for every group
        target = self.place[group, parts.masked_fill(parts == ignore_index, last)]
        slots = self.slots[group].permute(0, 3, 1, 2)
        own = logits.gather(1, slots.clamp(min=0)).masked_fill(slots < 0, -torch.inf)
        loss = F.cross_entropy(own, target.masked_fill(~owned, -100), reduction="none")
        # Sums over the pixels of every (image, group).
        cell = (torch.arange(images, device=group.device)[:, None, None] * groups + group).flatten()

        def per_cell(values: Tensor) -> Tensor:
            return values.new_zeros(images * groups).index_add(0, cell, values.flatten()).view(images, groups)

        labelled = per_cell((owned & (target > 0)).to(loss.dtype)) > 0
        pixels = (per_cell(owned.to(loss.dtype)) * labelled).sum(0)
        return ((per_cell(loss) * labelled).sum(0) / pixels.clamp(min=1)).sum()


class UnifiedSegmenter(Segmenter):
    """A backbone and ``UPP``.

    ``forward(images, labels)``: ``labels`` is a mapping of task to labels (see the module; a task may be absent, also
    ``object``), or the object labels alone. Everything that concerns the object task is as in :class:`Segmenter`;
    :meth:`predict_tasks` predicts all tasks.
    """

    decoder: UPP

    def _targets(self, images: Tensor, labels: Tensor | Mapping[str, Tensor], keys: Tensor | None) -> Targets:
        given = {"object": labels} if isinstance(labels, Tensor) else dict(labels)
        unknown = [task for task in given if task not in self.decoder.classes]
        if unknown:
            raise ValueError(f"labels are of tasks {unknown}; the model has {', '.join(self.decoder.classes)}")
        main = given.pop("object", None)
        if main is None:
            size = (images.shape[0], *images.shape[2:])
            main = torch.full(size, self.loss.ignore_index, device=images.device, dtype=torch.int64)
        tasks = {task: self._task_labels(images, task, value) for task, value in given.items()}
        return super()._targets(images, main, keys)._replace(tasks=tasks)

    def _extra_losses(self, output: DecoderOutput, targets: Targets, shared: Mapping[str, Any]) -> dict[str, Tensor]:
        return self.decoder.task_losses(output, targets, self.loss.ignore_index)

    def _task_labels(self, images: Tensor, task: str, labels: Tensor) -> Tensor:
        """Checked, int64, and of the padded image."""
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"labels of {task} must be an integer tensor, got {labels.dtype}")
        batch, _, height, width = images.shape
        whole = labels.dim() == 1 and task in ("scene", "texture")
        if labels.shape != ((batch,) if whole else (batch, height, width)) or (task == "scene" and not whole):
            wanted = {"scene": f"[B] = [{batch}]", "texture": f"[B] or [B, H, W] = {[batch, height, width]}"}
            raise ValueError(
                f"labels of {task} must have shape {wanted.get(task, f'[B, H, W] = {[batch, height, width]}')} as in "
                f"images, got {list(labels.shape)}"
            )
        labels = labels.long()
        if task == "scene":
            return labels
        if whole:
            labels = labels[:, None, None].expand(batch, height, width)
        return self._pad_labels(labels)

    @torch.no_grad()
    def predict_tasks(self, images: Tensor) -> dict[str, Tensor]:
        """The prediction of every task, int64: ``object``, ``material`` and ``texture`` ``[B, H, W]``, ``scene [B]``,
        and ``part [B, H, W]``: among the parts of the object predicted there, -1 for none."""
        self._need_evaluation_mode()
        height, width = images.shape[-2:]
        padded = self._pad(images)
        decoded, maps = self._features(padded)
        found = self._segment(padded, decoded, maps, (height, width), "labels", False)
        assert found.labels is not None
        objects = found.labels.long()
        results = {"object": objects}
        for task in self.decoder.classes:
            if task == "object":
                continue
            logits = self.decoder.task_logits(decoded, task).float()
            if task == "scene":
                results[task] = logits.argmax(1)
                continue
            factor = self.decoder.feature_strides["fused"]
            if task == "part":
                results[task] = self._part_labels(logits, objects, factor)
            else:
                results[task] = self.placing.enlarge(logits, factor, (height, width)).argmax(1)
        return results

    def _part_labels(self, logits: Tensor, objects: Tensor, factor: int) -> Tensor:
        result = torch.full_like(objects, -1)
        size = (objects.shape[1], objects.shape[2])
        for group in self.decoder.group_of[objects.unique()].tolist():
            if group < 0:
                continue
            owner, *parts = self.decoder.object_parts[group]
            first = int(self.decoder.slots[group, 0])
            own = self.placing.enlarge(logits[:, first : first + 1 + len(parts)], factor, size)
            names = torch.tensor([-1, *parts], device=objects.device)
            result = torch.where(objects == owner, names[own.argmax(1)], result)
        return result


class UnifiedPointRend(UnifiedSegmenter, PointRend):
    """PointRend around ``UPP``: it refines the object task."""


@register_decoder("upp", UPPOptions, segmenter=UnifiedSegmenter, pointrend=UnifiedPointRend)
def _build(options: UPPOptions, backbone: Backbone, num_classes: int) -> UPP:
    return UPP(backbone.channels_of, backbone.strides_of, num_classes, options)
