"""The loss of set prediction with masks: Mask2Former (Cheng et al. 2022), section 3.3.

Shapes: L layers, B images, Q queries, K classes, T_b targets of image b, N matched pairs, P points, H W grid of logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .. import ops

P = ParamSpec("P")
R = TypeVar("R")

# For each layer and each image: the matched queries and their targets, both in the order of the queries.
Assignment = list[list[tuple[np.ndarray, np.ndarray]]]


class Pairs(NamedTuple):
    """N pairs of a query and a target, int64 ``[N]`` each, in the order of images and then of queries."""

    image: Tensor
    query: Tensor
    target: Tensor


class MaskLosses(NamedTuple):
    """``total`` is the weighted sum over all layers; the other three hold the losses of each layer, not weighted."""

    total: Tensor
    classes: Tensor
    cross_entropy: Tensor
    dice: Tensor


def draw_points(images: int, num_points: int, device: torch.device) -> Tensor:
    """The points of the matching, ``[B, P, 2]``, shared by all queries and targets of an image."""
    return torch.rand(images, num_points, 2, device=device)


def class_costs(class_logits: Tensor, padded_labels: Tensor) -> Tensor:
    """Minus the probability of the class of each target: ``[B, Q, T]`` float32."""
    index = padded_labels.unsqueeze(1).expand(-1, class_logits.shape[1], -1)
    return -class_logits.detach().float().softmax(-1).gather(2, index)


def assign(costs: Sequence[Tensor], counts: Sequence[int]) -> Assignment:
    """The cheapest assignment for each ``[B, Q, T]`` of ``costs`` and each image, by one copy to the host.

    A NaN or infinite cost becomes the largest float32, so that such a pair is chosen last.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("the matching of queries and targets needs SciPy: pip install scipy") from error
    largest = torch.finfo(torch.float32).max
    host = torch.stack(list(costs)).nan_to_num(largest, largest, largest).cpu().numpy()
    return [
        [linear_sum_assignment(image[:, :count]) for image, count in zip(layer, counts, strict=True)] for layer in host
    ]


def match(
    class_logits: Sequence[Tensor],
    mask_logits: Sequence[Tensor],
    padded_labels: Tensor,
    targets: Sequence[Tensor],
    *,
    class_weight: float,
    mask_weight: float,
    dice_weight: float,
    num_points: int,
    **options: Any,
) -> Assignment:
    """The assignment of every layer. Each image of a layer is sampled once, at its own random points."""
    costs = []
    with torch.no_grad():
        for classes, masks in zip(class_logits, mask_logits, strict=True):
            coords = draw_points(masks.shape[0], num_points, masks.device)
            entropy, dice = ops.mask_costs(masks, targets, coords, **options)
            costs.append(
                mask_weight * entropy + dice_weight * dice + class_weight * class_costs(classes, padded_labels)
            )
        return assign(costs, [len(target) for target in targets])


def to_pairs(assignment: Assignment, device: torch.device) -> list[Pairs]:
    """The pairs of each layer, by one copy to the device."""
    layers = [
        np.concatenate(
            [np.stack((np.full_like(query, b), query, target)) for b, (query, target) in enumerate(layer)], 1
        )
        for layer in assignment
    ]
    packed = torch.from_numpy(np.concatenate(layers, 1)).to(device, torch.int64)
    return [Pairs(*part) for part in packed.split([layer.shape[1] for layer in layers], 1)]


