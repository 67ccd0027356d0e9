"""MMDetection: PointRend of objects, ``.pth`` with ``state_dict`` and ``meta``, in which the configuration stands as
text."""

from collections.abc import Iterator
from typing import Any

from ..registry import Format, Part, Read, only
from ..rules import Rule
from ._openmmlab import BACKBONES, NORMALIZATION
from ._rcnn import ASKS, BOXES, SCORES, SETTINGS

_HEAD = "roi_heads.mask_head."
_RULES: tuple[Rule, ...] = (
    ("neck.lateral_convs.{i}.conv.*", "backbone.fpn.inner_blocks.{i}.0.*"),
    ("neck.fpn_convs.{i}.conv.*", "backbone.fpn.layer_blocks.{i}.0.*"),
    ("rpn_head.rpn_conv.*", "rpn.head.conv.0.0.*"),
    ("rpn_head.rpn_cls.*", "rpn.head.cls_logits.*"),
    ("rpn_head.rpn_reg.*", "rpn.head.bbox_pred.*"),
    ("roi_head.bbox_head.shared_fcs.{i}.*", "roi_heads.box_head.fc{i+6}.*"),
    ("roi_head.bbox_head.fc_cls.*", "roi_heads.box_predictor.cls_score.*", SCORES),
    ("roi_head.bbox_head.fc_reg.*", "roi_heads.box_predictor.bbox_pred.*", BOXES),
    ("roi_head.mask_head.downsample_conv.conv.*", _HEAD + "coarse_head.reduce_spatial_dim_conv.*"),
    ("roi_head.mask_head.fcs.{i}.*", _HEAD + "coarse_head.fc{i+1}.*"),
    ("roi_head.mask_head.fc_logits.*", _HEAD + "coarse_head.prediction.*"),
    ("roi_head.point_head.fcs.{i}.conv.*", _HEAD + "point_head.fc{i+1}.*"),
    ("roi_head.point_head.fc_logits.*", _HEAD + "point_head.predictor.*"),
)


def _anchors(given: dict[str, Any]) -> list[int]:
    only([0.5, 1.0, 2.0], what="anchor_generator.ratios")(given["ratios"])
    only([4, 8, 16, 32, 64], what="anchor_generator.strides")(given["strides"])
    (scale,) = given["scales"]
    return [int(scale * stride) for stride in given["strides"]]


def _pooling(given: dict[str, Any]) -> tuple[Any, ...]:
    found = given.get("type"), given.get("output_size"), given.get("sampling_ratio"), given.get("aligned", True)
    only(["RoIAlign", 7, 0, True], what="bbox_roi_extractor.roi_layer")(found)
    return found


def _scales(pipeline: Any) -> Iterator[Any]:
    """The sizes of images, (longer, shorter), of a list of transforms and of those inside them."""
    for step in pipeline:
        if "scale" in step or "img_scale" in step:
            yield sorted(step.get("scale", step.get("img_scale")))
        yield from _scales(step.get("transforms", ()))


def _sides(place: int) -> Any:
    return lambda pipeline: next((scale[place] for scale in _scales(pipeline)), None)


FORMAT = Format(
    models=(
        Part(
            "pointrend_rcnn",
            "roi_head.point_head.fc_logits.weight",
            _RULES,
            settings=SETTINGS,
            asks=ASKS,
            backbone="backbone.body.",
        ),
    ),
    backbones=BACKBONES,
    prefix="backbone.",
    asks={"data.mean": "--normalize"},
    reads=(
        Read("model.backbone.style", "model.backbone.stride_in_1x1", {"pytorch": False, "caffe": True}, "pytorch"),
        Read("model.backbone.dcn", "", only(None, what="backbone.dcn")),
        Read("model.neck.num_outs", "", only(5, what="neck.num_outs")),
        Read("model.neck.add_extra_convs", "", only(False, what="neck.add_extra_convs")),
        Read("model.rpn_head.anchor_generator", "model.anchor_sizes", _anchors),
        Read("model.roi_head.bbox_roi_extractor.roi_layer", "", _pooling),
        Read(
            "model.roi_head.bbox_head.bbox_coder.target_stds",
            "",
            only([0.1, 0.1, 0.2, 0.2], what="bbox_coder.target_stds"),
        ),
        Read("model.roi_head.mask_roi_extractor.featmap_strides", "", only([4], what="mask_roi_extractor.strides")),
        Read(
            "model.roi_head.mask_roi_extractor.roi_layer.output_size", "", only(14, what="mask roi_layer.output_size")
        ),
        Read("model.test_cfg.rcnn.scale_factor", "", only(2, what="test_cfg.rcnn.scale_factor"), 2),
        Read("model.test_cfg.rcnn.mask_thr_binary", "", only(0.5, what="test_cfg.rcnn.mask_thr_binary"), 0.5),
        Read("model.test_cfg.rcnn.subdivision_steps", "model.mask.steps"),
        Read("model.test_cfg.rcnn.subdivision_num_points", "model.mask.subdivision_points"),
        Read("model.test_cfg.rcnn.score_thr", "model.box_score_thresh"),
        Read("model.test_cfg.rcnn.nms.iou_threshold", "model.box_nms_thresh"),
        Read("model.test_cfg.rcnn.max_per_img", "model.box_detections_per_img"),
        Read("model.test_cfg.rpn.nms_pre", "model.rpn_pre_nms_top_n_test"),
        Read("model.test_cfg.rpn.max_per_img", "model.rpn_post_nms_top_n_test"),
        Read("model.test_cfg.rpn.nms.iou_threshold", "model.rpn_nms_thresh"),
        Read("test_pipeline", "model.min_size", _sides(0)),
        Read("test_pipeline", "model.max_size", _sides(1)),
        *NORMALIZATION,
    ),
)
