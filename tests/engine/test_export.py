"""Export: the artefacts answer what the network answers; the ONNX forms compute what the reference computes."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine.tiny import tiny_content
from torch import Tensor, nn

import rendseg
from rendseg import cli, reference
from rendseg.engine import export as module
from rendseg.engine.checkpoint import save_checkpoint
from rendseg.engine.config import build_config
from rendseg.engine.export import Exportable, ExportError, ExportOptions, export, load
from rendseg.models import build_model, decoder_names
from rendseg.models.registry import decoder_options_class
from rendseg.onnx import ops as onnx_ops
from rendseg.onnx.ops import StandardOps
from rendseg.reference.refine import refine_mlp as reference_refine_mlp
from rendseg.reference.uncertain_points import cell_centres

CLASSES = {"names": list("abcde"), "palette": [[i, 2 * i, 3 * i] for i in range(5)], "ignore_index": 255}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript"))
on_request = pytest.mark.skipif(
    os.environ.get("RENDSEG_EXPORT_FULL", "0") == "0", reason="takes minutes: set RENDSEG_EXPORT_FULL=1"
)
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="needs onnx, onnxruntime and onnxscript")


SMALL = {"name": "semantic_fpn", "channels": 16, "head_channels": 16}


def network(name: str = "pointrend", **changes: Any) -> nn.Module:
    """Random weights whose logits are spread like those of a trained network."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"name": name, "backbone": {"name": "test_resnet"}, "decoder": SMALL}
    if name == "pointrend":
        options["pointrend"] = {"hidden_channels": 16, "inference_points": 100, **changes.pop("pointrend", {})}
    net = build_model({**options, **changes}, 5).eval()
    for layer in [m for m in net.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d)) and m.out_channels == 5]:
        with torch.no_grad():
            layer.weight.normal_(std=1.0)
    return net


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    content = build_config(tiny_content(tmp_path)).to_dict()
    torch.manual_seed(0)
    net = build_model(content["model"], 5)
    path = tmp_path / "best.pt"
    save_checkpoint(
        path,
        {"config": content, "classes": CLASSES, "model": net.state_dict(), "training": {"progress": {"iteration": 0}}},
    )
    return path


# ---- the ONNX forms against the reference, in plain PyTorch


