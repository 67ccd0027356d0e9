"""CSAILVision semantic-segmentation-pytorch: two files, ``encoder_*.pth`` and ``decoder_*.pth``."""

from ..registry import IMAGENET, Format, Part, pair
from ..rules import Rule
from ._resnet import STAGES


def sequential(theirs: str, ours: str) -> tuple[Rule, ...]:
    """Convolution and norm of a ``Sequential`` of the decoder."""
    return pair(f"decoder.{theirs}", f"decoder.{ours}", ".0", ".1")


PYRAMID: tuple[Rule, ...] = (
    *sequential("ppm_conv.{i}", "ppm.branches.{i}"),
    *sequential("ppm_last_conv", "ppm.fuse"),
    *sequential("fpn_in.{i}", "lateral{i+2}"),
    *sequential("fpn_out.{i}.0", "output{i+2}"),
)
BACKBONES = (
    Part(
        "resnet_s",
        "conv3.weight",
        (
            ("conv1.weight", "net.conv1.0.weight"),
            ("bn1.*", "net.conv1.1.*"),
            ("conv2.weight", "net.conv1.3.weight"),
            ("bn2.*", "net.conv1.4.*"),
            ("conv3.weight", "net.conv1.6.weight"),
            ("bn3.*", "net.bn1.*"),
            *STAGES,
        ),
        ("fc.*",),
    ),
)
# Left by its own synchronised batch norm.
DEAD = ("*._tmp_running_mean", "*._tmp_running_var", "*._running_iter")
SETTINGS = {
    "model.name": "segmenter",
    "model.pad": "none",
    "model.norm_momentum": 0.001,
    "model.backbone.output_stride": 32,
    "model.backbone.stride_in_1x1": False,
    "align_corners": False,
}

FORMAT = Format(
    models=(
        Part(
            "upernet",
            "decoder.conv_last.1.weight",
            (
                *PYRAMID,
                *sequential("conv_last.0", "fuse"),
                ("decoder.conv_last.1.*", "decoder.classifier.*"),
            ),
            settings={"model.decoder.name": "upernet", "model.decoder.preset": "csail"},
        ),
    ),
    backbones=BACKBONES,
    prefix="encoder.",
    dead=DEAD,
    settings={**SETTINGS, **IMAGENET},
    files=2,
)
