"""CSAILVision unifiedparsing (UPP): two files, ``encoder_*.pth`` and ``decoder_*.pth``. Class 0 is background."""

from ..registry import Format, Part
from .csail import BACKBONES, DEAD, PYRAMID, SETTINGS, sequential

FORMAT = Format(
    models=(
        Part(
            "upp",
            "decoder.object_head.1.weight",
            (
                *PYRAMID,
                *sequential("conv_fusion", "fuse"),
                *sequential("object_head.0", "classifier.0"),
                ("decoder.object_head.1.*", "decoder.classifier.1.*"),
                *sequential("scene_head.0", "scene_head.0"),
                ("decoder.scene_head.2.*", "decoder.scene_head.1.*"),
                *sequential("part_head.0", "part_head.0"),
                ("decoder.part_head.1.*", "decoder.part_head.1.*"),
                *sequential("material_head.0", "material_head.0"),
                ("decoder.material_head.1.*", "decoder.material_head.1.*"),
            ),
            settings={"model.decoder.name": "upp", "model.decoder.preset": "csail"},
            asks={
                "model.decoder.pool": "prroi, or avg (its newer code)",
                "model.decoder.part_classes": "the number of parts",
                "model.decoder.object_parts": "[[object, part, ...], ...] without background",
            },
        ),
    ),
    backbones=BACKBONES,
    prefix="encoder.",
    dead=DEAD,
    settings={
        **SETTINGS,
        "data.mean": [102.9801, 115.9465, 122.7717],
        "data.std": [1.0, 1.0, 1.0],
        "data.pixel_max": 255,
        "data.channel_order": "bgr",
    },
    files=2,
)
