"""detectron2's PointRend and PointSup: the inference loop of instance masks, and the point functions where they are
used."""

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..nn.point_head import plain_layers
from ..reference import HeadLayers
from ._points import bare, own_randomness, patch_sample, patch_selection, same, small
from ._replace import Report, known, name_subclasses, overridden, replace

# The projects are imported as detectron2.projects.point_rend, or from their folders as point_rend and point_sup.
CONSUMERS = (
    ("point_rend.mask_head", True),
    ("point_rend.semantic_seg", True),
    ("point_sup.mask_head", False),
    ("point_sup.point_utils", False),
)
LOOP = "_subdivision_inference"
PIECES = (LOOP, "_point_pooler", "_get_point_logits")


def apply(report: Report) -> None:
    for path, selects in CONSUMERS:
        names = (f"detectron2.projects.{path}", path)
        found = [module for module in map(imported, names) if module is not None]
        if not found:
            report.keep(names[0], "cannot be imported, and neither can " + path)
        for module in found:
            if path == CONSUMERS[0][0]:
                patch_loop(report, module)
            if hasattr(module, "point_sample"):
                patch_sample(report, module)
            if selects:
                patch_selection(report, module)
    report.keep(
        "point_rend.point_features",
        "its functions serve callbacks that are not known; the modules that import them are changed instead",
    )


