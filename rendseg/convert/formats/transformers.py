"""Hugging Face transformers, ``UperNetForSemanticSegmentation``: a folder of the Hub's layout."""

from ..registry import Format, Part, Read, pair
from ..rules import KEY, QUERY, VALUE, Rule


def _batch_norm(theirs: str, ours: str) -> tuple[Rule, ...]:
    return pair(theirs, ours, ".conv", ".batch_norm")


_NORMS: Rule = ("hidden_states_norms.stage{s+1}.*", "output_norms.{s}.*")


def _swin(prefix: str, attention: tuple[Rule, ...], mlp: tuple[Rule, ...]) -> tuple[Rule, ...]:
    block = prefix + "encoder.layers.{s}.blocks.{i}."
    target = "net.layers_{s}.blocks.{i}."
    return (
        (f"{prefix}embeddings.patch_embeddings.projection.*", "net.patch_embed.proj.*"),
        (f"{prefix}embeddings.norm.*", "net.patch_embed.norm.*"),
        (f"{block}layernorm_before.*", f"{target}norm1.*"),
        (f"{block}layernorm_after.*", f"{target}norm2.*"),
        *((block + rule[0], target + rule[1], *rule[2:]) for rule in (*attention, *mlp)),  # type: ignore[misc]
        (f"{prefix}encoder.layers.{{s}}.downsample.*", "net.layers_{s+1}.downsample.*"),
        _NORMS,
    )


_BIAS = "attn.relative_position_bias_table"
_OLD_ATTENTION: tuple[Rule, ...] = (
    ("attention.self.query.*", "attn.qkv.*", QUERY),
    ("attention.self.key.*", "attn.qkv.*", KEY),
    ("attention.self.value.*", "attn.qkv.*", VALUE),
    ("attention.self.relative_position_bias_table", _BIAS),
    ("attention.output.dense.*", "attn.proj.*"),
)
_NEW_ATTENTION: tuple[Rule, ...] = (
    ("attention.q_proj.*", "attn.qkv.*", QUERY),
    ("attention.k_proj.*", "attn.qkv.*", KEY),
    ("attention.v_proj.*", "attn.qkv.*", VALUE),
    ("attention.relative_position_bias.relative_position_bias_table", _BIAS),
    ("attention.o_proj.*", "attn.proj.*"),
)
_SWIN = {"model.backbone.output_norm": True, "model.backbone.pad_before_shift": True}

FORMAT = Format(
    models=(
        Part(
            "upernet",
            "decode_head.fpn_bottleneck.conv.weight",
            (
                *_batch_norm("decode_head.psp_modules.{i}.1", "decoder.ppm.branches.{i}"),
                *_batch_norm("decode_head.bottleneck", "decoder.ppm.fuse"),
                *_batch_norm("decode_head.lateral_convs.{i}", "decoder.lateral{i+2}"),
                *_batch_norm("decode_head.fpn_convs.{i}", "decoder.output{i+2}"),
                *_batch_norm("decode_head.fpn_bottleneck", "decoder.fuse"),
                ("decode_head.classifier.*", "decoder.classifier.*"),
                *_batch_norm("auxiliary_head.convs.{i}", "auxiliary.0.convs.{i}"),
                *_batch_norm("auxiliary_head.conv_cat", "auxiliary.0.conv_cat"),
                ("auxiliary_head.classifier.*", "auxiliary.0.classifier.*"),
            ),
            settings={
                "model.name": "segmenter",
                "model.decoder.name": "upernet",
                "model.decoder.preset": "transformers",
                "align_corners": False,
            },
        ),
    ),
    backbones=(
        Part(
            "swin",
            "encoder.layers.0.blocks.0.attention.self.query.weight",
            _swin(
                "",
                _OLD_ATTENTION,
                (("intermediate.dense.*", "mlp.fc1.*"), ("output.dense.*", "mlp.fc2.*")),
            ),
            (
                "encoder.layers.{s}.blocks.{i}.attention.self.relative_position_index",
                "layernorm.*",
                "swin.layernorm.*",  # saved so by its version 5
            ),
            _SWIN,
        ),
        Part(
            "swin",
            "swin.encoder.layers.0.blocks.0.attention.q_proj.weight",
            _swin("swin.", _NEW_ATTENTION, (("mlp.fc{k}.*", "mlp.fc{k}.*"),)),
            (
                "swin.layernorm.*",
                "swin.encoder.layers.{s}.blocks.{i}.attention.relative_position_bias.relative_position_index",
            ),
            _SWIN,
        ),
        Part(
            "convnext",
            "encoder.stages.0.layers.0.dwconv.weight",
            (
                ("embeddings.patch_embeddings.*", "net.stem_0.*"),
                ("embeddings.layernorm.*", "net.stem_1.*"),
                ("encoder.stages.{s}.downsampling_layer.{k}.*", "net.stages_{s}.downsample.{k}.*"),
                ("encoder.stages.{s}.layers.{i}.dwconv.*", "net.stages_{s}.blocks.{i}.conv_dw.*"),
                ("encoder.stages.{s}.layers.{i}.layernorm.*", "net.stages_{s}.blocks.{i}.norm.*"),
                ("encoder.stages.{s}.layers.{i}.pwconv{k}.*", "net.stages_{s}.blocks.{i}.mlp.fc{k}.*"),
                ("encoder.stages.{s}.layers.{i}.layer_scale_parameter", "net.stages_{s}.blocks.{i}.gamma"),
                _NORMS,
            ),
            settings={"model.backbone.output_norm": True},
        ),
        Part(
            "resnet",
            "embedder.embedder.convolution.weight",
            (
                ("embedder.embedder.convolution.*", "net.conv1.*"),
                ("embedder.embedder.normalization.*", "net.bn1.*"),
                ("encoder.stages.{s}.layers.{i}.shortcut.convolution.*", "net.layer{s+1}.{i}.downsample.0.*"),
                ("encoder.stages.{s}.layers.{i}.shortcut.normalization.*", "net.layer{s+1}.{i}.downsample.1.*"),
                ("encoder.stages.{s}.layers.{i}.layer.{k}.convolution.*", "net.layer{s+1}.{i}.conv{k+1}.*"),
                ("encoder.stages.{s}.layers.{i}.layer.{k}.normalization.*", "net.layer{s+1}.{i}.bn{k+1}.*"),
            ),
            settings={"model.backbone.output_stride": 32},
            asks={"model.backbone.stride_in_1x1": "true or false"},
        ),
    ),
    prefix="backbone.",
    settings={"model.pad": "none"},
    asks={"data.mean": "--normalize"},
    reads=(
        Read("backbone_config.downsample_in_bottleneck", "model.backbone.stride_in_1x1", None, False),
        Read("pool_scales", "model.decoder.bins", list, (1, 2, 3, 6)),
        Read("auxiliary_loss_weight", "auxiliary_weight"),
        Read("image_mean", "data.mean"),
        Read("image_std", "data.std"),
    ),
)
