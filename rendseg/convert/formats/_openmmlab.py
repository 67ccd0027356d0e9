"""What mmsegmentation and mmdetection have in common: backbones, and where a configuration has the normalisation."""

from ..registry import Part, Read
from ..rules import MERGE
from ._resnet import DILATED, PLAIN, STAGES

BACKBONES = (
    Part(
        "resnet_v1c, resnet_v1d",
        "stem.0.weight",
        (("stem.7.*", "net.bn1.*"), ("stem.{i}.*", "net.conv1.{i}.*"), *STAGES),
        asks=DILATED,
    ),
    Part("resnet", "layer1.0.conv1.weight", PLAIN, ("fc.*",), asks=DILATED),
    Part(
        "swin",
        "stages.0.blocks.0.attn.w_msa.qkv.weight",
        (
            ("patch_embed.projection.*", "net.patch_embed.proj.*"),
            ("patch_embed.norm.*", "net.patch_embed.norm.*"),
            ("stages.{s}.blocks.{i}.norm{k}.*", "net.layers_{s}.blocks.{i}.norm{k}.*"),
            ("stages.{s}.blocks.{i}.attn.w_msa.*", "net.layers_{s}.blocks.{i}.attn.*"),
            ("stages.{s}.blocks.{i}.ffn.layers.0.0.*", "net.layers_{s}.blocks.{i}.mlp.fc1.*"),
            ("stages.{s}.blocks.{i}.ffn.layers.1.*", "net.layers_{s}.blocks.{i}.mlp.fc2.*"),
            ("stages.{s}.downsample.norm.*", "net.layers_{s+1}.downsample.norm.*", MERGE),
            ("stages.{s}.downsample.reduction.*", "net.layers_{s+1}.downsample.reduction.*", MERGE),
            ("norm{s}.*", "output_norms.{s}.*"),
        ),
        ("stages.{s}.blocks.{i}.attn.w_msa.relative_position_index",),
        {"model.backbone.output_norm": True, "model.backbone.pad_before_shift": True},
    ),
    Part(
        "convnext",
        "stages.0.0.depthwise_conv.weight",
        (
            ("downsample_layers.0.{k}.*", "net.stem_{k}.*"),
            ("downsample_layers.{s}.{k}.*", "net.stages_{s}.downsample.{k}.*"),
            ("stages.{s}.{i}.depthwise_conv.*", "net.stages_{s}.blocks.{i}.conv_dw.*"),
            ("stages.{s}.{i}.norm.*", "net.stages_{s}.blocks.{i}.norm.*"),
            ("stages.{s}.{i}.pointwise_conv{k}.*", "net.stages_{s}.blocks.{i}.mlp.fc{k}.*"),
            ("stages.{s}.{i}.gamma", "net.stages_{s}.blocks.{i}.gamma"),
            ("norm{s}.*", "output_norms.{s}.*"),
        ),
        settings={"model.backbone.output_norm": True},
    ),
)

# By the newer key, then by that of the older versions.
NORMALIZATION = (
    Read("model.data_preprocessor.mean", "data.mean", list),
    Read("model.data_preprocessor.std", "data.std", list),
    Read("model.data_preprocessor.bgr_to_rgb", "data.channel_order", {True: "rgb", False: "bgr"}),
    Read("img_norm_cfg.mean", "data.mean", list),
    Read("img_norm_cfg.std", "data.std", list),
    Read("img_norm_cfg.to_rgb", "data.channel_order", {True: "rgb", False: "bgr"}),
)
