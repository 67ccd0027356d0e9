"""Auxiliary heads: Zhao et al. 2017 (PSPNet), section 3.3. N images, C classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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

    def losses(
        self,
        maps: Mapping[str, Tensor],
        labels: Tensor,
        *,
        at: str = "image",
        align_corners: bool = False,
        class_weights: Tensor | None = None,
        ignore_index: int = 255,
        mean: str = "valid",
        normalize: str = "process",
    ) -> dict[str, Tensor]:
        """``loss_aux_<level>`` of every head, weighted; ``labels [N, H, W]`` of the padded image.

        ``at="image"`` upsamples the logits by the stride of their map and crops them to the labels, ``"coarse"`` takes
        the labels at the centres of the map's cells.
        """
        losses: dict[str, Tensor] = {}
        for head, options, stride in zip(self, self.options, self.strides, strict=True):
            logits = head(maps[options.level])
            if at == "image":
                logits, targets = enlarge(logits, stride, align_corners), labels
                logits = logits[..., : labels.shape[1], : labels.shape[2]]
            else:
                targets = labels_at_cells(labels, stride, ignore_index)
            losses |= weighted_terms(
                f"loss_aux_{options.level}",
                options.weight,
                options.terms,
                logits,
                targets,
                class_weights=class_weights,
                ignore_index=ignore_index,
                mean=mean,
                normalize=normalize,
            )
        return losses


def enlarge(logits: Tensor, factor: int, align_corners: bool) -> Tensor:
    """Bilinear upsampling; half logits are widened to float32 first, and come in the layout that losses read."""
    logits = widened(logits).contiguous()
    if factor == 1:
        return logits
    size = (logits.shape[2] * factor, logits.shape[3] * factor)
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=align_corners)


def labels_at_cells(labels: Tensor, stride: int, ignore_index: int) -> Tensor:
    """``[N, H, W]`` -> ``[N, ceil(H / stride), ceil(W / stride)]``: the labels at the centres of cells."""
    pad = (0, -labels.shape[2] % stride, 0, -labels.shape[1] % stride)
    if any(pad):
        labels = F.pad(labels, pad, value=ignore_index)
    return labels[:, stride // 2 :: stride, stride // 2 :: stride]
