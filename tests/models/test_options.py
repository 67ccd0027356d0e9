"""The preset table, and the reading of configurations."""

from __future__ import annotations

import dataclasses

import pytest

from rendseg.models import PRESETS, AuxiliaryOptions, BackboneOptions, parse_options, pointrend_options
from rendseg.models.options import DiceTerm, FocalTerm, LossTerm, OhemTerm, num_points

# What each implementation computes, row by row, written down independently of the code under test.
ROWS = {
    "upsample_align_corners": (False, False, False, False, True),
    "sampling_align_corners": (False, False, False, False, False),
    "padding_mode": ("border", "zeros", "zeros", "zeros", "zeros"),
    "coarse_source": ("original", "original", "original", "original", "current"),
    "point_features": (None, None, None, None, ("c3",)),
    "coarse_first": (False, False, False, False, True),
    "num_layers": (3, 3, 3, 3, 0),
    "hidden_channels": (256, 256, 256, 256, 256),
    "coarse_each_layer": (True, False, True, True, True),
    "init": ("detectron2", "detectron2", "mmseg", "paddleseg", "torch"),
    "train_points": (2048, 2048, 2048, 2048, "width/16"),
    "oversample_ratio": (3.0,) * 5,
    "importance_ratio": (0.75,) * 5,
    "point_loss_mean": ("valid", "valid", "all", "valid", "valid"),
    "coarse_loss_mean": ("valid", "valid", "all", "valid", "valid"),
    "coarse_loss_at": ("image",) * 5,
    "inference_points": (8192, 8192, 8196, 8196, 8096),
    "steps": (None, 2, 2, 2, None),
    "coarse_stride": (None, None, None, 8, None),
}
NAMES = ("rendseg", "detectron2", "mmseg", "paddleseg", "deeplab")
PARTS = {  # coarse-head norm, norm in the pyramid, order of the levels, output stride
    "rendseg": ("bn", "none", "fine_first", 32),
    "detectron2": ("gn", "none", "fine_first", 32),
    "mmseg": ("syncbn", "none", "fine_first", 32),
    "paddleseg": ("none", "bn", "coarse_first", 8),
    "deeplab": ("bn", "none", "fine_first", 8),
}


@pytest.mark.parametrize("name", NAMES)
def test_preset_row(name):
    found = dataclasses.asdict(PRESETS[name])
    assert found.pop("preset") == name
    assert found == {key: values[NAMES.index(name)] for key, values in ROWS.items()}


@pytest.mark.parametrize("name", NAMES)
def test_preset_fills_in_backbone_and_decoder(name):
    options = parse_options({"pointrend": {"preset": name}})
    decoder = options.decoder
    assert (decoder.norm, decoder.neck_norm, decoder.level_order, options.backbone.output_stride) == PARTS[name]
    assert decoder.top_down == ("bilinear_aligned" if name == "paddleseg" else "nearest")
    assert decoder.output_last is (name != "paddleseg")
    assert options.backbone.freeze_norm is False  # nothing is loaded, so there is nothing worth freezing
    loaded = parse_options({"pointrend": {"preset": name}, "backbone": {"pretrained": True}})
    assert loaded.backbone.freeze_norm is (name == "detectron2")


AROUND = {  # pad, momentum of the norms, and Swin's output_norm and pad_before_shift
    "rendseg": ("stride", None, False),
    "detectron2": (32, None, False),
    "mmseg": ("none", None, True),
    "paddleseg": ("none", None, False),
    "deeplab": ("stride", None, False),
    "transformers": ("none", None, True),
    "csail": ("none", 0.001, False),
    "pytorch_encoding": ("none", None, False),
}


