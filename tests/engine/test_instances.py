"""Models of objects in the trainer: their section of a configuration, training, evaluation and prediction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rendseg.data import DataError, build_dataset
from rendseg.data.rle import decode
from rendseg.engine.assemble import build_network, load_trained
from rendseg.engine.checkpoint import load_checkpoint, save_checkpoint
from rendseg.engine.config import Config, ConfigError, build_config
from rendseg.engine.evaluate import evaluate_checkpoint
from rendseg.engine.instance_metrics import detections, evaluate_instances
from rendseg.engine.predict import predict_files
from rendseg.engine.train import train
from tests.engine.processes import run_all, succeed

SIZES: dict[str, Any] = {"fpn_channels": 16, "box_hidden_channels": 16, "anchor_sizes": [8, 16, 32, 64, 128]}
SIZES |= {"box_batch_size_per_image": 16, "rpn_post_nms_top_n_train": 50, "rpn_post_nms_top_n_test": 20}
MASK = {"hidden_channels": 16, "coarse_hidden_channels": 16, "steps": 3, "train_points": 9}


def content(out: Path | str, **train: Any) -> dict[str, Any]:
    """A detector of 0.2 million parameters on scenes of 64 x 64."""
    return {
        "name": "objects",
        "device": "cpu",
        "model": {"name": "pointrend_rcnn", "backbone": {"name": "test_resnet"}, "mask": MASK, **SIZES},
        "data": {"name": "shapes_instances", "size": [64, 64], "num_images": 10, "num_val_images": 3},
        "train": {
            "iterations": 4,
            "precision": "fp32",
            "batch_size": 2,
            "num_workers": 0,
            "log_every": 1,
            "checkpoint_every": 2,
            "tensorboard": False,
            **train,
        },
        "eval": {"num_workers": 0, "pictures": 1},
        "output": {"dir": str(out)},
    }


def configured(out: Path | str = "", *overrides: str, **train: Any) -> Config:
    return build_config(content(out, **train), overrides)


# --------------------------------------------------------------------------------------------------- configuration


def test_a_checkpoint_of_a_detector_is_loaded_as_it_was(tmp_path: Path) -> None:
    config = configured(tmp_path, "model.backbone.freeze_norm=true", "model.min_size=48")
    assert build_config(config.to_dict()) == config
    network = build_network(config, 7)
    classes = {"names": [f"c{i}" for i in range(7)], "palette": [[0, 0, 0]] * 7, "ignore_index": 255}
    contents = {"config": config.to_dict(), "classes": classes, "model": network.state_dict()}
    save_checkpoint(tmp_path / "a.pt", {**contents, "training": {"progress": {"iteration": 0}}})
    _, _, again, _ = load_trained(tmp_path / "a.pt")
    assert not again.training and again.roi_heads.box_predictor.cls_score.out_features == 8
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in again.modules())
    image = torch.rand(3, 40, 60)
    with torch.no_grad():
        found = again([image])[0]
        torch.testing.assert_close(found, network.eval()([image])[0])
    tensors = again.transform([image])[0]
    assert tensors.image_sizes == [(48, 72)] and found["masks"].shape[1:] == (1, 40, 60)
    inside = tensors.tensors[..., :48, :72]  # as the data has normalised it
    torch.testing.assert_close(inside.mean(), image.mean(), rtol=0.01, atol=0.01)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.mask.step=3", "unknown key model.mask.step; did you mean 'steps'"),
        ("model.anchor_sizes=[8]", "model.anchor_sizes must be a list of 5"),
        ("model.backbone={name: resnet50_fpn}", "fpn_channels is not for torchvision's 'resnet50_fpn': leave it out"),
    ],
)
def test_bad_sections(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_network(configured("", override), 7)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.flip=true", "eval.flip is for label maps: leave it out with model.name pointrend_rcnn"),
        ("eval.preset=mmseg", "eval.preset is for label maps"),
        ("eval.window=32", "eval.window is for label maps"),
        ("train.fsdp.enabled=true", "train.fsdp shards models of label maps alone"),
        ("eval.best=miou", "eval.best must be mask_ap or boundary_ap with model.name pointrend_rcnn, got 'miou'"),
        ("model={}", "eval.best must be miou, boundary_iou or pixel_accuracy with model.name pointrend"),
    ],
)
def test_what_objects_have_no_use_for_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured("", "eval.best=boundary_ap", override)


@pytest.mark.bad_input
def test_a_model_of_objects_needs_data_with_objects(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="shapes has label maps, and the networks of model.name pointrend_rcnn learn obj"
    ):
        train(configured(tmp_path, "data={name: shapes}"))


# --------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Images of different sizes, some of whose objects lie outside the crop; statistics of batch norm."""
    pytest.importorskip("faster_coco_eval", reason="rendseg[instances] is not installed")
    config = configured(tmp_path_factory.mktemp("run"), *DIFFERENT, eval_every=3, checkpoint_every=3)
    train(config)
    return config


DIFFERENT = ("data.scale_range=[0.5,1.5]", "model.box_score_thresh=0")


def saved(config: Config) -> dict[str, Any]:
    return load_checkpoint(config.run_dir / "last.pt")


