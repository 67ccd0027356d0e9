"""The training loop: it learns, and it continues exactly after every kind of end."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from rendseg.data import DataError
from rendseg.engine import train as module
from rendseg.engine.checkpoint import CheckpointError, load_checkpoint
from rendseg.engine.config import Config, ConfigError, OptimizerConfig, ScheduleConfig
from rendseg.engine.optimize import build_optimizer, learning_rate
from rendseg.engine.runtime import StopRequested
from rendseg.engine.train import Interrupted, TrainingError, train
from tests.engine import processes
from tests.engine.tiny import tiny_config, tiny_content, tiny_network

REPO = Path(__file__).resolve().parents[2]


def weights(config: Config) -> dict[str, torch.Tensor]:
    return load_checkpoint(config.run_dir / "last.pt")["model"]


def assert_same_end(one: Config, other: Config) -> None:
    """Same weights, optimizer state and losses, bit for bit."""
    a, b = load_checkpoint(one.run_dir / "last.pt"), load_checkpoint(other.run_dir / "last.pt")
    assert a["training"]["progress"]["iteration"] == b["training"]["progress"]["iteration"]
    for key, value in a["model"].items():
        assert torch.equal(value, b["model"][key]), key
    states = [c["training"]["optimizer"]["state"] for c in (a, b)]
    for index, state in states[0].items():
        assert torch.equal(state["momentum_buffer"], states[1][index]["momentum_buffer"])
    rows = [
        [{k: v for k, v in row.items() if k != "images_per_second"} for row in c["training"]["progress"]["history"]]
        for c in (a, b)
    ]
    assert rows[0] == rows[1]
    for kind in ("coarse", "refined"):
        assert a["training"]["progress"]["evaluations"][-1][kind] == b["training"]["progress"]["evaluations"][-1][kind]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = tiny_config(tmp_path_factory.mktemp("uninterrupted"), eval_every=5)
    train(config)
    return config


def test_what_a_run_leaves(uninterrupted: Config) -> None:
    folder = uninterrupted.run_dir
    names = {p.name for p in folder.iterdir()}
    assert names == {"last.pt", "best.pt", "iteration_0000008.pt", "metrics.json", "config.yaml", "pictures"}
    assert {p.name for p in (folder / "pictures").iterdir()} == {"val_000000.png", "val_000000_zoom.png"}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["finished"] and metrics["final"]["iteration"] == 8
    assert [row["iteration"] for row in metrics["history"]] == [3, 6, 8]
    assert [row["iteration"] for row in metrics["evaluations"]] == [5, 8]
    assert metrics["final"]["loss"] == metrics["history"][-1]["loss"]
    row = metrics["history"][0]
    assert row["loss"] == pytest.approx(row["loss_coarse"] + row["loss_point"], rel=1e-6)
    assert set(metrics["final"]["refined"]) >= {"miou", "boundary_iou", "pixel_accuracy", "per_class_iou"}
    saved = load_checkpoint(folder / "last.pt")
    assert saved["config"] == uninterrupted.to_dict()
    assert saved["classes"]["names"][0] == "background"


def test_the_loss_falls_and_scalars_are_written(tmp_path: Path) -> None:
    # Small steps, and points drawn evenly: those of uncertain cells lie elsewhere after every step.
    slowly = ("train.optimizer.lr=0.005", "model.pointrend.importance_ratio=0")
    config = tiny_config(tmp_path, *slowly, iterations=60, log_every=10, tensorboard=True, checkpoint_every=100)
    history = train(config)["history"]
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(config.run_dir / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [10, 20, 30, 40, 50, 60]
    assert events.Scalars("train/loss")[-1].value == pytest.approx(history[-1]["loss"], rel=1e-5)
    assert "val/boundary_iou/refined" in events.Tags()["scalars"]
    assert len(events.Tags()["images"]) == 1


# ------------------------------------------------------------------------------------------------- resumption


def test_continues_exactly_after_sigterm(tmp_path: Path, uninterrupted: Config) -> None:
    config = tiny_config(tmp_path, eval_every=5)

    def send(iteration: int) -> None:
        if iteration == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    previous = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="SIGTERM at iteration 6.*continues"):
        train(config, send)
    assert signal.getsignal(signal.SIGTERM) is previous
    saved = load_checkpoint(config.run_dir / "last.pt")["training"]["progress"]
    assert saved["iteration"] == 6
    seen: list[int] = []
    train(config, seen.append)
    assert seen == [7, 8]
    assert_same_end(config, uninterrupted)


@pytest.mark.parametrize(
    ("function", "arguments", "saved_at"),
    [
        (processes.run, (6,), 5),  # between two checkpoints
        (processes.run_and_die_in_a_save, (), 4),
    ],
    ids=["kill", "kill during a save"],
)
def test_continues_exactly_after_kill_9(
    tmp_path: Path, uninterrupted: Config, function: Any, arguments: Any, saved_at: int
) -> None:
    [(code, _, err)] = processes.launch(function, tiny_content(tmp_path, eval_every=5), *arguments)
    assert code == -signal.SIGKILL, err
    config = tiny_config(tmp_path, eval_every=5)
    assert load_checkpoint(config.run_dir / "last.pt")["training"]["progress"]["iteration"] == saved_at
    train(config)
    assert_same_end(config, uninterrupted)


def test_a_full_disk_ends_the_run_and_the_last_checkpoint_continues(
    tmp_path: Path, uninterrupted: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, eval_every=5)
    replace, saves = os.replace, []

    def full(source: Any, target: Any) -> None:
        saves.append(target)
        if str(target).endswith("last.pt") and sum(str(t).endswith("last.pt") for t in saves) == 3:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        train(config)
    monkeypatch.undo()
    assert load_checkpoint(config.run_dir / "last.pt")["training"]["progress"]["iteration"] == 5
    train(config)
    assert_same_end(config, uninterrupted)


def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(tmp_path: Path, uninterrupted: Config) -> None:
    config = tiny_config(tmp_path, eval_every=5, keep_checkpoints=2)
    with pytest.raises(Interrupted):
        train(config, lambda iteration: iteration == 5 and os.kill(os.getpid(), signal.SIGTERM))
    names = sorted(p.name for p in config.run_dir.glob("iteration_*.pt"))
    assert names == ["iteration_0000004.pt", "iteration_0000005.pt"]
    for name in ("last.pt", "iteration_0000005.pt"):
        damaged = (config.run_dir / name).read_bytes()[:1000]
        (config.run_dir / name).unlink()  # not through the hard link
        (config.run_dir / name).write_bytes(damaged)
    seen: list[int] = []
    train(config, seen.append)
    assert seen == [5, 6, 7, 8]
    assert_same_end(config, uninterrupted)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_random_state_of_training_is_a_function_of_seed_and_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """Not of the weights that were drawn before: dropout differs between processes, and not between networks."""
    monkeypatch.setattr(module.Accelerator, "process_index", rank)
    module.Run.prepare(tiny_config(tmp_path, "seed=5"))
    drawn = torch.rand(4), random.random(), float(np.random.rand())
    torch.manual_seed(6 + rank), random.seed(6 + rank), np.random.seed(6 + rank)
    assert torch.equal(drawn[0], torch.rand(4)) and drawn[1:] == (random.random(), float(np.random.rand()))


def test_workers_do_not_change_the_result(tmp_path: Path, uninterrupted: Config) -> None:
    config = tiny_config(tmp_path, eval_every=5, num_workers=2)
    train(config)
    assert_same_end(config, uninterrupted)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, iterations=2)
    train(config)
    seen: list[int] = []
    train(config, seen.append)
    assert seen == []
    train(tiny_config(tmp_path, "resume=never", iterations=2), seen.append)
    assert seen == [1, 2]


@pytest.mark.bad_input
def test_another_configuration_does_not_continue_silently(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny_config(tmp_path, iterations=2))
    with pytest.raises(ConfigError, match=r"train\.optimizer\.lr: 0\.02 there, 0\.5 now"):
        train(tiny_config(tmp_path, "train.optimizer.lr=0.5", iterations=2))
    last = tmp_path / "tiny" / "last.pt"
    seen: list[int] = []
    train(tiny_config(tmp_path, "train.log_every=1", iterations=2), seen.append)  # harmless: accepted, finished
    capsys.readouterr()
    train(tiny_config(tmp_path, f"resume={last}", iterations=3), seen.append)  # told to: continues with new settings
    assert seen == [3]
    change = f"iteration 2: 0 in the schedule of 2 iterations so far, {0.02 * (1 / 3) ** 0.9:.3g} in that of 3"
    assert change in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="another model: .*differ in shape, first"):
        train(tiny_config(tmp_path, f"resume={last}", "model.decoder.channels=24", "name=other", iterations=3))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_ends_the_wait_for_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """An image that never comes; the second part of an accumulated batch, so that the first must not count."""
    parent, build = os.getpid(), module.build_data

    def stuck(config: Config, split: str) -> Any:
        data = build(config, split)
        sample = data.sample

        def wait(index: int, epoch: int) -> Any:
            if split == "train" and epoch == 1:
                os.kill(parent, signal.SIGTERM)
                time.sleep(100)
            return sample(index, epoch)

        data.sample = wait
        return data

    monkeypatch.setattr(module, "build_data", stuck)
    options = {"batch_size": 2, "gradient_accumulation": 2, "num_workers": workers}
    with pytest.raises(Interrupted, match="SIGTERM at iteration 2"):
        train(tiny_config(tmp_path, **options))
    assert not multiprocessing.active_children()
    monkeypatch.undo()
    train(tiny_config(tmp_path, **options))
    whole = tiny_config(tmp_path, "name=whole", **options)
    train(whole)
    assert_same_end(tiny_config(tmp_path, **options), whole)


def test_an_evaluation_that_a_signal_ended_is_made_on_resumption(tmp_path: Path, uninterrupted: Config) -> None:
    config = tiny_config(tmp_path, "train.eval_every=5")
    with pytest.MonkeyPatch.context() as patch:

        def stop(*_: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            raise StopRequested

        patch.setattr(module, "evaluate", stop)
        with pytest.raises(Interrupted, match="SIGTERM at iteration 5"):
            train(config)
    seen: list[int] = []
    assert [row["iteration"] for row in train(config, seen.append)["evaluations"]] == [5, 8]
    assert seen == [6, 7, 8]
    assert_same_end(config, uninterrupted)


# ------------------------------------------------------------------------------------------------- mathematics


def test_schedule_is_its_formula() -> None:
    poly = ScheduleConfig(name="poly", power=0.9, warmup_iterations=10, warmup_factor=0.1, min_lr=1e-4)
    for t in range(100):
        wanted = 1e-4 + (0.02 - 1e-4) * (1 - t / 100) ** 0.9
        if t < 10:
            wanted *= 0.1 + 0.9 * t / 10
        assert learning_rate(t, 100, 0.02, poly) == pytest.approx(wanted, rel=1e-12)
    assert learning_rate(0, 100, 0.02, poly) == pytest.approx(0.002)
    assert learning_rate(100, 100, 0.02, poly) == pytest.approx(1e-4)
    constant = ScheduleConfig(name="constant", warmup_iterations=4, warmup_factor=0.0)
    assert [learning_rate(t, 9, 1.0, constant) for t in (0, 1, 4, 8)] == [0.0, 0.25, 1.0, 1.0]
    step = ScheduleConfig(name="step", milestones=(4, 7), gamma=0.1, warmup_iterations=2, warmup_factor=0.001)
    wanted = [0.001 * 0.01, 0.5005 * 0.01, *[0.01] * 2, *[0.001] * 3, 0.0001]
    assert [learning_rate(t, 8, 0.01, step) for t in range(8)] == pytest.approx(wanted)
    cosine = ScheduleConfig(name="cosine", min_lr=0.1)
    assert [learning_rate(t, 4, 1.0, cosine) for t in (0, 2, 4)] == pytest.approx([1.0, 0.55, 0.1])


def test_the_learning_rate_reaches_the_groups(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path, "train.schedule.warmup_iterations=0", "train.optimizer.head_lr_factor=10", iterations=4, log_every=1
    )
    history = train(config)["history"]
    assert [row["lr"] for row in history] == pytest.approx([0.02 * (1 - t / 4) ** 0.9 for t in range(4)])
    groups = load_checkpoint(config.run_dir / "last.pt")["training"]["optimizer"]["param_groups"]
    assert sorted(g["lr"] / history[-1]["lr"] for g in groups) == pytest.approx([1, 10])


def test_parameter_groups() -> None:
    model = nn.Module()
    model.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model.head = nn.Sequential(nn.Conv2d(4, 5, 1), nn.GroupNorm(1, 5))
    groups = build_optimizer(
        model, OptimizerConfig(head_lr_factor=10, no_decay_on_norm=True, weight_decay=0.5)
    ).param_groups
    found = {(g["lr_factor"], g["weight_decay"]): [list(p.shape) for p in g["params"]] for g in groups}
    assert found == {
        (1.0, 0.5): [[4, 3, 1, 1]],
        (1.0, 0.0): [[4], [4], [4]],
        (10.0, 0.5): [[5, 4, 1, 1]],
        (10.0, 0.0): [[5], [5], [5]],
    }
    groups = build_optimizer(model, OptimizerConfig()).param_groups
    assert [len(g["params"]) for g in groups] == [4, 4]


def test_adamw() -> None:
    model = nn.Module()
    model.backbone = nn.Conv2d(3, 4, 1)
    model.backbone.no_weight_decay = lambda: {"weight"}
    model.head = nn.Conv2d(4, 5, 1)
    options = OptimizerConfig(name="adamw", lr=6e-5, betas=(0.8, 0.99), weight_decay=0.01, no_decay_on_norm=True)
    optimizer = build_optimizer(model, options)
    assert type(optimizer) is torch.optim.AdamW
    found = [(g["lr"], g["betas"], g["eps"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]
    shared = (6e-5, (0.8, 0.99), 1e-8)
    assert sorted(found) == [(*shared, 0.0, 1), (*shared, 0.0, 2), (*shared, 0.01, 1)]


def test_adamw_trains_and_continues(tmp_path: Path) -> None:
    options = {"optimizer": {"name": "adamw", "lr": 1e-3}, "iterations": 3, "checkpoint_every": 1, "log_every": 1}
    train(tiny_config(tmp_path, "name=whole", **options))
    with pytest.raises(Interrupted):
        train(tiny_config(tmp_path, **options), lambda i: i == 1 and os.kill(os.getpid(), signal.SIGTERM))
    train(tiny_config(tmp_path, **options))
    a, b = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "tiny"))
    assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())
    for index, state in a["training"]["optimizer"]["state"].items():
        assert all(torch.equal(v, b["training"]["optimizer"]["state"][index][k]) for k, v in state.items())


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        ({"schedule": {"name": "step"}}, "the schedule step needs milestones"),
        ({"schedule": {"milestones": [3]}}, "milestones are for the schedule step, not poly"),
        ({"schedule": {"name": "step", "milestones": [5, 3]}}, r"milestones must ascend, got \[5, 3\]"),
        ({"optimizer": {"name": "adamw", "nesterov": True}}, "nesterov: true is for sgd, not adamw"),
        ({"optimizer": {"name": "adam"}}, "train.optimizer.name"),
        ({"optimizer": {"name": "adamw", "betas": [0.9, 1.0]}}, "train.optimizer.betas"),
    ],
)
def test_bad_optimizers_and_schedules(tmp_path: Path, overrides: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        tiny_config(tmp_path, **overrides)


@pytest.mark.bad_input
def test_the_state_of_another_optimizer(tmp_path: Path) -> None:
    train(tiny_config(tmp_path, iterations=1))
    last = tmp_path / "tiny" / "last.pt"
    with pytest.raises(
        CheckpointError, match="has the optimizer state of sgd, which train.optimizer.name=adamw cannot"
    ):
        train(tiny_config(tmp_path, f"resume={last}", iterations=2, optimizer={"name": "adamw"}))


def test_a_run_of_before_a_key_was_known_is_continued(tmp_path: Path) -> None:
    train(tiny_config(tmp_path, iterations=1))
    last = tmp_path / "tiny" / "last.pt"
    contents = torch.load(last, weights_only=True)
    del contents["config"]["model"]["auxiliary"], contents["config"]["train"]["optimizer"]["betas"]
    torch.save(contents, last)
    train(tiny_config(tmp_path, iterations=1))


def test_accumulation_equals_the_larger_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "build_network", tiny_network)
    results = []
    for name, batch_size, parts in (("whole", 4, 1), ("parts", 1, 4)):
        config = tiny_config(tmp_path, f"name={name}", batch_size=batch_size, gradient_accumulation=parts)
        history = train(config)["history"]
        results.append((weights(config), [row["loss"] for row in history]))
    for key, value in results[0][0].items():
        torch.testing.assert_close(results[1][0][key], value, rtol=1e-4, atol=1e-6)
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-5)


def test_clipping_bounds_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "build_network", tiny_network)
    config = tiny_config(
        tmp_path,
        "train.clip_grad_norm=0.001",
        "train.optimizer.weight_decay=0",
        "train.schedule={name: constant}",
        "train.optimizer.lr=1",
        iterations=1,
    )
    train(config)
    before = tiny_network(config, 8).state_dict()
    moved = sum((weights(config)[k] - v).square().sum() for k, v in before.items()).sqrt()
    assert float(moved) == pytest.approx(0.001, rel=1e-3)


def test_bf16(tmp_path: Path) -> None:
    history = train(tiny_config(tmp_path, precision="bf16", iterations=2, log_every=1))["history"]
    assert all(math.isfinite(row["loss"]) for row in history)
    assert all(v.dtype != torch.bfloat16 for v in weights(tiny_config(tmp_path)).values())


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.bad_input
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    def poisoned(*args: Any) -> nn.Module:
        network = tiny_network(*args)
        forward, calls = network.forward, []

        def wrapped(images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            calls.append(1)
            losses = forward(images, labels)
            return {**losses, "loss_point": losses["loss_coarse"] * (value if len(calls) == 6 else 1.0)}

        network.forward = wrapped  # type: ignore[method-assign]
        return network

    monkeypatch.setattr(module, "build_network", poisoned)
    config = tiny_config(tmp_path)
    with pytest.raises(TrainingError, match=r"not finite at iteration 6 \(.*loss_point (nan|inf).*last\.pt"):
        train(config)
    assert load_checkpoint(config.run_dir / "last.pt")["training"]["progress"]["iteration"] == 4


@pytest.mark.bad_input
def test_the_terms_in_the_message_are_of_the_bad_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of two passes of iteration 3 is bad, the second is not."""
    monkeypatch.setattr(module, "build_network", lambda *args: processes.poisoned(tiny_network(*args), call=5))
    with pytest.raises(TrainingError, match=r"not finite at iteration 3 \(loss_coarse \d\S+, loss_point nan\);"):
        train(tiny_config(tmp_path, gradient_accumulation=2))