@pytest.mark.parametrize("name", list(AROUND))
def test_preset_fills_in_what_is_around_the_decoder(name):
    """By ``pointrend.preset``, or, where that is rendseg, by the decoder's."""
    pad, momentum, swin = AROUND[name]
    sources = [] if name == "detectron2" else [{"decoder": {"name": "upernet", "preset": name}}]
    if name in NAMES:
        sources += [{"pointrend": {"preset": name}}]
        other = {"name": "upernet", "preset": "rendseg" if name == "rendseg" else "csail"}
        sources += [{"pointrend": {"preset": name}, "decoder": other}]
    for source in sources:
        options = parse_options({**source, "backbone": {"name": "swin_tiny_patch4_window7_224"}})
        assert (options.pad, options.norm_momentum) == (pad, momentum)
        assert options.backbone.output_norm is options.backbone.pad_before_shift is swin
        assert parse_options(dataclasses.asdict(options)) == options
        for backbone, wanted in (
            ("convnext_tiny.fb_in1k", swin),
            ("resnet50", False),
            ("swinv2_tiny_window8_256", False),
        ):
            assert parse_options({**source, "backbone": {"name": backbone}}).backbone.output_norm is wanted
    for backbone, wanted in (
        ("resnet50", True),
        ("resnet101.tv_in1k", True),
        ("resnet50d", False),
        ("resnet18", False),
    ):
        options = parse_options({**sources[-1], "backbone": {"name": backbone}}).backbone
        assert options.stride_in_1x1 is (wanted and name == "detectron2")
    timm = parse_options({**sources[-1], "backbone": {"name": "resnet50", "pretrained": True}})
    assert timm.backbone.stride_in_1x1 is False  # its weights are of networks that stride in the 3x3
    given = parse_options({**sources[0], "pad": 64, "norm_momentum": 0.5, "backbone": {"output_norm": True}})
    assert (given.pad, given.norm_momentum, given.backbone.output_norm) == (64, 0.5, True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", list(ROWS))
def test_every_switch_can_be_overridden(name, key):
    other = {
        "padding_mode": ("zeros", "border"),
        "coarse_source": ("original", "current"),
        "init": ("torch", "mmseg"),
        "point_loss_mean": ("valid", "all"),
        "coarse_loss_mean": ("valid", "all"),
        "coarse_loss_at": ("image", "coarse"),
        "point_features": (("p3", "c2"), ("p4",)),
        "oversample_ratio": (2.0, 4.0),
        "importance_ratio": (0.5, 1.0),
    }.get(key, (True, False) if isinstance(ROWS[key][0], bool) else (1, 2))
    value = next(v for v in other if v != getattr(PRESETS[name], key))
    changed = pointrend_options(name, **{key: value})
    assert dataclasses.asdict(changed) == {**dataclasses.asdict(PRESETS[name]), key: value}


def test_overrides_win_over_what_the_preset_fills_in():
    options = parse_options(
        {"pointrend": {"preset": "paddleseg"}, "decoder": {"norm": "gn"}, "backbone": {"output_stride": 16}}
    )
    assert options.decoder.norm == "gn" and options.backbone.output_stride == 16


@pytest.mark.parametrize("name", NAMES)
def test_resolved_options_are_their_own_configuration(name):
    options = parse_options(
        {"model": {"pointrend": {"preset": name, "train_points": 7}, "loss": {"class_weights": [1, 2]}}}
    )
    plain = dataclasses.asdict(options)
    plain["decoder"]["levels"] = list(plain["decoder"]["levels"])  # as read back from YAML
    assert parse_options(plain) == options and parse_options(options) == options
    assert options.pointrend.train_points == 7 and options.loss.class_weights == (1.0, 2.0)


def test_example_of_the_documentation():
    options = parse_options(
        {
            "name": "pointrend",
            "backbone": {"name": "resnet18", "pretrained": False, "output_stride": 32, "checkpoint": None},
            "decoder": {"name": "semantic_fpn", "channels": 128, "head_channels": 128, "norm": "bn"},
            "pointrend": {"preset": "rendseg", "inference_points": "area/256"},
            "loss": {"coarse_weight": 1.0, "point_weight": 1.0, "class_weights": None},
            "channels_last": True,
        }
    )
    assert options.backbone == BackboneOptions(
        name="resnet18",
        output_stride=32,
        freeze_norm=False,
        output_norm=False,
        pad_before_shift=False,
        stride_in_1x1=False,
    )
    assert options.pointrend.inference_points == "area/256"
    assert parse_options({"pointrend": None, "decoder": None}) == parse_options({})


def test_losses_and_auxiliary_heads():
    options = parse_options(
        {
            "loss": {"terms": ["cross_entropy", {"name": "ohem", "min_kept": 7}, {"name": "dice", "weight": 2}]},
            "auxiliary": [{"level": "c3", "terms": [{"name": "focal", "alpha": [1, 2]}]}, {"norm": "gn"}],
            "decoder": {"norm": "syncbn"},
        }
    )
    assert options.loss.terms == (LossTerm(), OhemTerm(min_kept=7), DiceTerm(weight=2.0))
    assert options.auxiliary == (
        AuxiliaryOptions(level="c3", norm="syncbn", terms=(FocalTerm(alpha=(1.0, 2.0)),)),
        AuxiliaryOptions(level="c4", norm="gn"),
    )
    assert parse_options(dataclasses.asdict(options)) == options
    plain = parse_options({"loss": {"terms": None}, "auxiliary": None})
    assert plain == parse_options({}) and plain.loss.terms == (LossTerm(),) and plain.auxiliary == ()
    heads = {"auxiliary": [{}], "pointrend": {"preset": "paddleseg"}}
    assert parse_options(heads).auxiliary[0].norm == "bn"  # its decoder has none


def loss(**term):
    return {"loss": {"terms": [term]}}


def head(**values):
    return {"auxiliary": [{}, {"level": "c3", **values}]}


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        (
            loss(name="dise"),
            ValueError,
            r"model.loss.terms\[0\].name must be one of cross_entropy, ohem, dice, lovasz, focal, got 'dise'; did you "
            "mean 'dice'",
        ),
        (
            loss(name="ohem", min_keep=3),
            ValueError,
            r"unknown key model.loss.terms\[0\].min_keep; did you mean 'min_kept'",
        ),
        (loss(name="dice", gamma=3), ValueError, r"unknown key model.loss.terms\[0\].gamma"),
        (loss(weight=-1), ValueError, r"model.loss.terms\[0\].weight must be finite and not negative, got -1"),
        (loss(name="ohem", threshold=0), ValueError, r"threshold must lie in \(0, 1\], got 0"),
        (loss(name="ohem", min_kept=0), ValueError, "min_kept must be at least 1, got 0"),
        (loss(name="dice", exponent=0.5), ValueError, "exponent must be at least 1 and finite, got 0.5"),
        (loss(name="dice", smooth=-1), ValueError, "smooth must be finite and not negative"),
        (loss(name="dice", classes="some"), ValueError, "classes must be one of all, present, got 'some'"),
        (loss(name="focal", gamma=-1), ValueError, "gamma must be finite and not negative"),
        (loss(name="focal", alpha=[1, -1]), ValueError, "alpha must be finite and not negative"),
        (loss(name="focal", alpha="x"), TypeError, "alpha must be a number or a list of a number, got 'x'"),
        ({"loss": {"terms": ["dice", "dice"]}}, ValueError, "model.loss: terms names dice twice"),
        ({"loss": {"terms": []}}, ValueError, "model.loss: terms must name at least one loss"),
        ({"loss": {"terms": "dice"}}, TypeError, "model.loss.terms must be a list, got str"),
        ({"loss": {"terms": [3]}}, TypeError, r"model.loss.terms\[0\] must be a mapping, got int"),
        ({"loss": {"normalize": "globall"}}, ValueError, "must be one of process, global, got 'globall'; did you mean"),
        (
            {"loss": {"normalize": "global", "terms": ["lovasz"]}},
            ValueError,
            r"terms\[0\]: lovasz sorts .*normalize: global needs per_image: true",
        ),
        ({"auxiliary": {"level": "c4"}}, TypeError, "model.auxiliary must be a list, got dict"),
        (head(chanels=3), ValueError, r"unknown key model.auxiliary\[1\].chanels; did you mean 'channels'"),
        (head(level="c4"), ValueError, "model.auxiliary has two heads on c4"),
        (head(dropout=1), ValueError, r"model.auxiliary\[1\].dropout must lie in \[0, 1\), got 1"),
        (head(num_convs=0, concat_input=True), ValueError, "concat_input needs num_convs of at least 1"),
        (head(channels=0), ValueError, r"model.auxiliary\[1\].channels must be at least 1, got 0"),
        (head(weight=float("nan")), ValueError, r"model.auxiliary\[1\].weight must be finite"),
        (head(terms=["ohm"]), ValueError, r"model.auxiliary\[1\].terms\[0\].name must be one of .*did you mean 'ohem'"),
        ({"backbnoe": {}}, ValueError, r"unknown key model.backbnoe; did you mean 'backbone'\?"),
        (
            {"backbone": {"pretraned": True}},
            ValueError,
            r"unknown key model.backbone.pretraned; did you mean 'pretrained'\?",
        ),
        ({"decoder": {"chanels": 3}}, ValueError, r"unknown key model.decoder.chanels; did you mean 'channels'\?"),
        (
            {"pointrend": {"paddding_mode": "zeros"}},
            ValueError,
            r"model.pointrend.paddding_mode; did you mean 'padding_mode'\?",
        ),
        ({"pointrend": {"preset": "detectron"}}, ValueError, r"got 'detectron'; did you mean 'detectron2'\?"),
        ({"loss": {"weight": 1}}, ValueError, "unknown key model.loss.weight"),
        ({"decoder": {"name": "semanticfpn"}}, ValueError, r"got 'semanticfpn'; did you mean 'semantic_fpn'\?"),
        (
            {"name": "pointrent"},
            ValueError,
            r"model.name must be one of pointrend, segmenter, pointrend_rcnn, got 'pointrent'; did you mean",
        ),
        (
            {"decoder": {"norm": "batch"}},
            ValueError,
            "model.decoder.norm must be one of bn, syncbn, gn, none or null, got 'batch'",
        ),
        ({"backbone": {"pretrained": "yes"}}, TypeError, "model.backbone.pretrained must be true or false, got 'yes'"),
        ({"decoder": {"channels": 12.5}}, TypeError, "model.decoder.channels must be an integer, got 12.5"),
        ({"decoder": {"channels": True}}, TypeError, "model.decoder.channels must be an integer, got True"),
        (
            {"pointrend": {"point_features": "p2"}},
            TypeError,
            "point_features must be a list of a string or null, got 'p2'",
        ),
        ({"pointrend": {"train_points": "width/8"}}, ValueError, "train_points must be an integer or one of area/256"),
        ({"pointrend": {"train_points": 0}}, ValueError, "train_points must be at least 1, got 0"),
        ({"pointrend": {"importance_ratio": 1.5}}, ValueError, r"importance_ratio must lie in \[0, 1\], got 1.5"),
        ({"pointrend": {"steps": -1}}, ValueError, "steps must be at least 0, got -1"),
        ({"loss": {"point_weight": -1}}, ValueError, "point_weight must be finite and not negative, got -1"),
        ({"backbone": "resnet18"}, TypeError, "model.backbone must be a mapping, got str"),
        ([], TypeError, "model must be a mapping, got list"),
    ],
)
def test_bad_configuration(config, error, match):
    with pytest.raises(error, match=match):
        parse_options(config)


