"""What ``auto`` chooses, that the choice is kept, and that measuring changes nothing."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from rendseg.engine import automatic, runtime
from rendseg.engine import train as module
from rendseg.engine.automatic import faster_precision
from rendseg.engine.checkpoint import load_checkpoint
from rendseg.engine.config import Config, ConfigError, ScheduleConfig
from rendseg.engine.optimize import learning_rate
from rendseg.engine.train import Interrupted, train
from tests.engine.tiny import tiny_config, tiny_network


class Slow(nn.Module):
    """100 operators, each of which takes longer in one of the two precisions."""

    def __init__(self, slow: torch.dtype, seconds: float = 0.02) -> None:
        super().__init__()
        self.norm, self.slow, self.seconds, self.calls = nn.BatchNorm2d(3), slow, seconds, 0

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.norm(images) + torch.rand(())
        found = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
        for _ in range(100):
            if found == self.slow:
                CALLS.append(1)
                time.sleep(self.seconds)
            x = x + 1
        return {"loss": x.mean()}


CALLS: list[int] = []


@pytest.mark.parametrize(("slow", "chosen"), [(torch.bfloat16, "fp32"), (torch.float32, "bf16")])
def test_the_faster_precision_is_chosen_and_nothing_else_changes(
    slow: torch.dtype, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, images = Slow(slow), torch.rand(2, 3, 4, 4)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    state = torch.get_rng_state()
    CALLS.clear()
    monkeypatch.setattr(automatic, "_has_instructions", lambda: False)
    assert faster_precision(network, images, None) == ("fp32", "the processor has no instructions for bfloat16")
    monkeypatch.setattr(automatic, "_has_instructions", lambda: True)
    found, why = faster_precision(network, images, torch.zeros(2, 4, 4).long())
    assert found == chosen and "s in float32" in why
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and network.norm.weight.grad is None
    if chosen == "fp32":  # 100 would take 2 s: it was ended on the way
        assert 0 < len(CALLS) < 100 and "over" in why


def test_the_precision_chosen_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "build_network", tiny_network)
    monkeypatch.setattr(module, "faster_precision", lambda *_: ("bf16", "as told"))
    config = tiny_config(tmp_path, precision="auto")
    with pytest.raises(Interrupted):
        train(config, lambda i: i == 3 and os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(module, "faster_precision", lambda *_: pytest.fail("measured again"))
    train(config)
    assert yaml.safe_load((config.run_dir / "config.yaml").read_text())["train"]["precision"] == "bf16"
    told = tiny_config(tmp_path, "name=told", precision="bf16")
    train(told)
    kept, wanted = (load_checkpoint(c.run_dir / "last.pt") for c in (config, told))
    assert kept["config"]["train"] == wanted["config"]["train"]
    assert all(torch.equal(value, wanted["model"][key]) for key, value in kept["model"].items())
    with pytest.raises(ConfigError, match=r"train\.precision: bf16 there, fp32 now"):
        train(tiny_config(tmp_path, precision="fp32"))


@pytest.mark.parametrize("has", [True, False])
def test_a_gpu_uses_bf16_if_it_has_it(monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    class Device:
        @staticmethod
        def is_bf16_supported(including_emulation: bool = True) -> bool:
            return has or including_emulation

    monkeypatch.setattr(torch, "get_device_module", lambda: Device)
    assert runtime._has_bf16() is has
    monkeypatch.setattr(torch, "get_device_module", lambda: object())
    assert not runtime._has_bf16()


# ------------------------------------------------------------------------------------------------------- length


class PaceOfOneSecond(automatic.Pace):
    """An iteration takes a second, as is known after three."""

    def step(self) -> float | None:
        self._count += 1
        return 1.0 if self._count == 3 else None


def rates(config: Config) -> dict[int, float]:
    history = load_checkpoint(config.run_dir / "last.pt")["training"]["progress"]["history"]
    return {row["iteration"]: row["lr"] for row in history}


def test_the_length_follows_from_the_speed_and_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "build_network", tiny_network)
    monkeypatch.setattr(module, "Pace", PaceOfOneSecond)
    options: dict[str, Any] = {"iterations": "auto", "auto_minutes": 5.4 / 60, "log_every": 1}
    schedule = ScheduleConfig(warmup_iterations=2)
    config = tiny_config(tmp_path, **options)
    with pytest.raises(Interrupted):  # before the choice: measured again
        train(config, lambda i: i == 2 and os.kill(os.getpid(), signal.SIGTERM))
    assert rates(config) == {t + 1: learning_rate(t, float("inf"), 0.02, schedule) for t in range(2)}
    with pytest.raises(Interrupted):  # after it: kept
        train(config, lambda i: i == 6 and os.kill(os.getpid(), signal.SIGTERM))
    length = load_checkpoint(config.run_dir / "last.pt")["config"]["train"]["iterations"]
    assert length in (9, 10)  # 5 iterations, and 5.4 s less what those took
    monkeypatch.setattr(module, "Pace", lambda *_: None)
    metrics = train(config)
    assert metrics["finished"] and metrics["final"]["iteration"] == length
    assert yaml.safe_load((config.run_dir / "config.yaml").read_text())["train"]["iterations"] == length
    found = rates(config)
    assert [found[t + 1] for t in range(5, length)] == [
        learning_rate(t, length, 0.02, schedule) for t in range(5, length)
    ]


def test_the_pace_is_the_mean_of_fifteen_iterations_after_five(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(automatic, "clock", lambda _: now[0])
    pace, found = automatic.Pace(torch.device("cpu")), []
    for i in range(20):
        now[0] += 100.0 if i < 5 else 0.5
        found.append(pace.step())
    assert found[:19] == [None] * 19 and found[19] == pytest.approx(0.5)


@pytest.mark.bad_input
@pytest.mark.parametrize("value", ["0", "many", "3.5", "true", "[1]"])
def test_a_bad_length_is_one_line(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=r"^train\.iterations on the command line: must be a whole .*, or auto, got"):
        tiny_config(tmp_path, f"train.iterations={value}")
