from __future__ import annotations

import pytest
import torch

from rendseg import reference
from rendseg.nn.encoding import Encoding


def test_shapes_and_values() -> None:
    layer = Encoding(24, 7)
    x = torch.randn(2, 24, 9, 11)
    out = layer(x)
    assert out.shape == (2, 7, 24)
    wanted = reference.encode(x.double(), layer.codewords.double(), layer.scale.double())
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(x.flatten(2)), out)


def test_initial_parameters() -> None:
    torch.manual_seed(0)
    layer = Encoding(64, 32)
    bound = (32 * 64) ** -0.5
    assert layer.codewords.shape == (32, 64) and layer.scale.shape == (32,)
    assert layer.codewords.abs().max() <= bound and layer.codewords.abs().max() > 0.99 * bound
    assert abs(layer.codewords.mean()) < 0.1 * bound
    assert (layer.scale <= 0).all() and (layer.scale >= -1).all() and layer.scale.std() > 0.2


def test_learns() -> None:
    """The codebook of a mixture of two clusters moves to lower the residuals: every gradient has the right sign."""
    torch.manual_seed(0)
    centres = torch.tensor([[2.0, 0.0], [-2.0, 1.0]])
    x = (centres[torch.randint(2, (1, 500))] + 0.1 * torch.randn(1, 500, 2)).transpose(1, 2)
    layer = Encoding(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(200):
        loss = (layer(x) / 500).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_state_and_names() -> None:
    layer = Encoding(8, 3)
    assert sorted(layer.state_dict()) == ["codewords", "scale"]
    assert repr(layer) == "Encoding(channels=8, num_codes=3)"
    other = Encoding(8, 3)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(1, 8, 4, 4)
    assert torch.equal(layer(x), other(x))


def test_autocast_and_half_features() -> None:
    layer = Encoding(8, 3)
    x = torch.randn(1, 8, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16 and layer.codewords.grad.dtype == torch.float32


@pytest.mark.bad_input
def test_bad_input() -> None:
    with pytest.raises(ValueError, match="channels must be at least 1, got 0"):
        Encoding(0, 3)
    with pytest.raises(ValueError, match="num_codes must be at least 1, got -1"):
        Encoding(4, -1)
    with pytest.raises(ValueError, match=r"codewords must have shape \[K, D\] with D = 5"):
        Encoding(4, 2)(torch.ones(1, 5, 2, 2))
