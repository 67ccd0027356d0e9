"""detectron2 and its project PointRend: ``.pkl`` and ``.pth`` with ``model``; the configuration is a YAML file."""

from typing import Any

from ..registry import Format, Part, Read, only
from ..rules import Rule
from ._rcnn import ASKS, BOXES, SCORES, SETTINGS

_FPN: tuple[Rule, ...] = (
    ("backbone.fpn_lateral{i}.*", "decoder.fpn.fpn_lateral{i}.*"),
    ("backbone.fpn_output{i}.*", "decoder.fpn.fpn_output{i}.*"),
)
_RCNN: tuple[Rule, ...] = (
    ("backbone.fpn_lateral{i+2}.*", "backbone.fpn.inner_blocks.{i}.0.*"),
    ("backbone.fpn_output{i+2}.*", "backbone.fpn.layer_blocks.{i}.0.*"),
    ("proposal_generator.rpn_head.conv.*", "rpn.head.conv.0.0.*"),
    ("proposal_generator.rpn_head.objectness_logits.*", "rpn.head.cls_logits.*"),
    ("proposal_generator.rpn_head.anchor_deltas.*", "rpn.head.bbox_pred.*"),
    ("roi_heads.box_head.fc{i+1}.*", "roi_heads.box_head.fc{i+6}.*"),
    ("roi_heads.box_predictor.cls_score.*", "roi_heads.box_predictor.cls_score.*", SCORES),
    ("roi_heads.box_predictor.bbox_pred.*", "roi_heads.box_predictor.bbox_pred.*", BOXES),
)
# The names of its first version.
_OLD_MASKS: tuple[Rule, ...] = (
    ("roi_heads.mask_coarse_head.coarse_mask_fc{i}.*", "roi_heads.mask_head.coarse_head.fc{i}.*"),
    ("roi_heads.mask_coarse_head.*", "roi_heads.mask_head.coarse_head.*"),
    ("roi_heads.mask_point_head.*", "roi_heads.mask_head.point_head.*"),
)
_MASKS: tuple[Rule, ...] = (
    ("roi_heads.mask_head.coarse_head.*", "roi_heads.mask_head.coarse_head.*"),
    ("roi_heads.mask_head.point_head.*", "roi_heads.mask_head.point_head.*"),
)


def _anchors(sizes: Any) -> list[int]:
    return [int(side) for (side,) in sizes]


def _data_set(names: Any) -> str | None:
    known = {"coco": "coco", "cityscapes": "cityscapes_instances"}
    return next((ours for name in names for start, ours in known.items() if str(name).startswith(start)), None)


