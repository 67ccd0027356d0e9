"""What frameworks have in common that name the layers of a ResNet as torchvision does."""

from rendseg.convert.rules import Rule

STAGES: tuple[Rule, ...] = (("layer{s}.{i}.*", "net.layer{s}.{i}.*"),)
PLAIN: tuple[Rule, ...] = (("conv1.weight", "net.conv1.weight"), ("bn1.*", "net.bn1.*"), *STAGES)
DEEP: tuple[Rule, ...] = (("conv1.{i}.*", "net.conv1.{i}.*"), ("bn1.*", "net.bn1.*"), *STAGES)
DILATED = {
    "model.backbone.output_stride": "8, 16 or 32",
    "model.backbone.first_dilation": "previous or full",
    "model.backbone.stride_in_1x1": "true or false",
}