def few_values(*shape: int, seed: int = 0) -> Tensor:
    """Logits of few different values: many cells tie."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("classes", [1, 2, 5])
@pytest.mark.parametrize("align_corners", [False, True])
def test_subdivision_equals_the_reference(classes: int, align_corners: bool) -> None:
    logits = few_values(2, classes, 5, 7)
    logits[1, 0, 2, 3] = float("nan")
    logits[0, :, 4, 4] = float("inf")
    fine, indices, coords = onnx_ops.OPERATORS["subdivide"](logits, 13, 2, align_corners)
    wanted = reference.subdivide(logits, 13, 2, align_corners)
    # torch.topk promises no order of ties, ONNX does: compare what does not depend on it, the values that were taken
    rounded = 4e-6 if align_corners else 0  # Resize rounds weights such as 4/9, the reference does not
    torch.testing.assert_close(fine, wanted[0], equal_nan=True, rtol=0, atol=rounded)
    scores = reference.uncertainty(fine).flatten(1)
    taken, best = scores.gather(1, indices), scores.gather(1, reference.uncertain_points(fine, 13)[0])
    torch.testing.assert_close(taken.sort(1).values, best.sort(1).values, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(
        onnx_ops.OPERATORS["uncertainty"](fine), reference.uncertainty(fine), equal_nan=True, rtol=0, atol=0
    )
    assert torch.equal(coords, cell_centres(indices, 10, 14))


NO_BOXES = (None, False, None, None)  # class_index, class_only, image_index, boxes
REFINE = {
    "coarse_source": ("original", "current"),
    "padding_mode": ("zeros", "border"),
    "labels": (False, True),
    "num_points": (20, 150, 5000),  # selected in both steps, in the second only, never
}


@pytest.mark.parametrize("case", list(itertools.product(*REFINE.values())), ids=lambda case: "-".join(map(str, case)))
def test_refine_equals_the_reference(case: tuple[Any, ...]) -> None:
    source, padding, labels, points = case
    torch.manual_seed(points)
    coarse, features = torch.randn(2, 4, 5, 6), [torch.randn(2, 3, 10, 12), torch.randn(2, 2, 5, 6)]
    first = source == "current"  # vary what else there is along
    weights = [torch.randn(8, 9), torch.randn(4, 8 + (4 if labels else 0))]
    biases = [torch.randn(8), torch.randn(4)]
    rest = (2, points, source, 2, first, padding, labels, first, labels, *NO_BOXES)
    got = onnx_ops.refine_mlp(coarse, features, weights, biases, *rest)
    wanted = reference_refine_mlp(coarse, features, weights, biases, *rest)
    assert got.dtype == wanted.dtype
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("source", ["original", "current"])
def test_refine_through_boxes_equals_the_reference(source: str) -> None:
    torch.manual_seed(0)
    coarse, features = torch.randn(3, 4, 5, 6), [torch.randn(2, 3, 10, 12)]
    weights, biases = [torch.randn(8, 7), torch.randn(4, 8)], [torch.randn(8), torch.randn(4)]
    corner = torch.rand(3, 2) / 2
    boxes = torch.cat((corner, corner + torch.rand(3, 2) / 2), 1)
    rest = (2, 40, source, 2, False, "border", False, False, False)
    rois = (torch.tensor([3, 0, 1]), True, torch.tensor([1, 0, 1]), boxes)
    got = onnx_ops.refine_mlp(coarse, features, weights, biases, *rest, *rois)
    wanted = reference_refine_mlp(coarse, features, weights, biases, *rest, *rois)
    assert got.shape == (3, 1, 20, 24)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("labels", [False, True])
def test_no_steps(labels: bool) -> None:
    coarse, weight = torch.randn(1, 3, 4, 4), [torch.randn(3, 5)]
    rest = (0, 5, "original", 2, False, "zeros", False, False, labels, *NO_BOXES)
    got = onnx_ops.refine_mlp(coarse, [torch.randn(1, 2, 4, 4)], weight, [torch.randn(3)], *rest)
    assert torch.equal(got, coarse.argmax(1).to(torch.uint8) if labels else coarse)


@pytest.mark.parametrize("name", ["encode", "scaled_l2", "aggregate"])
def test_encoding_equals_the_reference(name: str) -> None:
    torch.manual_seed(1)
    x, codewords, scale = torch.randn(2, 6, 5, 7) + 3, torch.randn(4, 6) + 3, -torch.rand(4)
    positions = x.flatten(2).transpose(1, 2)
    arguments: tuple[Tensor, ...] = {
        "encode": (x, codewords, scale),
        "scaled_l2": (positions, codewords, scale),
        "aggregate": (torch.rand(2, 35, 4), positions, codewords),
    }[name]
    got = getattr(onnx_ops, name)(*arguments)
    torch.testing.assert_close(got, getattr(reference, name)(*arguments), rtol=1e-4, atol=1e-4)
    half = [a.half() if i == 0 else a for i, a in enumerate(arguments)]
    assert getattr(onnx_ops, name)(*half).dtype == torch.float32


@pytest.mark.parametrize("bins", [1, 2, 3, 6, (3, 2), (None, 2)])
@pytest.mark.parametrize("size", [(6, 12), (7, 5), (2, 3)])
def test_pooling_equals_pytorch(bins: Any, size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(onnx_ops.adaptive_avg_pool2d(x, bins), F.adaptive_avg_pool2d(x, bins))
    assert torch.equal(onnx_ops.adaptive_max_pool2d(x, bins), F.adaptive_max_pool2d(x, bins))


def test_points_equal_the_reference() -> None:
    torch.manual_seed(2)
    maps, coords = [torch.randn(2, 3, 5, 7), torch.randn(2, 2, 4, 4)], torch.rand(2, 11, 2) * 1.4 - 0.2
    coords[0, 0] = float("nan")
    for mode, padding in itertools.product(("bilinear", "nearest"), ("zeros", "border")):
        got = onnx_ops.OPERATORS["point_sample"](maps, coords, mode, padding)
        assert torch.equal(got.nan_to_num(9), reference.point_sample(maps, coords, mode, padding).nan_to_num(9))
    labels = torch.randint(0, 200, (2, 5, 7), dtype=torch.uint8)
    coords[1, :2] = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    assert torch.equal(onnx_ops.OPERATORS["point_labels"](labels, coords), reference.point_labels(labels, coords))
    logits, indices, values = torch.randn(2, 3, 4, 5), torch.tensor([[3, 0], [19, 7]]), torch.randn(2, 3, 2)
    wanted = reference.scatter_points(logits, indices, values)
    assert torch.equal(onnx_ops.scatter_points(logits, indices, values), wanted)
    onnx_ops.scatter_points_(logits, indices, values)
    assert torch.equal(logits, wanted)


def test_every_operator_of_inference_has_a_form() -> None:
    from rendseg.ops.schemas import SCHEMAS

    names = {schema.split("(")[0] for schema in SCHEMAS}
    training = {"sample_uncertain_points", "mask_losses", "mask_costs"}
    without = {*training, *(name for name in names if name.endswith("_backward"))}
    assert set(onnx_ops.OPERATORS) == names - without
    with StandardOps(), pytest.raises(NotImplementedError, match="rendseg::sample_uncertain_points has no ONNX form"):
        torch.ops.rendseg.sample_uncertain_points(torch.randn(1, 2, 4, 4), 3)


# ---- artefacts


def write(net: nn.Module, path: Path, *args: Any, **kwargs: Any) -> list[str]:
    said: list[str] = []
    export(net, path, ExportOptions(*args, **kwargs), classes=CLASSES, mean=MEAN, std=STD, say=said.append)
    return said


def normalised(batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(batch))


def test_pt2(tmp_path: Path) -> None:
    """Dynamic batch and size, and the operators are still there."""
    net, path = network(), tmp_path / "m.pt2"
    with rendseg.backend("reference"):  # of this process, not of the artefact
        said = write(net, path, "pt2", (64, 96), "logits", dynamic_size=True)
    assert len(said) == 2 and "checked on random images 3 x 3 x 64 x 96: 0.0000 % of 18432 pixels" in said[1]
    artefact = load(path)
    for batch, height, width in ((1, 64, 64), (2, 128, 96)):
        images = normalised(batch, height, width)
        with torch.no_grad():
            torch.testing.assert_close(artefact(images), net(images).refined, rtol=1e-4, atol=1e-5)
    called = {str(node.target) for node in torch.export.load(path).graph.nodes}
    kernel = (
        "_refine_mlp" if torch._C._dispatch_has_kernel_for_dispatch_key("rendseg::_refine_mlp", "CPU") else "subdivide"
    )
    assert f"rendseg.{kernel}.default" in called
    assert artefact.value("classes") == CLASSES["names"] and artefact.value("palette") == CLASSES["palette"]
    assert (
        artefact.value("mean") == list(MEAN) and artefact.value("step") == 32 and artefact.value("output") == "logits"
    )
    assert all(p.requires_grad for p in net.parameters())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.pt2"]


def test_preprocessing_and_odd_fixed_size(tmp_path: Path) -> None:
    """uint8 images of a size that no stride divides: the padding is part of the artefact."""
    net, path = network(), tmp_path / "m.pt2"
    write(net, path, "pt2", (50, 70), dynamic_batch=False, batch=2, preprocessing=True)
    artefact = load(path)
    pixels = torch.randint(0, 256, (2, 50, 70, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = (pixels.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    labels = net.predict(images, output="labels").labels
    answer = artefact(pixels)
    assert answer.shape == (2, 50, 70) and answer.dtype == torch.uint8
    assert (answer != labels).float().mean() < 1e-3
    with pytest.raises(TypeError, match=r"m\.pt2 takes images of torch\.uint8, got torch\.float32"):
        artefact(images)
    with pytest.raises(ValueError, match=r"takes images of shape \[2, 50, 70, 3\], got \[1, 50, 70, 3\]"):
        artefact(pixels[:1])


@needs_onnx
def test_preprocessing_of_a_network_for_bgr() -> None:
    net = network()
    pixels = torch.randint(0, 256, (2, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (0.1, 0.2, 0.3), (1.0, 0.5, 0.25)
    turned = np.ascontiguousarray(pixels.numpy()[..., ::-1]).astype(np.float64) / 255
    images = torch.from_numpy((turned - mean) / std).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        answer = Exportable(net, "logits", mean, std, "bgr")(pixels)
        torch.testing.assert_close(answer, Exportable(net, "logits")(images), rtol=1e-4, atol=1e-4)


def assert_half_precision_loads(file: Any) -> None:
    """What converters to half precision do: every float32 tensor becomes float16 except the scales of Resize, which
    have to be float32; nodes stay as they are."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, numpy_helper

    half = onnx.ModelProto()
    half.CopyFrom(file)
    del half.graph.value_info[:]
    for value in (*half.graph.input, *half.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    constants = [a.t for node in half.graph.node if node.op_type == "Constant" for a in node.attribute]
    scales = {name for node in half.graph.node if node.op_type == "Resize" for name in node.input[1:]}
    for tensor in (*half.graph.initializer, *constants):
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in scales:
            narrow = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(narrow, tensor.name))
    session = onnxruntime.InferenceSession(half.SerializeToString(), providers=["CPUExecutionProvider"])
    session.run(None, {"images": normalised(1, 64, 96).numpy().astype(np.float16)})