def test_what_a_run_leaves(run: Config) -> None:
    assert {p.name for p in (run.run_dir / "pictures").iterdir()} == {"val_000000.png", "val_000000_zoom.png"}
    metrics = json.loads((run.run_dir / "metrics.json").read_text())
    assert [row["iteration"] for row in metrics["evaluations"]] == [3, 4] and (run.run_dir / "best.pt").is_file()
    row = metrics["history"][0]
    losses = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg", "loss_mask", "loss_mask_point"}
    assert row["loss"] == pytest.approx(sum(row[key] for key in losses), rel=1e-5)
    final = metrics["final"]
    assert [final[kind]["cells"] for kind in ("coarse", "grid", "refined")] == [7, 28, 56]
    assert set(final["refined"]["boundary"]["per_class"]) == set(saved(run)["classes"]["names"])
    assert saved(run)["classes"]["ids"] == list(range(1, 8))


def same_end(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Bit for bit."""
    for key, value in one["model"].items():
        assert torch.equal(value, other["model"][key]), key
    ends = [c["training"]["progress"] for c in (one, other)]
    rows = [[{k: v for k, v in row.items() if k != "images_per_second"} for row in end["history"]] for end in ends]
    assert rows[0] == rows[1]
    for kind in ("coarse", "grid", "refined"):
        assert ends[0]["evaluations"][-1][kind] == ends[1]["evaluations"][-1][kind]


def test_continues_exactly(run: Config, tmp_path: Path) -> None:
    """After an end between two checkpoints, from the one of iteration 2."""
    config = configured(tmp_path, *DIFFERENT)

    def end(iteration: int) -> None:
        if iteration == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, end)
    assert saved(config)["training"]["progress"]["iteration"] == 2
    seen: list[int] = []
    train(config, seen.append)
    assert seen == [3, 4]
    same_end(saved(run), saved(config))


def test_two_processes_make_the_steps_of_one(tmp_path: Path) -> None:
    """On images of one size, without batch statistics, with means over both."""
    pytest.importorskip("faster_coco_eval", reason="rendseg[instances] is not installed")
    exact = ("model.backbone.freeze_norm=true", "model.normalize=global", "train.iterations=3", "eval.pictures=0")
    one, two = (configured(tmp_path, *exact, f"name=n{n}", f"train.batch_size={4 // n}") for n in (1, 2))
    printed = succeed(run_all, [two.to_dict()], world=2)
    assert "boundary AP" in printed[0] and printed[1] == ""
    train(one)
    histories = [saved(config)["training"]["progress"]["history"] for config in (one, two)]
    for a, b in zip(*histories, strict=True):
        a.pop("images_per_second"), b.pop("images_per_second")
        assert a == pytest.approx(b, rel=1e-4)
    for key, value in saved(one)["model"].items():
        torch.testing.assert_close(saved(two)["model"][key], value, rtol=1e-3, atol=1e-5)
    assert histories[0][0]["loss"] != histories[0][-1]["loss"]
    alone = evaluate_checkpoint(two.run_dir / "last.pt", (), tmp_path / "alone")
    together = saved(two)["training"]["progress"]["evaluations"][-1]
    assert all(alone[key] == together[key] for key in ("images", "objects", "detections", "coarse", "grid", "refined"))
    assert alone["detections"] > 0


# ----------------------------------------------------------------------------------------- evaluation and prediction


def test_evaluation_is_that_of_the_training_and_of_the_detections(run: Config, tmp_path: Path) -> None:
    path = run.run_dir / "last.pt"
    result = evaluate_checkpoint(path, (), tmp_path)
    assert result["refined"] == saved(run)["training"]["progress"]["evaluations"][-1]["refined"]
    dataset = build_dataset(run.data, "val")
    network = load_trained(path)[2]
    found = []
    for index in range(len(dataset)):
        with torch.no_grad():
            of = network([dataset[index]["image"]])[0]
        found += detections(dataset, index, of["labels"], of["scores"], of["masks"][:, 0])  # type: ignore[arg-type]
    wanted = evaluate_instances(dataset, found)  # type: ignore[arg-type]
    written = json.loads((tmp_path / "detections.json").read_text())
    assert len(found) == result["detections"] > 3 and written == found
    for kind in ("mask", "boundary"):
        per_class = wanted[kind].pop("per_class")
        assert list(result["refined"][kind].pop("per_class").values()) == per_class
        assert result["refined"][kind] == wanted[kind]
    with pytest.raises(ConfigError, match="--labels is for label maps"):
        evaluate_checkpoint(path, (), tmp_path, "classes")


def test_objects_of_files(run: Config, tmp_path: Path) -> None:
    path = run.run_dir / "last.pt"
    dataset = build_dataset(run.data, "val")
    Image.fromarray(dataset.read_all(1)[0]).save(tmp_path / "scene.png")  # type: ignore[attr-defined]
    network = load_trained(path)[2]
    with torch.no_grad():
        found = network([dataset[1]["image"]])[0]
    least = found["scores"].sort().values[-3].item()
    done = predict_files(
        path, [tmp_path / "scene.png", tmp_path / "no.png"], tmp_path / "out", [f"eval.score_threshold={least}"]
    )
    assert done == (1, 1)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"scene_objects.json", "scene_side_by_side.png"}
    entries = json.loads((tmp_path / "out" / "scene_objects.json").read_text())
    assert len(entries) == 3 and all(entry["score"] >= least and entry["image_id"] == 0 for entry in entries)
    for entry, n in zip(entries, range(len(entries)), strict=True):
        mask = decode(entry["segmentation"]["counts"], 64, 64)
        assert np.array_equal(mask, found["masks"][n, 0].numpy())
        left, top, right, bottom = found["boxes"][n].tolist()
        assert entry["bbox"] == pytest.approx([left, top, right - left, bottom - top])
        assert dataset.class_names[entry["category_id"] - 1] == entry["category"]
