"""Arguments of a wrong type: one line that names the argument, alike in the operators and in the reference."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rendseg import ops, reference

LOGITS = torch.randn(1, 2, 4, 4)
COORDS = torch.rand(1, 3, 2)
INDICES = torch.tensor([[1, 5]])
CODEWORDS = torch.randn(3, 2)
TARGETS = [torch.ones(1, 5, 5, dtype=torch.bool)]
PAIR = {f"{what}_index": torch.zeros(1, dtype=torch.int64) for what in ("image", "query", "target")}


def keep(fine: Tensor, coarse: Tensor) -> Tensor:
    return coarse


GOOD: dict[str, dict[str, Any]] = {
    "uncertainty": {"logits": LOGITS, "class_index": None},
    "uncertain_points": {"logits": LOGITS, "num_points": 2},
    "sample_uncertain_points": {"logits": LOGITS, "num_points": 2, "oversample_ratio": 3.0, "generator": None},
    "subdivide": {"logits": LOGITS, "num_points": 2, "scale_factor": 2, "align_corners": False},
    "point_sample": {"input": LOGITS, "coords": COORDS, "mode": "bilinear"},
    "point_labels": {"labels": LOGITS[0].long(), "coords": COORDS.expand(2, 3, 2), "ignore_index": 255},
    "mask_losses": {"logits": LOGITS, "targets": TARGETS, "coords": COORDS.expand(1, 3, 2), **PAIR, "canvas": None},
    "mask_costs": {"logits": LOGITS, "targets": TARGETS, "coords": COORDS, "label_mode": "nearest"},
    "scatter_points": {"logits": LOGITS, "indices": INDICES, "values": torch.zeros(1, 2, 2)},
    "scatter_points_": {"logits": LOGITS.clone(), "indices": INDICES, "values": torch.zeros(1, 2, 2)},
    "scaled_l2": {"x": LOGITS[0, :, :, :2], "codewords": CODEWORDS, "scale": torch.ones(3)},
    "aggregate": {"assignment": torch.ones(2, 4, 3), "x": LOGITS[0, :, :, :2], "codewords": CODEWORDS},
    "encode": {"x": LOGITS, "codewords": CODEWORDS, "scale": torch.ones(3)},
    "refine": {"coarse": LOGITS, "features": [LOGITS], "head": keep, "steps": 1, "num_points": 2},
}
WRONG: dict[type, tuple[Any, ...]] = {
    Tensor: (0.5, [0.5], np.zeros(3)),
    int: (1.5, "2", [2], 2**70),
    float: ("3", [3.0]),
    str: (3, None, "\udcff"),
    bool: ("no", []),
    list: (7, [LOGITS, None]),
}


def test_every_operator_is_here() -> None:
    assert set(GOOD) == set(ops.__all__)


@pytest.mark.bad_input
@pytest.mark.parametrize("name", GOOD)
def test_a_wrong_type_is_named(name: str) -> None:
    for function in (getattr(ops, name), getattr(reference, name)):
        function(**GOOD[name])
        for argument, value in GOOD[name].items():
            wrong = WRONG.get(type(value), (3,))
            required = argument not in ("steps", "class_index", "generator", "canvas")
            for bad in (*wrong, None) if required and not isinstance(value, bool) else wrong:
                with pytest.raises(TypeError, match=rf"^{argument} must be .*, got .*$") as refused:
                    function(**GOOD[name] | {argument: bad})
                assert "\n" not in str(refused.value)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": lambda t: t.to_sparse(),
    "sparse, with a gradient": lambda t: t.to_sparse().requires_grad_(),
    "compressed": lambda t: t.to_sparse_csr(),
    "MKL-DNN": lambda t: t.to_mkldnn(),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
    "nested": lambda t: torch.nested.nested_tensor(list(t.unbind())),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_named(layout: str) -> None:
    tried = 0
    for name, good in GOOD.items():
        for argument, value in good.items():
            values = value if isinstance(value, list) else [value]
            if not isinstance(values[0], Tensor):
                continue
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # prototypes, and what a later release will not have
                    wrong = LAYOUTS[layout](values[0])
            except (RuntimeError, IndexError):  # there are no such tensors of this dtype or rank
                continue
            tried += 1
            # The other maps as they are, and as views whose memory holds the negative values.
            for others in (good, {k: torch._neg_view(-v) if k in ("logits", "x") else v for k, v in good.items()}):
                bad = others | {argument: [wrong] if isinstance(value, list) else wrong}
                for function in (getattr(ops, name), getattr(reference, name)):
                    with pytest.raises(TypeError, match=rf"^{argument}(\[0\])? must (be|have) .*, got .*$"):
                        function(**bad)
    assert tried > 10


@pytest.mark.bad_input
def test_words() -> None:
    for call, words in (
        (lambda f: f.uncertain_points(LOGITS, None), "num_points must be a 64-bit integer, got None"),
        (lambda f: f.refine(LOGITS, LOGITS, None, steps=1, num_points=1), "head must be callable, got None"),
        (
            lambda f: f.point_sample([LOGITS, np.zeros(2)], COORDS),
            "input must be a tensor or a list of tensors, got a list of Tensor and ndarray",
        ),
        (
            lambda f: f.refine(LOGITS, LOGITS, keep, output_size=8, num_points=1),
            "output_size must be a list of 64-bit integers or None, got 8",
        ),
        (
            lambda f: f.refine(LOGITS, LOGITS, keep, steps=1.5, num_points=1),
            "steps must be a 64-bit integer or None, got 1.5",
        ),
    ):
        for module in (ops, reference):
            with pytest.raises(TypeError) as refused:
                call(module)
            assert str(refused.value) == words


def test_what_counts_as_an_integer_or_a_number() -> None:
    wanted = ops.uncertain_points(LOGITS, 3)
    for module in (ops, reference):
        for three in (np.int64(3), np.uint8(3), torch.tensor(3)):
            got = module.uncertain_points(LOGITS, three)
            assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
        torch.manual_seed(0)
        assert module.sample_uncertain_points(LOGITS, 4, np.float32(2), 1).shape == (1, 4, 2)


@pytest.mark.bad_input
def test_an_error_of_the_head_stays_what_it_is() -> None:
    def head(fine: Tensor, coarse: Tensor) -> Tensor:
        raise AttributeError("of the head")

    for module in (ops, reference):
        with pytest.raises(AttributeError, match="^of the head$"):
            module.refine(LOGITS, LOGITS, head, steps=1, num_points=2)
