"""ONNX files: from a traced program to a file, and from a file to a function of onnxruntime."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rendseg._version import __version__

_PACKAGES = {"onnx": "onnx", "onnxruntime": "onnxruntime", "onnxscript": "onnxscript"}


def missing_packages() -> list[str]:
    """The packages that an export needs and that are not installed."""
    return [package for module, package in _PACKAGES.items() if importlib.util.find_spec(module) is None]


def translate(program: torch.export.ExportedProgram, output: str, opset: int | None) -> Any:
    """``program``, traced under :class:`rendseg.onnx.ops.StandardOps`, as torch.onnx makes it."""
    made = torch.onnx.export(
        program,
        (),
        input_names=["images"],
        output_names=[output],
        opset_version=opset,
        external_data=False,
        verbose=False,
    )
    assert made is not None
    return made


def save(made: Any, path: Path, about: Mapping[str, str], *, channels: int) -> None:
    """Write what :func:`translate` made, with ``about`` as its metadata; ``channels``: their place among the
    dimensions of the input."""
    made.model.metadata_props.clear()
    made.model.metadata_props.update(about)
    made.model.producer_name, made.model.producer_version = "rendseg", __version__
    names: list[str | None] = ["batch", "height", "width"]
    names.insert(channels, None)
    _name_dimensions(made.model, names)
    _casts_to_the_type_of_weights(made.model)
    made.save(path, external_data=False)


def _name_dimensions(model: Any, names: list[str | None]) -> None:
    """``names`` for the symbols that torch.export invented, in the input and the output."""
    from onnx_ir import Shape

    (images,), (answer,) = model.graph.inputs, model.graph.outputs
    known: dict[str, str] = {}
    for dimension, name in zip(images.shape, names, strict=True):
        if name is not None and not isinstance(dimension, int):
            known[str(dimension)] = name
    for value in (images, answer):
        value.shape = Shape([d if isinstance(d, int) else known.get(str(d), d) for d in value.shape])


def _casts_to_the_type_of_weights(model: Any) -> None:
    """``CastLike`` of a weight for every cast to float32, so that tools that convert a file to half precision convert
    these with the weights: a cast that names float32 would then contradict what reads it."""
    from onnx_ir import DataType, Node

    weight = next((w for w in model.graph.initializers.values() if w.dtype == DataType.FLOAT), None)
    for node in list(model.graph):
        if weight is not None and node.op_type == "Cast" and node.attributes["to"].as_int() == DataType.FLOAT:
            like = Node("", "CastLike", [node.inputs[0], weight], num_outputs=1)
            (old,), (new,) = node.outputs, like.outputs
            new.name, new.type, new.shape = old.name, old.type, old.shape
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            model.graph.insert_before(node, like)
            model.graph.remove(node, safe=True)


def open_file(path: Path) -> tuple[Callable[[Tensor], Tensor], Mapping[str, str]]:
    """What a file computes, on the CPU, and its metadata."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (answer,) = session.run(None, {session.get_inputs()[0].name: images.cpu().numpy()})
        return torch.from_numpy(answer)

    return run, session.get_modelmeta().custom_metadata_map
