"""Two gloo processes: the same training and evaluation as one, whole or sharded, continued exactly after a kill; and
every decoder continued exactly in one."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

from rendseg.engine import runtime as module
from rendseg.engine.assemble import load_trained
from rendseg.engine.checkpoint import load_checkpoint
from rendseg.engine.config import ConfigError, build_config
from rendseg.engine.train import train
from rendseg.models import decoder_names
from rendseg.models.losses import loss_term
from rendseg.models.options import DiceTerm, FocalTerm, LossTerm, LovaszTerm, OhemTerm
from tests.engine import processes
from tests.engine.processes import launch, run, run_all, succeed
from tests.engine.tiny import narrow, tiny_content
from tests.limits import TIMEOUT


def content(out: Path, name: str, *, exact: bool = False, **train_options: Any) -> dict[str, Any]:
    """PointRend with an auxiliary head on scenes with ignored margins; ``exact``: without batch norm and dropout."""
    plain = tiny_content(out, **{"iterations": 4, "log_every": 1, "checkpoint_every": 2, **train_options})
    plain["name"] = name
    plain["data"] |= {"scale_range": [0.5, 1.2]}
    plain["model"]["auxiliary"] = [{"level": "c4", "channels": 8, "dropout": 0.0 if exact else 0.1}]
    if exact:
        plain["data"]["size"] = [64, 64]  # group norm needs more than one value of a channel
        plain["model"]["backbone"]["freeze_norm"] = True
        plain["model"]["decoder"]["norm"] = "gn"
        plain["model"]["auxiliary"][0]["norm"] = "gn"
        plain["model"]["loss"] = {
            "terms": ["cross_entropy", {"name": "ohem", "min_kept": 300}, {"name": "dice", "weight": 0.5}],
            "normalize": "global",
            "class_weights": [0.5, 1, 1, 2, 1, 1, 1, 1],
        }
    plain["eval"]["pictures"] = 0
    return plain


def last(out: Path, name: str) -> dict[str, Any]:
    return load_checkpoint(out / name / "last.pt")


def history(saved: dict[str, Any]) -> list[dict[str, float]]:
    rows = saved["training"]["progress"]["history"]
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


def assert_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Two checkpoints of the same training, bit for bit."""
    assert history(a) == history(b)
    assert a["training"]["progress"]["iteration"] == b["training"]["progress"]["iteration"]
    assert list(a["model"]) == list(b["model"])
    for key, value in a["model"].items():
        assert torch.equal(value, b["model"][key]), key
    one, other = (c["training"]["optimizer"]["state"] for c in (a, b))
    assert one.keys() == other.keys()
    for index, state in one.items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[index][key])), (index, key)
    for kind in ("coarse", "refined"):
        ends = [c["training"]["progress"]["evaluations"][-1:] for c in (a, b)]
        assert [e[kind] for e in ends[0]] == [e[kind] for e in ends[1]]