@pytest.mark.parametrize("dynamic_size", [False, pytest.param(True, marks=on_request)])
def test_onnx(tmp_path: Path, dynamic_size: bool) -> None:
    import onnx

    net, path = network(), tmp_path / "m.onnx"
    write(net, path, "onnx", (64, 96), "logits" if dynamic_size else "labels", dynamic_size=dynamic_size)
    artefact = load(path)
    for batch, height, width in ((1, 64, 96), (4, 96, 64)) if dynamic_size else ((1, 64, 96), (4, 64, 96)):
        images = normalised(batch, height, width)
        with torch.no_grad():
            wanted = net(images).refined if dynamic_size else net.predict(images, output="labels").labels
        got = artefact(images)
        assert got.dtype == wanted.dtype
        if dynamic_size:
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(got, wanted)
    file = onnx.load(path)
    onnx.checker.check_model(file)
    assert {node.domain for node in file.graph.node} <= {""} and not file.functions  # standard operators only
    assert_half_precision_loads(file)
    dims = [d.dim_param or d.dim_value for d in file.graph.input[0].type.tensor_type.shape.dim]
    assert dims == (["batch", 3, "height", "width"] if dynamic_size else ["batch", 3, 64, 96])
    about = {entry.key: entry.value for entry in file.metadata_props}
    assert json.loads(about["classes"]) == CLASSES["names"] and json.loads(about["std"]) == list(STD)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx"]  # weights inside
    with pytest.raises(ValueError, match="multiples of 32, got 65 x 96" if dynamic_size else r"\[N, 3, 64, 96\]"):
        artefact(normalised(1, 65, 96))