def imported(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


class _Head:
    """A ``StandardPointHead`` as ``ops.refine`` takes it, which runs the whole loop in one call where it can."""

    def __init__(self, head: Any) -> None:
        self.head = head

    def __call__(self, fine: Tensor, coarse: Tensor) -> Any:
        return self.head(fine, coarse)

    def refine_parameters(self) -> HeadLayers | None:
        plain = plain_layers(self.head, [*self.head.fc_layers, self.head.predictor])
        return (
            None
            if plain is None or "forward" in vars(self.head)
            else HeadLayers(*plain, self.head.coarse_pred_each_layer, False)
        )


def patch_loop(report: Report, module: ModuleType) -> None:
    """Replace the loop of ``PointRendMaskHead``, where the mask of a class is all that is kept of it."""
    kind = getattr(module, "PointRendMaskHead", None)
    if kind is None:
        report.keep(f"{module.__name__}.PointRendMaskHead", "is not there in this version")
        return
    if not known(report, kind, LOOP, takes=("self", "features", "mask_representations", "instances")):
        return
    original = getattr(kind, LOOP)

    def subdivide(self: Any, features: Any, mask_representations: Tensor, instances: Any) -> Any:
        why = overridden(self, kind, PIECES) or unusual(self, module, features, mask_representations)
        if why:
            report.keep(f"{type(self).__module__}.{type(self).__qualname__}", f"{why}: its own code runs")
        counts = [len(found) for found in instances]
        if why or sum(counts) == 0 or self.training or torch.jit.is_tracing():
            return original(self, features, mask_representations, instances)
        maps = [features[name] for name in self.mask_point_in_features]
        boxes = torch.cat([found.pred_boxes.tensor for found in instances]).float()
        classes = torch.cat([found.pred_classes for found in instances])
        images = torch.arange(len(counts), device=boxes.device)
        width, height = _extent(self, self.mask_point_in_features[0], maps[0])
        logits = ops.refine(
            mask_representations,
            maps,
            _Head(self.point_head),
            steps=_first_steps(self, mask_representations) + self.mask_point_subdivision_steps,
            num_points=self.mask_point_subdivision_num_points,
            output="class",
            rois=(
                images.repeat_interleave(torch.tensor(counts, device=boxes.device), output_size=sum(counts)),
                boxes / boxes.new_tensor([width, height, width, height]),
            ),
            class_index=torch.zeros_like(classes) if mask_representations.shape[1] == 1 else classes,
        )
        module.mask_rcnn_inference(logits, instances)  # takes a single class for that of the mask
        return instances

    def compute() -> tuple[Tensor, Tensor]:
        results = []
        for loop in (subdivide, original):
            head, *arguments = _example(kind, module)
            results.append(torch.cat([found.pred_masks for found in loop(head, *arguments)]))
        return results[0], results[1]

    if same(report, kind, LOOP, compute):
        replace(report, kind, LOOP, subdivide, "rendseg.ops.refine, one class of each mask")
    name_subclasses(report, kind, PIECES)


def _standard(module: ModuleType) -> Any:
    """The class of the usual point head beside a module of PointRend."""
    point_head: Any = importlib.import_module(module.__name__.rpartition(".")[0] + ".point_head")
    return point_head.StandardPointHead


def _extent(head: Any, name: str, map_: Tensor) -> tuple[float, float]:
    """Width and height of a map in pixels of the images, by which the original divides."""
    scale = head._feature_scales[name]
    return map_.shape[3] / scale, map_.shape[2] / scale


def _first_steps(head: Any, coarse: Tensor) -> int:
    """How often the coarse masks double before the size at which the original predicts every cell; 0: never so."""
    side, doubled = coarse.shape[-1], 0
    while side < head.mask_point_subdivision_init_resolution:
        side, doubled = 2 * side, doubled + 1
    return doubled if side == head.mask_point_subdivision_init_resolution else 0


def unusual(head: Any, module: ModuleType, features: Any, coarse: Tensor) -> str:
    """Says in what a mask head differs from one whose loop is that of ``ops.refine``; empty: in nothing."""
    if type(head.point_head) is not _standard(module):
        return f"its point head is a {type(head.point_head).__name__} and no StandardPointHead"
    if head.point_head.predictor.out_channels != coarse.shape[1]:
        return "its point head has another number of classes than its coarse masks"
    if coarse.shape[2] != coarse.shape[3]:
        return f"its coarse masks are not square, {coarse.shape[2]} x {coarse.shape[3]}"
    names = head.mask_point_in_features
    if len({_extent(head, name, features[name]) for name in names}) > 1:
        return f"the maps {', '.join(names)} cover images of different sizes"
    first, points = head.mask_point_subdivision_init_resolution, head.mask_point_subdivision_num_points
    steps = head.mask_point_subdivision_steps
    if _first_steps(head, coarse) == 0 or points < first**2 or (steps > 0 and points >= 4 * first**2):
        return f"{points} points at a time do not predict every cell of {first} x {first} first and then fewer"
    return ""


def _example(kind: Any, module: ModuleType) -> tuple[Any, ...]:
    """A small mask head with the parts of the usual one, and the arguments of its loop for two images."""
    structures: Any = importlib.import_module("detectron2.structures")
    generator = torch.Generator().manual_seed(0)
    with own_randomness():
        layers = [nn.Conv1d(7, 5, 1), nn.Conv1d(8, 3, 1)]
    for layer in layers:
        with torch.no_grad():
            layer.weight.normal_(0, 0.7, generator=generator)
    point_head = bare(_standard(module), fc1=layers[0], fc_layers=layers[:1], predictor=layers[1])
    point_head.coarse_pred_each_layer = True
    head = bare(
        kind,
        mask_point_in_features=["p2"],
        _feature_scales={"p2": 0.25},
        mask_point_subdivision_init_resolution=4,
        mask_point_subdivision_steps=2,
        mask_point_subdivision_num_points=20,
        point_head=point_head,
    )
    corners = torch.rand(3, 2, generator=generator) * 10
    boxes = torch.cat((corners, corners + 4 + 8 * torch.rand(3, 2, generator=generator)), 1)
    classes, instances = torch.tensor([2, 0, 1]), []
    for part in (slice(0, 2), slice(2, 3)):
        found = structures.Instances((20, 24))
        found.pred_boxes, found.pred_classes = structures.Boxes(boxes[part]), classes[part]
        instances.append(found)
    return head.eval(), {"p2": small(4)}, torch.randn(3, 3, 2, 2, generator=generator), instances