def test_the_nearest_word():
    from rendseg._nearest import did_you_mean, nearest

    assert nearest("chanels", ["norm", "channels"]) == "channels" and nearest("PADDLE", ["paddleseg"]) == "paddleseg"
    assert nearest("ignorelabel", ["Ignore_Label", "label"]) == "Ignore_Label"
    assert nearest("xyz", ["norm", "channels"]) is None and nearest(7, ["norm"]) is None and nearest("norm", []) is None
    assert did_you_mean("chanels", ["channels"]) == "; did you mean 'channels'?" and did_you_mean("x", ["norm"]) == ""


def test_a_decoder_is_found_without_an_entry_in_a_list(tmp_path, monkeypatch):
    import rendseg.models
    from rendseg.models import registry

    (tmp_path / "dropped_in.py").write_text(
        "from rendseg.models import DecoderOptions, register_decoder\n"
        "class Options(DecoderOptions):\n"
        "    width: int = 3\n"
        "register_decoder('dropped_in', Options)(None)\n"
    )
    monkeypatch.setattr(rendseg.models, "__path__", [*rendseg.models.__path__, str(tmp_path)])
    monkeypatch.setattr(registry, "_DECODERS", dict(registry._DECODERS))
    registry.import_modules.cache_clear()
    assert parse_options({"decoder": {"name": "dropped_in", "width": 5}}).decoder.width == 5


def test_number_of_points():
    assert num_points(77, 10, 10) == 77
    assert num_points("area/256", 1024, 2048) == 8192
    assert num_points("width/16", 768, 768) == 48
    assert num_points("(width/16)^2", 768, 768) == 2304
    assert num_points("area/256", 4, 4) == 1