class Pools(nn.Module):
    """A pyramid of pooled maps, an encoding and a selection with ties, in one graph."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.codewords, self.scale = nn.Parameter(torch.randn(4, 5)), nn.Parameter(-torch.rand(4))

    def forward(self, x: Tensor, ties: Tensor) -> tuple[Tensor, ...]:
        from rendseg import ops

        size = x.shape[2:]
        maps = [F.adaptive_avg_pool2d(x, bins) for bins in (1, 6)] + [F.adaptive_max_pool2d(x, 3)]
        pooled = torch.cat([F.interpolate(m, size=size, mode="bilinear", align_corners=False) for m in maps], dim=1)
        indices, _ = ops.uncertain_points(ties, 9)
        changed = ties * 1
        ops.scatter_points_(changed, indices, ops.point_sample(ties, torch.zeros(ties.shape[0], 9, 2)))
        return pooled, ops.encode(x, self.codewords, self.scale), indices, changed


@needs_onnx
def test_operators_under_onnxruntime(tmp_path: Path) -> None:
    import onnxruntime

    model, dims = Pools().eval(), torch.export.Dim
    axes = {0: dims("n", min=1), 2: dims("h", min=4), 3: dims("w", min=4)}
    example = (torch.randn(2, 5, 7, 10), few_values(2, 3, 7, 10))
    with torch.no_grad(), StandardOps():
        program = torch.export.export(model, example, dynamic_shapes=(axes, axes))
    torch.onnx.export(program, (), tmp_path / "p.onnx", external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "p.onnx", providers=["CPUExecutionProvider"])
    for batch, height, width in ((1, 7, 10), (3, 13, 8)):
        x, ties = torch.randn(batch, 5, height, width), few_values(batch, 3, height, width, seed=batch)
        ties[0, 1, 2, 3] = float("nan")
        answers = session.run(None, {i.name: v.numpy() for i, v in zip(session.get_inputs(), (x, ties), strict=True)})
        with torch.no_grad():
            wanted = list(model(x, ties))
        wanted[2] = reference.uncertain_points(ties, 9)[0]  # ties to the lowest index, NaN first
        wanted[1] = reference.encode(x, model.codewords, model.scale).detach()
        for got, want in zip(answers, wanted, strict=True):
            np.testing.assert_allclose(got, want.numpy(), rtol=1e-4, atol=1e-4)


def small(decoder: str) -> dict[str, Any]:
    """Options that make any decoder narrow."""
    fields = [f for f in dataclasses.fields(decoder_options_class(decoder)) if f.name.endswith("channels")]
    return {
        f.name: 16
        for f in fields
        if any(word in str(f.type) for word in ("int", "Count", "Whole")) and "tuple" not in str(f.type)
    }


@needs_onnx
@pytest.mark.parametrize("decoder", [name for name in decoder_names() if name != "semantic_fpn"])
def test_every_decoder(decoder: str, tmp_path: Path) -> None:
    """The export compares the artefact with the network itself."""
    net = network("segmenter", decoder={"name": decoder, **small(decoder)})
    write(net, tmp_path / "m.onnx", "onnx", (64, 64), "logits")


@on_request
@pytest.mark.parametrize("dynamic_size", [False, True])
@pytest.mark.parametrize("format", ["pt2", "aoti", "onnx"])
@pytest.mark.parametrize("decoder", decoder_names())
def test_every_decoder_and_format_with_pointrend(decoder: str, format: str, dynamic_size: bool, tmp_path: Path) -> None:
    points = {"point_features": ["p2" if decoder in ("semantic_fpn", "upernet", "upp") else "c2"]}
    net = network(decoder={"name": decoder, **small(decoder)}, pointrend=points)
    write(net, tmp_path / f"m{module.SUFFIXES[format]}", format, (64, 64), dynamic_size=dynamic_size)


# ---- what is refused


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "tflite"}, "format must be one of pt2, aoti, onnx, got 'tflite'"),
        ({"output": "masks"}, "output must be one of labels, logits, got 'masks'"),
        ({"size": (0, 64)}, "size must be a positive height and width, got 0,64"),
        ({"size": (64,)}, "size must be a positive height and width, got 64"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"opset": 18}, "opset is an option of format onnx, not of pt2"),
        ({"format": "onnx", "opset": 11}, "opset must lie between 18 and 23, got 11"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        ExportOptions(**{"format": "pt2", "size": (64, 64), **options})


@pytest.mark.bad_input
def test_a_free_size_must_fit(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"multiples of 32, at least 64: got --size 32,70, take --size 64,96"):
        write(network(), tmp_path / "m.pt2", "pt2", (32, 70), dynamic_size=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.bad_input
def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else object())
    with pytest.raises(
        ExportError, match=r"onnx, onnxruntime, onnxscript, not installed here: pip install 'rendseg\[ex"
    ):
        module.needs("onnx")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ExportError, match="'no-such-compiler' is not found: install g"):
        module.needs("aoti")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ExportError, match="torch finds no GPU: export with --device cpu"):
        module.needs("pt2", "cuda")


@pytest.mark.bad_input
def test_no_such_artefact(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(ExportError, match="there is no exported model"):
        load(tmp_path / "nowhere.pt2")
    with pytest.raises(ExportError, match="it is a folder"):
        load(tmp_path)
    with pytest.raises(ExportError, match=r"best\.pt is no exported model"):
        load(checkpoint)
    (tmp_path / "broken.pt2").write_bytes(b"PK\x03\x04")
    with pytest.raises(ExportError, match="is no exported model"):
        load(tmp_path / "broken.pt2")
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), tmp_path / "other.pt2")
    with pytest.raises(ExportError, match="was not written by rendseg export: it has no metadata 'classes'"):
        load(tmp_path / "other.pt2")
    if HAS_ONNX:
        (tmp_path / "broken.onnx").write_bytes(b"not a model")
        with pytest.raises(ExportError, match=r"broken\.onnx cannot be loaded as onnx"):
            load(tmp_path / "broken.onnx")


def test_a_wrong_artefact_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is of the file; the previous one stays when it fails, as when the disk is full."""
    path = tmp_path / "m.pt2"
    path.write_bytes(b"previous")

    def shifted(model: Exportable, to: Path, options: Any, about: Any) -> None:
        original(model, to, options, about)
        with torch.no_grad():
            next(iter(model.network.decoder.predictor.parameters())).neg_()

    original: Callable[..., None] = module._write_pt2
    monkeypatch.setattr(module, "_write_pt2", shifted)
    with pytest.raises(
        ExportError, match=r"the exported model differs from the network: [\d.]+ % of 4096 pixels.*--no-check"
    ):
        write(network("segmenter"), path, "pt2", (64, 64), "logits")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_pt2", full)
    with pytest.raises(ExportError, match=r"could not write .*m\.pt2: .*No space left on device"):
        write(network("segmenter"), path, "pt2", (64, 64))
    assert path.read_bytes() == b"previous" and os.listdir(tmp_path) == ["m.pt2"]