def assert_close(a: dict[str, Any], b: dict[str, Any], rel: float = 1e-5) -> None:
    """The same training but for the order of sums."""
    for one, other in zip(history(a), history(b), strict=True):
        assert one == pytest.approx(other, rel=rel)
    for key, value in a["model"].items():
        torch.testing.assert_close(b["model"][key], value, rtol=1e-3, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


SHARDED = {"enabled": True, "min_parameters": 1000}
PARTS: dict[str, Any] = {"iterations": 2, "batch_size": 1, "gradient_accumulation": 2, "clip_grad_norm": 0.1}
KILLED: dict[str, Any] = {"iterations": 5, "batch_size": 2, "checkpoint_every": 3}
INEXACT: dict[str, dict[str, Any]] = {
    "ddp": KILLED,
    "fsdp": {**KILLED, "fsdp": SHARDED, "optimizer": {"name": "adamw", "lr": 1e-3}},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of trainings without batch norm in one process (``one``, batches of 4) and in two (``two`` and, where
    parameters are sharded, ``sharded``); of such whose batches come in parts; and of such with batch norm and
    dropout."""
    out = tmp_path_factory.mktemp("runs")
    half = {"precision": "bf16", "fsdp": {**SHARDED, "gather_dtype": "bf16"}}
    printed = succeed(
        run_all,
        [
            content(out, "two", exact=True, batch_size=2),
            content(out, "sharded", exact=True, batch_size=2, fsdp=SHARDED),
            content(out, "parts", exact=True, **PARTS),
            content(out, "sharded_parts", exact=True, **PARTS, fsdp=SHARDED),
            content(out, "half", exact=True, **PARTS, **half),
            *(content(out, f"whole_{name}", **options) for name, options in INEXACT.items()),
        ],
        world=2,
    )
    (out / "printed.json").write_text(json.dumps(printed))
    train(build_config(content(out, "one", exact=True)))
    return out


def test_two_processes_make_the_steps_of_one(runs: Path) -> None:
    """Every term of the loss, and the weights: with points drawn by image and means over the labels of both."""
    one, two = last(runs, "one"), last(runs, "two")
    assert {"loss_coarse_ohem", "loss_coarse_dice", "loss_point", "loss_aux_c4"} <= set(history(one)[0])
    assert_close(one, two)
    assert history(one)[-1]["loss"] != history(one)[0]["loss"] and len(two["training"]["rng"]) == 2


def test_one_set_of_files_and_one_voice(runs: Path) -> None:
    names = [{p.name for p in (runs / name).iterdir()} for name in ("one", "two")]
    assert names[0] == names[1]
    printed = json.loads((runs / "printed.json").read_text())
    assert "boundary IoU" in printed[0] and printed[0].count("written to") == 7 and printed[1] == ""


def test_evaluation_does_not_depend_on_the_number_of_processes(runs: Path, tmp_path: Path) -> None:
    checkpoint = str(runs / "two" / "last.pt")
    results = []
    for world in (1, 2):
        printed = succeed(processes.evaluate, checkpoint, str(tmp_path / str(world)), world=world)
        assert printed[1:] == [""] * (world - 1)
        found = json.loads((tmp_path / str(world) / "metrics.json").read_text())
        assert found["environment"]["processes"] == world
        of_the_run = ("seconds", "ms_per_image", "environment")
        results.append({key: value for key, value in found.items() if key not in of_the_run})
    assert results[0] == results[1] and results[0]["images"] == 3
    evaluated = last(runs, "two")["training"]["progress"]["evaluations"][-1]
    assert results[0]["refined"] == evaluated["refined"]  # and it is what the training saw


def test_two_killed_processes_continue_exactly(tmp_path: Path, runs: Path) -> None:
    """With batch norm, whose statistics differ between processes, dropout, and the state of both optimizers."""
    plain = {name: content(tmp_path, name, **options) for name, options in INEXACT.items()}
    for name in plain:
        found = launch(run, plain[name], 4, world=2)
        assert [code for code, *_ in found] == [-signal.SIGKILL] * 2, found
        assert last(tmp_path, name)["training"]["progress"]["iteration"] == 3
    printed = succeed(run_all, list(plain.values()), world=2)
    assert printed[0].count("continuing") == 2 and printed[1] == ""
    for name in plain:
        assert_equal(last(runs, f"whole_{name}"), last(tmp_path, name))


TERMS = [
    LossTerm(),
    OhemTerm(min_kept=15, threshold=0.05),
    DiceTerm(),
    DiceTerm(per_image=True, classes="present"),
    LovaszTerm(per_image=True),
    FocalTerm(),
]


def halves(folder: str) -> None:
    """Every loss and the averaged gradient, of this process's half of a batch, written by the first process."""
    logits, labels = (value.chunk(2)[dist.get_rank()] for value in whole_batch())
    results = []
    for term in TERMS:
        for normalize in ("process", "global"):
            leaf = logits.clone().requires_grad_()
            loss = loss_term(term, leaf, labels, class_weights=torch.tensor([1.0, 2.0, 0.5]), normalize=normalize)
            loss.backward()
            parts: list[Any] = [None, None]
            dist.all_gather_object(parts, (loss.item(), leaf.grad))
            # each process has the gradient of its own images; averaging over processes divides it by their number
            results.append((sum(p[0] for p in parts) / 2, torch.cat([p[1] for p in parts]) / 2))
    if dist.get_rank() == 0:
        torch.save(results, Path(folder) / "results.pt")


def whole_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 3, (4, 5, 6), generator=generator)
    labels[2:, 1:] = 255  # the second process has few labels
    labels[3] = 255
    return 2 * torch.randn(4, 3, 5, 6, generator=generator, dtype=torch.float64), labels


def test_losses_over_all_processes_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    succeed(halves, str(tmp_path), world=2)
    found = iter(torch.load(tmp_path / "results.pt"))
    for term in TERMS:
        logits, labels = whole_batch()
        logits.requires_grad_()
        wanted = loss_term(term, logits, labels, class_weights=torch.tensor([1.0, 2.0, 0.5]))
        wanted.backward()
        (own, _), (loss, gradient) = next(found), next(found)
        assert loss == pytest.approx(wanted.item(), rel=1e-9), term
        torch.testing.assert_close(gradient, logits.grad, rtol=1e-9, atol=1e-12)
        per_image = getattr(term, "per_image", False)
        assert (own == pytest.approx(wanted.item(), rel=1e-9)) is per_image, term


# ----------------------------------------------------------------------------------------------------------- FSDP


def test_sharded_training_is_that_of_ddp(runs: Path) -> None:
    assert_close(last(runs, "two"), last(runs, "sharded"))
    assert_close(last(runs, "one"), last(runs, "sharded"))
    states = [last(runs, name)["training"]["optimizer"]["state"] for name in ("two", "sharded")]
    for index, state in states[0].items():
        torch.testing.assert_close(states[1][index]["momentum_buffer"], state["momentum_buffer"], rtol=1e-2, atol=1e-4)


def test_a_sharded_checkpoint_is_an_ordinary_one(runs: Path) -> None:
    """One process loads it, predicts as the sharded run evaluated, and continues it."""
    path = runs / "sharded" / "last.pt"
    config, _, network, contents = load_trained(path)
    assert all(type(value) is torch.Tensor for value in contents["model"].values())
    assert network.predict(torch.rand(1, 3, 64, 64), "labels").labels.shape == (1, 64, 64)
    from rendseg.engine.evaluate import evaluate_checkpoint

    found = evaluate_checkpoint(path, (), runs / "evaluated")
    assert found["refined"] == contents["training"]["progress"]["evaluations"][-1]["refined"]
    seen: list[int] = []
    plain = content(runs, "continued", exact=True, iterations=5)
    train(build_config({**plain, "resume": str(path)}), seen.append)
    assert seen == [5]


def test_sharded_accumulation_clipping_and_bf16(runs: Path) -> None:
    """Parts of a step add up; the norm of sharded gradients is that of whole ones; half gathering stays near."""
    assert_close(last(runs, "parts"), last(runs, "sharded_parts"))
    half = last(runs, "half")
    assert all(v.dtype != torch.bfloat16 for v in half["model"].values())
    assert history(half)[0]["loss"] == pytest.approx(history(last(runs, "parts"))[0]["loss"], rel=0.05)


def test_the_groups_of_a_network() -> None:
    from rendseg.engine.sharding import groups
    from rendseg.models import build_model

    net = build_model({"backbone": {"name": "resnet18"}, "decoder": {"channels": 16, "head_channels": 16}}, 4)
    names = {module: name for name, module in net.named_modules()}
    blocks = [f"backbone.net.layer{i}.{j}" for i in range(1, 5) for j in range(2)]
    assert [names[module] for module in groups(net, 1000)] == ["backbone.net.conv1", *blocks, "decoder"]
    assert [names[module] for module in groups(net, 2_000_000)] == ["backbone.net.layer4.0", "backbone.net.layer4.1"]


def test_one_process_has_nothing_to_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(build_config(content(tmp_path, "alone", iterations=1, fsdp={"enabled": True})))
    assert "one process has nothing to shard over" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ every decoder continues


@pytest.mark.parametrize("decoder", decoder_names())
def test_every_decoder_continues_exactly_after_kill_9(tmp_path: Path, decoder: str) -> None:
    def plain(name: str) -> dict[str, Any]:
        made = content(tmp_path, name, iterations=4, batch_size=2)
        made["model"]["decoder"] = narrow(decoder)
        made["data"]["num_val_images"] = 1
        return made

    train(build_config(plain("whole")))
    kill_at = random.Random(decoder).randint(2, 3)
    found = launch(run, plain("killed"), kill_at)
    assert found[0][0] == -signal.SIGKILL, found[0][2]
    assert last(tmp_path, "killed")["training"]["progress"]["iteration"] == 2
    train(build_config(plain("killed")))
    assert_equal(last(tmp_path, "whole"), last(tmp_path, "killed"))


# ------------------------------------------------------------------------------------------------------ the launchers


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
        # accelerate starts several processes for GPUs only; that the device is the CPU is ours to say
        "accelerate.commands.launch --multi_gpu --num_processes=2 --num_machines=1 --mixed_precision=no".split(),
    ],
    ids=["torchrun", "accelerate launch"],
)
def test_the_command_under_a_launcher(tmp_path: Path, runs: Path, launcher: list[str]) -> None:
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(content(tmp_path, "two", exact=True, batch_size=2)))
    command = [sys.executable, "-m", *launcher, "-m", "rendseg", "train", str(tmp_path / "two.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(processes.REPO), "MASTER_PORT": "29577"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIMEOUT)
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.count("written to") == 1
    assert_close(last(runs, "two"), last(tmp_path, "two"))


# ---------------------------------------------------------------------------------------------------------- bad input


def elsewhere(plain: dict[str, Any]) -> None:
    plain["output"]["dir"] += os.environ["RANK"]
    run(plain)


@pytest.mark.bad_input
def test_machines_that_do_not_share_a_folder(tmp_path: Path, runs: Path) -> None:
    """The first process finds a checkpoint, the second does not."""
    (tmp_path / "out0").mkdir()
    (tmp_path / "out0" / "two").symlink_to(runs / "two")
    found = launch(elsewhere, content(tmp_path / "out", "two", exact=True, batch_size=2), world=2)
    assert all(code == 1 and "process 0 finds a checkpoint of iteration 4 in" in err for code, _, err in found), found
    assert all("process 1 no checkpoint; output.dir must lie on a file system" in err for *_, err in found)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"fsdp": {"enabled": True}, "precision": "fp16"}, "fsdp does not scale losses .* use bf16 or fp32"),
        ({"fsdp": {"gather_dtype": "bf16"}}, "fsdp.gather_dtype: bf16 needs precision: bf16, not fp32"),
        ({"fsdp": {"enable": True}}, "unknown key 'train.fsdp.enable'.*did you mean 'train.fsdp.enabled'"),
    ],
)
def test_bad_sharding(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        build_config(tiny_content(tmp_path, **options))


@pytest.mark.bad_input
def test_every_process_names_the_terms_of_the_one_whose_loss_is_bad(tmp_path: Path) -> None:
    plain = tiny_content(tmp_path, batch_size=2)
    for printed in succeed(processes.run_until_a_bad_loss, plain, 1, 3, world=2):
        assert re.search(
            r"ended: the loss is not finite at iteration 3 \(loss_coarse \d\S+, loss_point nan\);", printed
        )


@pytest.mark.bad_input
def test_a_scalar_parameter_cannot_be_sharded() -> None:
    from rendseg.engine.config import FSDPConfig
    from rendseg.engine.sharding import shard

    network = torch.nn.Linear(2, 2)
    network.scale = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(ConfigError, match="cannot shard the scalar parameter scale; set train.fsdp.enabled=false"):
        shard(network, FSDPConfig(enabled=True), torch.device("cpu"))


@pytest.mark.bad_input
def test_another_framework_of_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.utils import DistributedType

    configured = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    monkeypatch.setattr(module, "Accelerator", lambda **_: configured)
    with pytest.raises(ConfigError, match="accelerate is configured for DEEPSPEED.*set train.fsdp.enabled=true"):
        train(build_config(content(tmp_path, "x")))
