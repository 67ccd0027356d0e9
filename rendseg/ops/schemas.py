"""Every operator schema, for the case where the compiled library is absent.

``csrc/library.cpp`` declares the same schemas when it is present; ``tests/ops/test_schemas.py`` compares the two word
for word. Names that begin with an underscore are private: gradients and steps of ``refine``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

SCHEMAS: tuple[str, ...] = (
    # uncertain_points
    "uncertainty(Tensor logits, Tensor? class_index=None) -> Tensor",
    "uncertain_points(Tensor logits, int num_points, Tensor? class_index=None) -> (Tensor, Tensor)",
    "sample_uncertain_points(Tensor logits, int num_points, float oversample_ratio=3.0, float importance_ratio=0.75, "
    '*, Tensor? class_index=None, Tensor? image_index=None, str padding_mode="zeros", bool align_corners=False, '
    "Generator? generator=None, Tensor? random_coords=None) -> Tensor",
    # subdivide
    "subdivide(Tensor logits, int num_points, int scale_factor=2, bool align_corners=False, Tensor? class_index=None, "
    "bool return_logits=True) -> (Tensor, Tensor, Tensor)",
    "_subdivide_labels(Tensor logits, int num_points, int scale_factor=2, bool align_corners=False) -> "
    "(Tensor, Tensor, Tensor)",
    "_subdivide_backward(Tensor grad, SymInt height, SymInt width, bool align_corners) -> Tensor",
    # point_sample
    'point_sample(Tensor[] input, Tensor coords, str mode="bilinear", str padding_mode="zeros", '
    "bool align_corners=False) -> Tensor",
    "_point_sample_backward(Tensor grad, Tensor[] input, Tensor coords, str mode, str padding_mode, "
    "bool align_corners, bool input_grad, bool coords_grad) -> Tensor[]",
    "point_labels(Tensor labels, Tensor coords, int ignore_index=255) -> Tensor",
    # mask_losses
    "mask_losses(Tensor logits, Tensor[] targets, Tensor coords, Tensor image_index, Tensor query_index, "
    'Tensor target_index, *, str label_mode="bilinear", str padding_mode="zeros", SymInt[]? canvas=None) -> '
    "(Tensor, Tensor)",
    "_mask_losses_backward(Tensor cross_entropy_grad, Tensor dice_grad, Tensor logits, Tensor[] targets, "
    "Tensor coords, Tensor image_index, Tensor query_index, Tensor target_index, str label_mode, str padding_mode, "
    "SymInt[]? canvas) -> Tensor",
    'mask_costs(Tensor logits, Tensor[] targets, Tensor coords, *, str label_mode="bilinear", '
    'str padding_mode="zeros", SymInt[]? canvas=None) -> (Tensor, Tensor)',
    # scatter_points
    "scatter_points(Tensor logits, Tensor indices, Tensor values) -> Tensor",
    "scatter_points_(Tensor(a!) logits, Tensor indices, Tensor values) -> ()",
    "_scatter_points_backward(Tensor grad, Tensor indices) -> (Tensor, Tensor)",
    # encode
    "scaled_l2(Tensor x, Tensor codewords, Tensor scale) -> Tensor",
    "_scaled_l2_backward(Tensor grad, Tensor x, Tensor codewords, Tensor scale) -> (Tensor, Tensor, Tensor)",
    "aggregate(Tensor assignment, Tensor x, Tensor codewords) -> Tensor",
    "_aggregate_backward(Tensor grad, Tensor assignment, Tensor x, Tensor codewords) -> (Tensor, Tensor, Tensor)",
    "encode(Tensor x, Tensor codewords, Tensor scale) -> Tensor",
    "_encode_backward(Tensor grad, Tensor x, Tensor codewords, Tensor scale) -> (Tensor, Tensor, Tensor)",
    # refine
    "_refine_mlp(Tensor coarse, Tensor[] features, Tensor[] weights, Tensor[] biases, int steps, int num_points, "
    "str coarse_source, int scale_factor, bool align_corners, str padding_mode, bool coarse_each_layer, "
    "bool coarse_first, bool labels, Tensor? class_index=None, bool class_only=False, Tensor? image_index=None, "
    "Tensor? boxes=None) -> Tensor",
)


def with_defaults(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, called with every argument of ``rendseg::<name>``, so that its defaults stand in the schema alone.

    The dispatcher leaves out trailing arguments that are at their defaults.
    """
    (schema,) = (schema for schema in SCHEMAS if schema.startswith(f"{name}("))
    arguments = torch._C.parse_schema(f"rendseg::{schema}").arguments
    order = [a.name for a in arguments if not a.kwarg_only]
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
    named = {key: value for key, value in defaults.items() if key not in order}

    def call(*args: Any, **kwargs: Any) -> Any:
        rest = [kwargs.pop(key) if key in kwargs else defaults[key] for key in order[len(args) :]]
        return function(*args, *rest, **named | kwargs)

    return call
