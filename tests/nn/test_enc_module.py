"""EncModule against the formula written out with [N, M, K, D] tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rendseg.nn import EncModule


def by_hand(module, x, reduction):
    p, n = module.project, module.project.norm
    y = F.batch_norm(F.conv2d(x, p.weight, p.bias), n.running_mean, n.running_var, n.weight, n.bias).relu()
    y = y.flatten(2).transpose(1, 2)  # [N, M, D]
    residuals = y[:, :, None] - module.encoding.codewords  # [N, M, K, D]
    assignment = (module.encoding.scale * residuals.square().sum(3)).softmax(2)
    codes = (assignment[..., None] * residuals).sum(1)  # [N, K, D]
    n = module.norm
    codes = (codes - n.running_mean[:, None]) / (n.running_var[:, None] + n.eps).sqrt()
    codes = (codes * n.weight[:, None] + n.bias[:, None]).clamp(min=0)
    encoding = codes.mean(1) if reduction == "mean" else codes.sum(1)
    gate = 1 / (1 + torch.exp(-(encoding @ module.gate.weight.T + module.gate.bias)))
    return (x * (1 + gate[:, :, None, None])).clamp(min=0), encoding


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", ["bn", "syncbn"])
def test_equals_the_formula(reduction, bias, norm):
    torch.manual_seed(0)
    module = EncModule(6, 5, norm=norm, project_bias=bias, reduction=reduction).eval()
    for m in (module.project.norm, module.norm):
        m.running_mean.normal_()
        m.running_var.uniform_(0.5, 2)
        nn.init.normal_(m.weight)
        nn.init.normal_(m.bias)
    assert (module.project.bias is not None) is bias
    if bias:
        nn.init.normal_(module.project.bias)
    x = torch.randn(2, 6, 7, 9)  # with negative values: the gate works before the ReLU
    out, encoding = module(x)
    expected, expected_encoding = by_hand(module, x, reduction)
    torch.testing.assert_close(encoding, expected_encoding, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_codes_are_normalised_per_code():
    module = EncModule(6, 5).train()
    seen = []
    module.norm.register_forward_hook(lambda _m, _i, out: seen.append(out))
    module(torch.randn(3, 6, 7, 9))
    assert seen[0].shape == (3, 5, 6) and isinstance(module.norm, nn.BatchNorm1d)
    torch.testing.assert_close(seen[0].mean((0, 2)), torch.zeros(5), atol=1e-5, rtol=0)


def test_autocast():
    module = EncModule(8, 4)
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, encoding = module(x.bfloat16())
    assert out.dtype == torch.bfloat16 and encoding.dtype == torch.float32
    (out.float().sum() + encoding.sum()).backward()
    assert x.grad.isfinite().all() and all(p.grad is not None for p in module.parameters())


@pytest.mark.bad_input
def test_bad_options():
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, got 'max'"):
        EncModule(4, 2, reduction="max")
    with pytest.raises(ValueError, match="num_codes must be at least 1, got 0"):
        EncModule(4, 0)