@pytest.mark.bad_input
def test_a_step_that_pytorch_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [RuntimeError("shapes cannot be multiplied\n and more"), torch.OutOfMemoryError("tried 2 GiB\n more")]
    wanted = [
        "a training step failed: shapes cannot be multiplied; ",
        "no memory is left for a step: tried 2 GiB; lower",
    ]
    for number, (error, begin) in enumerate(zip(errors, wanted, strict=True)):

        def refusing(*args: Any, error: Exception = error) -> nn.Module:
            network = tiny_network(*args)
            network.forward = mock.Mock(side_effect=error)  # type: ignore[method-assign]
            return network

        monkeypatch.setattr(module, "build_network", refusing)
        with pytest.raises(TrainingError) as raised:
            train(tiny_config(tmp_path / str(number)))
        assert str(raised.value).startswith(begin) and "\n" not in str(raised.value)


@pytest.mark.bad_input
def test_an_image_that_cannot_be_validated_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it is mended, the same command goes on with the evaluation, and ends like a run without the fault."""
    monkeypatch.setattr(module, "build_network", tiny_network)
    whole = train(tiny_config(tmp_path / "whole", eval_every=3))
    config = tiny_config(tmp_path / "broken", eval_every=3)
    with monkeypatch.context() as broken:
        broken.setattr(module, "evaluate", mock.Mock(side_effect=DataError("a.png cannot be read")))
        with pytest.raises(DataError, match=r"^a\.png cannot be read; the run is saved as of iteration 3, and"):
            train(config)
    assert load_checkpoint(config.run_dir / "last.pt")["training"]["progress"]["iteration"] == 3
    mended = train(config)

    def scores(metrics: dict[str, Any]) -> list[Any]:
        return [(e["iteration"], e["refined"]) for e in metrics["evaluations"]]

    assert scores(mended) == scores(whole) and len(scores(whole)) == 3


@pytest.mark.bad_input
def test_the_first_bad_loss_is_kept_however_late_it_is_read() -> None:
    watch = module._BadLoss(torch.device("cpu"))
    for iteration, values in enumerate([(1.0, 2.0), (3.0, math.nan), (math.inf, 5.0), (6.0, 7.0)]):
        assert watch.at() == (-1 if iteration < 2 else 1)
        coarse, point = (torch.tensor(value) for value in values)
        watch.watch(iteration, coarse + point, {"coarse": coarse, "point": point})
    assert watch.at() == 1 and watch.terms() == {"coarse": 3.0, "point": pytest.approx(math.nan, nan_ok=True)}


@pytest.mark.bad_input
def test_time_limit(tmp_path: Path) -> None:
    metrics = train(tiny_config(tmp_path, iterations=500, time_limit_minutes=0.01))
    assert 1 <= metrics["final"]["iteration"] < 500 and not metrics["finished"]
    assert metrics["evaluations"][-1]["iteration"] == metrics["final"]["iteration"]


@pytest.mark.bad_input
@pytest.mark.skipif(torch.accelerator.is_available(), reason="fp16 can be had here")
def test_fp16_on_the_cpu(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fp16 needs a GPU; use bf16 or fp32"):
        train(tiny_config(tmp_path, precision="fp16"))


@pytest.mark.bad_input
def test_a_model_that_cannot_be_built(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the model cannot be built.*resnet1800"):
        train(tiny_config(tmp_path, "model.backbone.name=resnet1800"))
