"""Every configuration in ``configs/``: it loads, says where it comes from, and its model can be built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rendseg.data import build_dataset
from rendseg.engine.config import load_config
from rendseg.engine.experiment import load_experiment
from rendseg.models import build_model, decoder_names

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "experiments")
EXPERIMENTS = sorted((ROOT / "configs" / "experiments").glob("*.yaml"))
CLASSES = {"cityscapes": 19, "ade20k": 150, "voc": 21, "camvid": 11, "coco": 80}


def name(path: Path) -> str:
    return path.relative_to(ROOT / "configs").with_suffix("").as_posix()


@pytest.mark.parametrize("path", FILES, ids=name)
def test_configuration(path: Path) -> None:
    config = load_config(path)
    assert config.name == name(path).replace("/", "_")
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    if config.data["name"] in ("cityscapes", "ade20k", "voc", "coco"):
        assert "source" in head and "expected" in head
        assert config.model["backbone"]["pretrained"]
    classes = CLASSES.get(config.data["name"]) or 7
    options = {**config.model, "backbone": {**config.model["backbone"], "pretrained": False}}
    with torch.device("meta"):
        model = build_model(options, classes)
    weights = config.model.get("loss", {}).get("class_weights")
    assert weights is None or len(weights) == classes
    assert sum(p.numel() for p in model.parameters()) > 1e5


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name)
def test_experiment(path: Path) -> None:
    experiment, runs = load_experiment(path)
    assert experiment.name == path.stem and len(experiment.seeds) >= 3
    for config in runs.values():
        with torch.device("meta"):
            build_model(config.model, CLASSES[config.data["name"]])
    iterations = {(c.train.iterations, c.train.batch_size, tuple(c.data["crop_size"])) for c in runs.values()}
    assert len(iterations) == 1, "the budgets differ"


def test_every_decoder_has_a_small_configuration() -> None:
    models = [load_config(path).model for path in FILES if path.parent.name == "shapes"]
    small = {model["decoder"]["name"] for model in models if "decoder" in model}
    assert small >= set(decoder_names()) - {"upp"}  # which needs labels of several tasks


def test_the_synthetic_configurations_need_no_files() -> None:
    for path in FILES:
        config = load_config(path)
        if config.data["name"] in ("shapes", "shapes_instances"):
            assert len(build_dataset(config.data, "val")) > 0