class FixedSize(nn.Module):
    """A network that asks for one size, as windowed transformers may."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Any:
        if images.shape[2] != 64:
            raise ValueError("only 64 here")
        return self.inner(images)


@pytest.mark.bad_input
def test_a_network_of_fixed_size(tmp_path: Path) -> None:
    net = network("segmenter")
    net.backbone.net = FixedSize(net.backbone.net)
    with pytest.raises(ExportError, match="cannot trace this network: .*leave out --dynamic-size"):
        write(net, tmp_path / "m.pt2", "pt2", (64, 64), dynamic_size=True)


# ---- the command


def test_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--format", "pt2", "--no-check", "--size", "64x96", "model.pointrend.inference_points=32"]
    assert cli.main(["export", str(checkpoint), *arguments]) == 0
    assert f"written to {tmp_path / 'best.pt2'}" in capsys.readouterr().out
    artefact = load(tmp_path / "best.pt2")
    assert artefact.value("size") == [64, 96] and artefact(normalised(3, 64, 96)).shape == (3, 64, 96)
    sizes = [n.args[5] for n in torch.export.load(artefact.path).graph.nodes if "_refine_mlp" in str(n.target)]
    assert sizes in ([32], [])  # [] without the compiled library


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "tf"], "format must be one of pt2, aoti, onnx, got 'tf'"),
        (["--size", "64"], "--size is written height,width, such as 360,480: got '64'"),
        (["--size", "axb"], "--size is written height,width"),
        (["--out", "x.onnx"], "--out x.onnx must end in .pt2 for format pt2"),
        (["--out", "."], "--out . is a folder: name a file"),
        (["--output", "mask"], "output must be one of labels, logits"),
        (["model.nonsense=1"], "unknown key"),
        (["--dynamic-size", "--size", "30,64"], "take --size 64,64"),
    ],
)
def test_bad_commands(checkpoint: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(checkpoint), *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


@pytest.mark.bad_input
def test_a_detector_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"fpn_channels": 8, "box_hidden_channels": 8, "mask": {"hidden_channels": 8, "coarse_hidden_channels": 8}}
    model = {"name": "pointrend_rcnn", "backbone": {"name": "test_resnet"}, **sizes}
    config = build_config({"name": "x", "model": model, "data": {"name": "coco"}, "train": {"iterations": 1}})
    state = build_model(config.model, 5).state_dict()
    contents = {"config": config.to_dict(), "classes": CLASSES, "model": state}
    save_checkpoint(tmp_path / "x.pt", {**contents, "training": {"progress": {"iteration": 0}}})
    assert cli.main(["export", str(tmp_path / "x.pt"), "--format", "onnx"]) == 2
    said = capsys.readouterr().err
    assert "is a detector with masks: how many boxes it finds depends on the image" in said and said.count("\n") == 1


@pytest.mark.bad_input
def test_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.pt").write_text("text")
    assert cli.main(["export", str(tmp_path / "x.pt")]) == 2
    assert "is not a rendseg checkpoint" in capsys.readouterr().err


def test_default_size() -> None:
    data = dataclasses.make_dataclass("Data", ["crop_size"])
    assert module.default_size(data((360, 480))) == (360, 480)
    with pytest.raises(ExportError, match="give --size H,W"):
        module.default_size(data(None))