# What stands in no file that builds on Base-RCNN-FPN.yaml has detectron2's default.
_READS = (
    Read("MODEL.ANCHOR_GENERATOR.SIZES", "model.anchor_sizes", _anchors, ((32,), (64,), (128,), (256,), (512,))),
    Read(
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS",
        "",
        only([[0.5, 1.0, 2.0]], [[0.5, 1.0, 2.0]] * 5, what="MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"),
    ),
    Read("MODEL.ANCHOR_GENERATOR.OFFSET", "", only(0.0, what="MODEL.ANCHOR_GENERATOR.OFFSET")),
    Read("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "", only("ROIAlignV2", what="MODEL.ROI_BOX_HEAD.POOLER_TYPE")),
    Read("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "", only(7, what="MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION")),
    Read("MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", "", only(0, what="MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO")),
    Read("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", "", only([10.0, 10.0, 5.0, 5.0], what="BBOX_REG_WEIGHTS")),
    Read("MODEL.ROI_MASK_HEAD.IN_FEATURES", "", only(["p2"], what="MODEL.ROI_MASK_HEAD.IN_FEATURES")),
    Read("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", "", only(14, what="MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION")),
    Read("MODEL.POINT_HEAD.IN_FEATURES", "", only(["p2"], what="MODEL.POINT_HEAD.IN_FEATURES")),
    Read("MODEL.POINT_HEAD.SUBDIVISION_STEPS", "model.mask.steps", None, 5),
    Read("MODEL.POINT_HEAD.SUBDIVISION_NUM_POINTS", "model.mask.subdivision_points", None, 784),
    Read("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "model.box_score_thresh"),
    Read("MODEL.ROI_HEADS.NMS_THRESH_TEST", "model.box_nms_thresh"),
    Read("TEST.DETECTIONS_PER_IMAGE", "model.box_detections_per_img"),
    Read("MODEL.RPN.PRE_NMS_TOPK_TEST", "model.rpn_pre_nms_top_n_test"),
    Read("MODEL.RPN.POST_NMS_TOPK_TEST", "model.rpn_post_nms_top_n_test"),
    Read("MODEL.RPN.NMS_THRESH", "model.rpn_nms_thresh"),
    Read("INPUT.MIN_SIZE_TEST", "model.min_size", None, 800),
    Read("INPUT.MAX_SIZE_TEST", "model.max_size", None, 1333),
    Read("DATASETS.TEST", "data.name", _data_set),
)
_DEAD = ("stem.fc.*", "fc.*", "linear.*")
_STRIDE = {"model.backbone.stride_in_1x1": "true or false"}
# Caffe2's names, as in the files of MSRA: norms have a scale and a bias alone. detectron2 drops conv1_b too.
_CAFFE_BRANCHES = {
    "1": ("downsample.0", "downsample.1"),
    **{k: (f"conv{n}", f"bn{n}") for n, k in enumerate(("2a", "2b", "2c"), 1)},
}
_CAFFE: tuple[Rule, ...] = (
    ("conv1_w", "net.conv1.weight"),
    ("res_conv1_bn_s", "net.bn1.weight"),
    ("res_conv1_bn_b", "net.bn1.bias"),
    *(
        (f"res{{s+1}}_{{i}}_branch{branch}_{theirs}", f"net.layer{{s}}.{{i}}.{ours}")
        for branch, (conv, norm) in _CAFFE_BRANCHES.items()
        for theirs, ours in (("w", f"{conv}.weight"), ("bn_s", f"{norm}.weight"), ("bn_b", f"{norm}.bias"))
    ),
)

FORMAT = Format(
    models=(
        Part(
            "pointrend",
            "sem_seg_head.point_head.predictor.weight",
            (
                *_FPN,
                ("sem_seg_head.coarse_sem_seg_head.p{i}.{j}.*", "decoder.p{i}.{j}.*"),
                ("sem_seg_head.coarse_sem_seg_head.predictor.*", "decoder.predictor.*"),
                ("sem_seg_head.point_head.fc{i}.*", "head.fc{i}.*"),
                ("sem_seg_head.point_head.predictor.*", "head.predictor.*"),
            ),
            settings={"model.pointrend.preset": "detectron2", "model.decoder.name": "semantic_fpn"},
            asks={
                "model.pointrend.steps": "MODEL.POINT_HEAD.SUBDIVISION_STEPS",
                "model.pointrend.inference_points": "MODEL.POINT_HEAD.SUBDIVISION_NUM_POINTS",
            },
        ),
        Part(
            "semantic_fpn",
            "sem_seg_head.predictor.weight",
            (
                *_FPN,
                ("sem_seg_head.p{i}.{j}.*", "decoder.p{i}.{j}.*"),
                ("sem_seg_head.predictor.*", "decoder.predictor.*"),
            ),
            settings={
                "model.name": "segmenter",
                "model.pointrend.preset": "detectron2",
                "model.decoder.name": "semantic_fpn",
            },
        ),
        *(
            Part(
                "pointrend_rcnn",
                sign,
                (*_RCNN, *masks),
                ("proposal_generator.anchor_generator.cell_anchors.{i}",),
                settings=SETTINGS,
                asks=ASKS,
                backbone="backbone.body.",
                reads=_READS,
            )
            for sign, masks in (
                ("roi_heads.mask_point_head.predictor.weight", _OLD_MASKS),
                ("roi_heads.mask_head.point_head.predictor.weight", _MASKS),
            )
        ),
    ),
    backbones=(
        Part(
            "resnet (Caffe2)",
            "res2_0_branch2a_w",
            _CAFFE,
            ("conv1_b", "fc1000_w", "fc1000_b", "pred_w", "pred_b"),
            asks=_STRIDE,
            fill={"*.running_mean": 0.0, "*.running_var": 1 - 1e-5},
        ),
        Part(
            "resnet",
            "res2.0.conv1.weight",
            (
                ("stem.conv1.norm.*", "net.bn1.*"),
                ("stem.conv1.weight", "net.conv1.weight"),
                ("res{s+1}.{i}.shortcut.norm.*", "net.layer{s}.{i}.downsample.1.*"),
                ("res{s+1}.{i}.shortcut.weight", "net.layer{s}.{i}.downsample.0.weight"),
                ("res{s+1}.{i}.conv{k}.norm.*", "net.layer{s}.{i}.bn{k}.*"),
                ("res{s+1}.{i}.conv{k}.weight", "net.layer{s}.{i}.conv{k}.weight"),
            ),
            _DEAD,
            asks=_STRIDE,
        ),
    ),
    prefix="backbone.bottom_up.",
    dead=("pixel_mean", "pixel_std"),
    settings={
        "model.pad": 32,
        "model.backbone.output_stride": 32,
        "model.backbone.freeze_norm": True,
        "eval.preset": "detectron2",
    },
    asks={"data.mean": "--normalize"},
    reads=(
        Read("MODEL.RESNETS.STRIDE_IN_1X1", "model.backbone.stride_in_1x1", None, True),
        Read("MODEL.RESNETS.RES5_DILATION", "", only(1, what="MODEL.RESNETS.RES5_DILATION"), 1),
        Read("MODEL.POINT_HEAD.IN_FEATURES", "model.pointrend.point_features", list),
        Read("MODEL.POINT_HEAD.SUBDIVISION_STEPS", "model.pointrend.steps", None, 2),
        Read("MODEL.POINT_HEAD.SUBDIVISION_NUM_POINTS", "model.pointrend.inference_points", None, 8192),
        Read("MODEL.PIXEL_MEAN", "data.mean", list, (103.53, 116.28, 123.675)),
        Read("MODEL.PIXEL_STD", "data.std", list, (1.0, 1.0, 1.0)),
        Read("INPUT.FORMAT", "data.channel_order", {"BGR": "bgr", "RGB": "rgb"}, "BGR"),
    ),
)