def pair_losses(
    mask_logits: Tensor,
    targets: Sequence[Tensor],
    pairs: Pairs,
    num_points: int,
    oversample_ratio: float,
    importance_ratio: float,
    *,
    padding_mode: str = "zeros",
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and dice ``[N]`` of each pair, at points where its query is uncertain."""
    coords = ops.sample_uncertain_points(
        mask_logits,
        num_points,
        oversample_ratio,
        importance_ratio,
        class_index=pairs.query,
        image_index=pairs.image,
        padding_mode=padding_mode,
    )
    return ops.mask_losses(mask_logits, targets, coords, *pairs, padding_mode=padding_mode, **options)


def largest_size(masks: Sequence[Tensor]) -> tuple[int, int] | None:
    """The size of the batch after padding; ``None`` if no mask needs any."""
    sizes = [tuple(mask.shape[-2:]) for mask in masks]
    if len(set(sizes)) <= 1:
        return None
    return max(height for height, _ in sizes), max(width for _, width in sizes)


def class_targets(pairs: Pairs, padded_labels: Tensor, queries: int, no_object: int) -> Tensor:
    """The class of each query, ``[B, Q]``: that of its target, or ``no_object``."""
    classes = padded_labels.new_full((padded_labels.shape[0], queries), no_object)
    classes[pairs.image, pairs.query] = padded_labels[pairs.image, pairs.target]
    return classes


def mean_over_processes(count: int, device: torch.device) -> Tensor:
    """``count`` summed over the processes and divided by their number, at least 1."""
    total = torch.tensor(float(count), device=device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return total.clamp(min=1)


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, which ``torch.compile`` calls as it is between two graphs.

    SciPy cannot be traced, and the number of pairs differs from step to step. ``torch.compiler.disable`` as a decorator
    would import the compiler for everybody.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call


class MaskCriterion(nn.Module):
    """The losses of a network that predicts a set of masks, for all of its layers in one call.

    Each layer is matched by itself: the cost of a query and a target is a weighted sum of minus the probability of its
    class, and of the cross-entropy and dice loss of its mask at ``num_points`` random points. The costs of all layers
    and images go to the host together, and SciPy's ``linear_sum_assignment`` runs there. The mask losses of the matched
    pairs are taken at points where the prediction is uncertain (PointRend, section 3.2), and divided by the number of
    targets, averaged over the processes of ``torch.distributed``.

    Args:
        num_classes: ``K``; class ``K`` is "no object".
        class_weight: of the class, in the cost and in ``total``.
        mask_weight: of the cross-entropy of the mask, in both.
        dice_weight: of the dice loss, in both.
        no_object_weight: of a query without target within the class loss.
        num_points: ``P``, for the matching and for the losses.
        oversample_ratio: see ``rendseg.ops.sample_uncertain_points``.
        importance_ratio: see there.
        label_mode: how targets are sampled, ``"bilinear"`` or ``"nearest"``.
        padding_mode: ``"zeros"`` or ``"border"``.

    Raises:
        ValueError: an argument out of range.
    """

    class_weights: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        no_object_weight: float = 0.1,
        num_points: int = 12544,
        oversample_ratio: float = 3.0,
        importance_ratio: float = 0.75,
        label_mode: str = "bilinear",
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if num_points < 1:
            raise ValueError(f"num_points must be at least 1, got {num_points}")
        weights = {"class_weight": class_weight, "mask_weight": mask_weight, "dice_weight": dice_weight}
        for name, weight in {**weights, "no_object_weight": no_object_weight}.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"{name} must be at least 0 and finite, got {weight}")
        if not any(weights.values()):
            raise ValueError("class_weight, mask_weight and dice_weight are all zero: at least one must be positive")
        self.num_classes = num_classes
        self.weights = weights
        self.num_points = num_points
        self.oversample_ratio = oversample_ratio
        self.importance_ratio = importance_ratio
        self.label_mode = label_mode
        self.padding_mode = padding_mode
        class_weights = torch.ones(num_classes + 1)
        class_weights[-1] = no_object_weight
        self.register_buffer("class_weights", class_weights, persistent=False)

    @untraced
    def forward(
        self,
        class_logits: Sequence[Tensor] | Tensor,
        mask_logits: Sequence[Tensor] | Tensor,
        labels: Sequence[Tensor],
        masks: Sequence[Tensor],
        canvas: tuple[int, int] | None = None,
    ) -> MaskLosses:
        """Args:
            class_logits: L tensors ``[B, Q, K + 1]``.
            mask_logits: L tensors ``[B, Q, H, W]``.
            labels: B tensors ``[T_b]`` int64 in ``[0, K)``; any ``T_b`` may be zero.
            masks: B tensors ``[T_b, h_b, w_b]``, bool, integer or floating; they are not converted.
            canvas: the size that the mask logits cover, as after padding the masks with zeros at the right and at the
                bottom. ``None``: the largest height and the largest width of ``masks``.

        Returns:
            ``MaskLosses``: a scalar, and three tensors ``[L]``, float32. Without any target the mask losses are zero,
            and still have a graph.

        Raises:
            ValueError: numbers or shapes that do not fit together.
            ImportError: SciPy is not installed.
        """
        classes, logits = list(class_logits), list(mask_logits)
        self._check(classes, logits, labels, masks)
        canvas = canvas or largest_size(masks)
        padded = pad_sequence(list(labels), batch_first=True)
        options: dict[str, Any] = {"label_mode": self.label_mode, "padding_mode": self.padding_mode, "canvas": canvas}
        assignment = match(classes, logits, padded, masks, num_points=self.num_points, **self.weights, **options)
        divisor = mean_over_processes(sum(len(mask) for mask in masks), logits[0].device)
        points = self.num_points, self.oversample_ratio, self.importance_ratio
        losses = []
        for at_classes, at_masks, pairs in zip(classes, logits, to_pairs(assignment, padded.device), strict=True):
            entropy, dice = pair_losses(at_masks, masks, pairs, *points, **options)
            wanted = class_targets(pairs, padded, at_masks.shape[1], self.num_classes)
            losses.append((self._class_loss(at_classes, wanted), entropy.sum() / divisor, dice.sum() / divisor))
        by_kind = [torch.stack(kind) for kind in zip(*losses, strict=True)]
        total = sum((weight * kind.sum() for weight, kind in zip(self.weights.values(), by_kind, strict=True)))
        return MaskLosses(torch.as_tensor(total), *by_kind)

    def _class_loss(self, logits: Tensor, wanted: Tensor) -> Tensor:
        loss = F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), self.class_weights, reduction="sum")
        # Without targets and with a no-object weight of zero, nothing is weighed: the loss is zero, and not 0 / 0.
        return loss / self.class_weights[wanted].sum().clamp(min=torch.finfo(torch.float32).tiny)

    def _check(
        self, classes: list[Tensor], logits: list[Tensor], labels: Sequence[Tensor], masks: Sequence[Tensor]
    ) -> None:
        if len(classes) != len(logits) or not classes:
            raise ValueError(
                "class_logits and mask_logits must hold one tensor for each layer, "
                f"got {len(classes)} and {len(logits)}"
            )
        for at_classes, at_masks in zip(classes, logits, strict=True):
            if at_masks.dim() != 4:
                raise ValueError(f"mask_logits must have shape [B, Q, H, W], got {list(at_masks.shape)}")
            size = [*at_masks.shape[:2], self.num_classes + 1]
            if list(at_classes.shape) != size or at_masks.shape[:2] != logits[0].shape[:2]:
                raise ValueError(
                    f"class_logits must have shape [B, Q, K + 1] = {size}, and B and Q must be those of every layer, "
                    f"got {list(at_classes.shape)}"
                )
        images = logits[0].shape[0]
        if len(labels) != images or len(masks) != images:
            raise ValueError(
                f"labels and masks must hold one tensor for each of the {images} images, "
                f"got {len(labels)} and {len(masks)}"
            )
        for b, (label, mask) in enumerate(zip(labels, masks, strict=True)):
            if label.dim() != 1 or mask.dim() != 3 or label.shape[0] != mask.shape[0]:
                raise ValueError(
                    f"labels[{b}] and masks[{b}] must have shapes [T] and [T, h, w], "
                    f"got {list(label.shape)} and {list(mask.shape)}"
                )
            # On a GPU this look would wait for the device.
            if label.device.type == "cpu" and bool(((label < 0) | (label >= self.num_classes)).any()):
                raise ValueError(f"labels[{b}] must lie in [0, K) = [0, {self.num_classes}), got {label.tolist()}")

    def extra_repr(self) -> str:
        weights = ", ".join(f"{name}={weight:g}" for name, weight in self.weights.items())
        return f"num_classes={self.num_classes}, {weights}, num_points={self.num_points}"
