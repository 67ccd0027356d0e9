"""detectron2 and its project PointRend: ``.pkl`` and ``.pth`` with ``model``; the configuration is a YAML file."""

from ..registry import Format, Part, Read, only
from ..rules import Rule

_FPN: tuple[Rule, ...] = (
    ("backbone.fpn_lateral{i}.*", "decoder.fpn.fpn_lateral{i}.*"),
    ("backbone.fpn_output{i}.*", "decoder.fpn.fpn_output{i}.*"),
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
