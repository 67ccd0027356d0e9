from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from rendseg.nn import PointHead


def by_hand(head: PointHead, fine: torch.Tensor, coarse: torch.Tensor) -> torch.Tensor:
    """The definition, point by point: a matrix and a bias per layer."""
    layers = [(m.weight.detach()[:, :, 0], m.bias.detach()) for m in head.layers()]

    def join(a, b):
        return torch.cat((b, a) if head.coarse_first else (a, b))

    out = torch.empty(fine.shape[0], head.num_classes, fine.shape[2], dtype=fine.dtype)
    for n, p in itertools.product(range(fine.shape[0]), range(fine.shape[2])):
        x = join(fine[n, :, p], coarse[n, :, p])
        for weight, bias in layers[:-1]:
            x = (weight @ x + bias).clamp(min=0)
            if head.coarse_each_layer:
                x = join(x, coarse[n, :, p])
        out[n, :, p] = layers[-1][0] @ x + layers[-1][1]
    return out


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_forward_equals_the_definition(layers, each, first):
    torch.manual_seed(0)
    head = PointHead(6, 3, 5, layers, each, first, init="torch").double()
    fine, coarse = torch.randn(2, 6, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(head(fine, coarse), by_hand(head, fine, coarse), rtol=1e-12, atol=1e-12)
    assert head(fine[:, :, :0], coarse[:, :, :0]).shape == (2, 3, 0)
    assert head(fine[:0], coarse[:0]).shape == (0, 3, 4)


@pytest.mark.parametrize(("each", "second"), [(False, 256), (True, 275)])
def test_parameter_shapes_are_those_of_published_networks(each, second):
    shapes = {k: tuple(v.shape) for k, v in PointHead(256, 19, coarse_each_layer=each).state_dict().items()}
    assert shapes["fc1.weight"] == (256, 275, 1)
    assert shapes["fc2.weight"] == shapes["fc3.weight"] == (256, second, 1)
    assert shapes["predictor.weight"] == (19, second, 1)
    assert set(shapes) == {f"{m}.{p}" for m in ("fc1", "fc2", "fc3", "predictor") for p in ("weight", "bias")}


@pytest.mark.parametrize(
    ("init", "hidden", "predictor"),
    [
        ("detectron2", (2 / 256) ** 0.5, 0.001),
        ("mmseg", (2 / 256) ** 0.5, 0.01),
        ("paddleseg", (2 / 275) ** 0.5, (2 / 275) ** 0.5),
        ("torch", (1 / (3 * 275)) ** 0.5, (1 / (3 * 275)) ** 0.5),
    ],
)
def test_initialisation(init, hidden, predictor):
    torch.manual_seed(1)
    head = PointHead(256, 19, init=init)
    assert head.fc2.weight.std().item() == pytest.approx(hidden, rel=0.03)
    assert head.predictor.weight.std().item() == pytest.approx(predictor, rel=0.05)
    zero = all(not m.bias.any() for m in head.layers())
    assert zero == (init != "torch")


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"num_layers": -1}, "num_layers must be at least 0, got -1"),
        ({"hidden_channels": 0}, "hidden_channels must be at least 1, got 0"),
        ({"init": "xavier"}, "init must be one of detectron2, mmseg, paddleseg, torch, got 'xavier'"),
    ],
)
def test_bad_arguments(kwargs, match):
    with pytest.raises(ValueError, match=match):
        PointHead(4, 2, **kwargs)


def test_bad_shapes_are_named():
    head = PointHead(4, 2, 8)
    with pytest.raises(ValueError, match=r"fine must have shape \[N, 4, P\], got \[1, 3, 5\]"):
        head(torch.zeros(1, 3, 5), torch.zeros(1, 2, 5))
    with pytest.raises(
        ValueError, match=r"coarse must have shape \[N, C, P\] = \[1, 2, 5\] as in fine, got \[1, 2, 6\]"
    ):
        head(torch.zeros(1, 4, 5), torch.zeros(1, 2, 6))


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_refine_parameters_describe_the_head(each, first):
    torch.manual_seed(2)
    head = PointHead(5, 3, 7, 2, each, first, init="torch").double().eval()
    found = head.refine_parameters()
    assert found is not None and found.coarse_each_layer is each and found.coarse_first is first
    widths = [8, 10 if each else 7, 10 if each else 7]
    assert [tuple(w.shape) for w in found.weights] == [(7, widths[0]), (7, widths[1]), (3, widths[2])]
    for module, weight, bias in zip(head.layers(), found.weights, found.biases, strict=True):
        assert weight.data_ptr() == module.weight.data_ptr() and bias is module.bias  # no copy to go stale


class Doubled(PointHead):
    def forward(self, fine, coarse):
        return 2 * super().forward(fine, coarse)


def attach(method):
    def apply(head):
        getattr(head.fc2, method)(lambda *_: None)
        getattr(head, method)(lambda *_: None)
        return head

    return apply


def parametrise(head):
    torch.nn.utils.parametrizations.weight_norm(head.fc1)
    return head


def replace_layer(head):
    head.fc2 = nn.Sequential(head.fc2)
    return head


@pytest.mark.parametrize(
    "change",
    [
        lambda head: head.train(),
        lambda _: Doubled(4, 3, 5).eval(),
        attach("register_forward_hook"),
        attach("register_forward_pre_hook"),
        attach("register_full_backward_hook"),
        attach("register_full_backward_pre_hook"),
        parametrise,
        replace_layer,
    ],
    ids=["train", "subclass", "hook", "pre_hook", "backward_hook", "backward_pre_hook", "parametrised", "replaced"],
)
def test_refine_parameters_step_aside(change):
    head = PointHead(4, 3, 5).eval()
    assert head.refine_parameters() is not None
    assert change(head).refine_parameters() is None


def test_hook_on_one_layer_only_is_seen_and_removal_restores():
    head = PointHead(4, 3, 5).eval()
    handle = head.predictor.register_forward_hook(lambda *_: None)
    assert head.refine_parameters() is None
    handle.remove()
    assert head.refine_parameters() is not None


def test_global_hook_is_seen():
    head = PointHead(4, 3, 5).eval()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert head.refine_parameters() is None
    finally:
        handle.remove()


@pytest.mark.parametrize("coarse_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_autocast(coarse_dtype):
    torch.manual_seed(3)
    head = PointHead(16, 4, 32, init="torch")
    fine, coarse = torch.randn(2, 16, 9), torch.randn(2, 4, 9)
    exact = head(fine, coarse)
    with torch.autocast("cpu", torch.bfloat16):
        out = head(fine.bfloat16(), coarse.to(coarse_dtype))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.02)  # three layers of 8 significant bits
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
