"""Auxiliary heads: Zhao et al. 2017 (PSPNet), section 3.3. N images, C classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.fcn_head import FCNHead
from .losses import weighted_terms, widened
from .options import AuxiliaryOptions


class AuxiliaryHeads(nn.ModuleList):
    """One ``FCNHead`` for each of ``options``, called ``0``, ``1``, ...

    ``channels`` and ``strides`` are those of the maps by name. ``ValueError`` for a level that is not among them.
    """

    def __init__(
        self,
        options: Sequence[AuxiliaryOptions],
        channels: Mapping[str, int],
        strides: Mapping[str, int],
        num_classes: int,
    ) -> None:
        unknown = [head.level for head in options if head.level not in channels]
        if unknown:
            raise ValueError(
                f"the level of an auxiliary head must be a map of the backbone or decoder ({', '.join(channels)}), "
                f"got {unknown[0]!r}"
            )
        super().__init__(
            FCNHead(
                channels[head.level],
                head.channels,
                num_classes,
                num_convs=head.num_convs,
                concat_input=head.concat_input,
                dropout=head.dropout,
                norm=head.norm or "bn",
            )
            for head in options
        )
        self.options = tuple(options)
        self.strides = [strides[head.level] for head in options]

    def losses(self, maps: Mapping[str, Tensor], labels: Tensor, at: Placing, **shared: Any) -> dict[str, Tensor]:
        """``loss_aux_<level>`` of every head, weighted; ``labels [N, H, W]`` of the padded image, ``shared`` as in
        ``loss_term``."""
        losses: dict[str, Tensor] = {}
        for head, options, stride in zip(self, self.options, self.strides, strict=True):
            logits, targets = at.together(head(maps[options.level]), labels, stride)
            name = f"loss_aux_{options.level}"
            losses |= weighted_terms(name, options.weight, options.terms, logits, targets, **shared)
        return losses


class Placing(NamedTuple):
    """How logits of a map of a stride and labels of the image are laid over each other."""

    at: str = "image"
    """``image`` enlarges the logits, ``coarse`` takes the labels at the centres of the map's cells."""
    align_corners: bool = False
    resize: bool = False
    """The map has the extent of the image, which was not padded; else it may reach beyond it."""
    ignore_index: int = 255

    def together(self, logits: Tensor, labels: Tensor, stride: int) -> tuple[Tensor, Tensor]:
        """Logits and labels of the same size."""
        if self.at == "image":
            return self.enlarge(logits, stride, (labels.shape[1], labels.shape[2])), labels
        height, width = logits.shape[2:]
        if not self.resize:
            pad = (0, width * stride - labels.shape[2], 0, height * stride - labels.shape[1])
            labels = F.pad(labels, pad, value=self.ignore_index)
        return logits, labels_at_cells(labels, (height, width))

    def enlarge(self, logits: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
        """Logits of ``size`` (height, width), upsampled bilinearly by ``stride`` and cropped, or resized. Half logits
        are widened to float32 first, and come in the layout that losses read."""
        logits = widened(logits).contiguous()
        full = size if self.resize else (logits.shape[2] * stride, logits.shape[3] * stride)
        if full != (logits.shape[2], logits.shape[3]):
            logits = F.interpolate(logits, size=full, mode="bilinear", align_corners=self.align_corners)
        return logits[..., : size[0], : size[1]]


def labels_at_cells(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """``[N, H, W]`` -> ``[N, *size]``: the labels at the centres of the cells of a grid over the image."""
    rows, columns = (
        (2 * torch.arange(cells, device=labels.device) + 1) * pixels // (2 * cells)
        for cells, pixels in zip(size, labels.shape[1:], strict=True)
    )
    return labels[:, rows[:, None], columns]
