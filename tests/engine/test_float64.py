"""Devices without float64: a step, an evaluation and a prediction make none there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rendseg import _float64, reference
from rendseg.engine.config import ConfigError, EvalConfig
from rendseg.engine.inference import predict_scores
from rendseg.engine.predict import predict_files
from rendseg.engine.train import train
from tests.engine.tiny import TinyNet, tiny_config


class OnCpu(Tensor):
    """What ``Tensor.cpu`` made of a tensor of the device."""


class NoFloat64(TorchDispatchMode):
    """CPU tensors are those of a device without float64, except what ``cpu()`` returned."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        seen = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        if any(t.dtype == torch.float64 for t in seen) and not any(isinstance(t, OnCpu) for t in seen):
            raise TypeError(f"{func} meets float64, which this device has not")
        return result


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> NoFloat64:
    monkeypatch.setattr(_float64, "WITHOUT", {"cpu"})
    monkeypatch.setattr("rendseg.engine.inference.WITHOUT", {"cpu"})
    monkeypatch.setattr(Tensor, "cpu", lambda self: self.as_subclass(OnCpu))
    return NoFloat64()


def test_the_fake_device_refuses(refusing: NoFloat64) -> None:
    with refusing:
        x = torch.ones(2)
        assert x.cpu().double().sum().tolist() == 2
        with pytest.raises(TypeError, match="float64"):
            x.double()
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(2, dtype=torch.float64)


def test_training_evaluation_and_prediction(tmp_path: Path, refusing: NoFloat64) -> None:
    terms = ["cross_entropy", "ohem", "dice", "lovasz", {"name": "focal", "alpha": 0.5}]
    config = tiny_config(
        tmp_path, "eval.flip=true", "eval.scales=[1,1.5]", f"model.loss.terms={terms}", "eval.pictures=1", iterations=3
    )
    Image.fromarray(np.zeros((40, 48, 3), np.uint8)).save(tmp_path / "a.png")
    with refusing:
        result = train(config)
        assert predict_files(config.run_dir / "last.pt", [tmp_path / "a.png"], tmp_path / "out") == (1, 0)
    assert result["finished"] and result["history"][0]["loss"] > 0


def test_labels_of_points_are_the_same(refusing: NoFloat64) -> None:
    torch.manual_seed(0)
    labels, coords = torch.randint(0, 9, (2, 7, 11)), torch.rand(2, 50, 2)
    cell = (coords.numpy().astype(np.float64) * [11, 7]).astype(np.int64)
    with refusing, torch.no_grad():
        found = reference.point_labels(labels, coords)
    assert (found.numpy() == labels.numpy()[np.arange(2)[:, None], cell[..., 1], cell[..., 0]]).all()


@pytest.mark.bad_input
def test_exp_is_refused(refusing: NoFloat64) -> None:
    with pytest.raises(ConfigError, match=r"eval.merge: exp needs float64.*set eval.merge=softmax or device=cpu"):
        predict_scores(TinyNet(3), torch.zeros(1, 3, 8, 8), (8, 8), EvalConfig(merge="exp"))
