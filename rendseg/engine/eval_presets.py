"""The evaluation conventions of the frameworks, as values of the keys of ``EvalConfig``: ``eval.preset`` sets them at
once, a key given explicitly wins.

============  =========  =============  =============  =============  ================
key           rendseg    mmseg          paddleseg      detectron2     pytorch_encoding
============  =========  =============  =============  =============  ================
merge         softmax    softmax (m1)   softmax (p1)   logits (d1)    exp (e1)
absent        skip       skip (m2)      zero (p2)      ignore_        zero (e2)
                                                       without_label
                                                       (d2)
align_corners false      model (m3)     false (p1)     false (d3)     true (e3)
image_resize  antialias  bilinear (m4)  bilinear (p1)  antialias (d4) aligned (e3)
rounding      half_up    mmcv (m4)      half_up (p1)   short_side     long_side (e4)
                                                       (d4)
chain_scales  false      false          true (p3)      false          false
window_border shift      shift (m5)     shift (p4)     shift          pad (e5)
flip          false      false          false          false          true (e6)
============  =========  =============  =============  =============  ================

Scales, windows and ``base_size`` belong to an experiment rather than to a framework and are left alone; what the
frameworks use is noted below.

mmsegmentation 1.2
    m1 ``models/segmentors/seg_tta.py``: the views' logits, already at the size of the label, through softmax, then the
    mean. Windows are averaged as logits (``encoder_decoder.py``, ``slide_inference``). m2
    ``evaluation/metrics/iou_metric.py``: 0/0 is NaN and ``nanmean`` leaves it out. m3 ``segmentors/base.py``,
    ``postprocess_result``: ``decode_head.align_corners``; the flip is undone before resizing. m4
    ``Resize(scale_factor=r, keep_ratio=True)`` of mmcv: both sides are rounded half up, then the largest factor that
    fits into that box is applied and rounded once more; OpenCV's bilinear, on bytes before normalisation (here: on
    normalised floats). For ``Resize(scale=(2048, 512), keep_ratio=True)`` as on ADE20K set ``eval.base_size: [2048,
    512]``; with several scales that is ``MultiScaleFlipAug`` of 0.x, while 1.x scales the image itself. m5
    ``slide_inference``: the last window is moved back into the image; a small image is used as it is, without padding.
    Usual: scales 0.5 to 1.75 by 0.25 with flip; windows 769 at stride 513 or 512 at stride 341 where set.
PaddleSeg 2.x
    p1 ``core/infer.py``, ``aug_inference``: logits resized to the input's size (half-pixel centres), softmax, sum over
    scales and flips; a scaled side is ``int(side * scale + 0.5)``. p2 ``utils/metrics.py``, ``mean_iou``: union 0 gives
    IoU 0 (after release 2.8.0: 1, ``eval.absent: one``), the mean is over all classes; what it prints as "Class Acc"
    is precision (here ``per_class_precision``). p3
    ``aug_inference`` overwrites the image in its loop over scales, so each scale is made from the one before.
    p4 ``slide_inference``, as m5; logits are averaged.
detectron2
    d1 It has no test-time augmentation for semantic segmentation; ``SemanticSegmentorWithTTA`` of MaskFormer and
    Mask2Former, which users take, averages what the model returns, which is logits for ``SemanticSegmentor`` and
    PointRend. d2 ``evaluation/sem_seg_evaluation.py``: IoU is defined, and averaged, where the class has labelled
    pixels. (On Cityscapes the official script is called, whose rule is ``skip``.) d3 ``modeling/postprocessing.py``,
    ``sem_seg_postprocess``. d4 ``ResizeShortestEdge``: the shorter side is set, the longer one follows, at most
    ``max_size``; PIL's bilinear, which filters when it shrinks, on bytes. For ``MIN_SIZES`` of 512 to 1792 set
    ``eval.base_size: 1024`` and scales 0.5 to 1.75, for ``MAX_SIZE`` ``eval.max_size: 4096``.
PyTorch-Encoding
    e1 ``encoding/models/base.py``, ``module_inference``: in each window the logits of the image and its mirror image
    are added and exponentiated (without normalisation; here in float64, as float32 overflows from a sum of 88); windows
    are averaged, scales added. e2 ``encoding/utils/metrics.py``: inter / (tiny + union), mean over all. e3
    ``up_kwargs``, for images and scores. e4 ``MultiEvalModule.forward``: the longer side is ``ceil(base_size *
    scale)``, the other follows rounded half up. e5 windows stay on their grid; an image, or a window at the border,
    that is too small is padded with black, at the right and the bottom. e6 the default of ``MultiEvalModule``.
    Always windows: usual are ``eval.window: 480``, ``eval.base_size: 520`` and scales 0.5 to 1.75 (Cityscapes: 768,
    2048 and 0.75 to 2.25); the stride of 2/3 of the window is the default here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "rendseg": {
        "merge": "softmax",
        "absent": "skip",
        "align_corners": False,
        "image_resize": "antialias",
        "rounding": "half_up",
        "chain_scales": False,
        "window_border": "shift",
        "flip": False,
    },
    "mmseg": {
        "merge": "softmax",
        "absent": "skip",
        "align_corners": "model",
        "image_resize": "bilinear",
        "rounding": "mmcv",
        "chain_scales": False,
        "window_border": "shift",
        "flip": False,
    },
    "paddleseg": {
        "merge": "softmax",
        "absent": "zero",
        "align_corners": False,
        "image_resize": "bilinear",
        "rounding": "half_up",
        "chain_scales": True,
        "window_border": "shift",
        "flip": False,
    },
    "detectron2": {
        "merge": "logits",
        "absent": "ignore_without_label",
        "align_corners": False,
        "image_resize": "antialias",
        "rounding": "short_side",
        "chain_scales": False,
        "window_border": "shift",
        "flip": False,
    },
    "pytorch_encoding": {
        "merge": "exp",
        "absent": "zero",
        "align_corners": True,
        "image_resize": "aligned",
        "rounding": "long_side",
        "chain_scales": False,
        "window_border": "pad",
        "flip": True,
    },
}

# The keys that a preset decides about; base_size and max_size have a meaning only together with `rounding`.
CONVENTIONS = (*PRESETS["rendseg"], "base_size", "max_size")


def without_conventions(config: Mapping[str, Any]) -> dict[str, Any]:
    """A plain configuration without the conventions in its section ``eval``: a preset named later decides them all."""
    section = config.get("eval")
    if not isinstance(section, Mapping):
        return dict(config)
    return {**config, "eval": {key: value for key, value in section.items() if key not in CONVENTIONS}}
