"""Experiments: what is trained, what is repeated, and the arithmetic of the table."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

from rendseg.engine import experiment as module
from rendseg.engine.config import ConfigError
from rendseg.engine.experiment import format_results, load_experiment, merge, run_experiment
from tests.engine.tiny import tiny_content

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    base = tiny_content(tmp_path, iterations=2)
    del base["name"], base["output"]
    content = {
        "name": "small",
        "seeds": [3, 5],
        "base": base,
        "variants": {"plain": {"model": {"name": "segmenter"}}, "refined": None},
        "compare": [["plain", "refined"]],
        "speed": {"repeats": 1},
        "output": {"dir": str(tmp_path / "out")},
    }
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def changed(path: Path, change: Any) -> Path:
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content))
    return path


def test_variants_change_the_base_and_nothing_else(file: Path) -> None:
    _, runs = load_experiment(file)
    assert list(runs) == [("plain", 3), ("plain", 5), ("refined", 3), ("refined", 5)]
    plain, refined = runs["plain", 3].to_dict(), runs["refined", 3].to_dict()
    assert plain["model"].pop("name") == "segmenter" and refined["model"].pop("name") == "pointrend"
    assert (plain.pop("name"), refined.pop("name")) == ("plain-seed3", "refined-seed3")
    assert plain == refined and plain["seed"] == 3 and runs["plain", 5].seed == 5


def test_merging() -> None:
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 3}
    assert merge(base, {"a": {"c": [4]}, "d": {"e": 5}}) == {"a": {"b": 1, "c": [4]}, "d": {"e": 5}}
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": 3}


def test_a_run_is_made_once_and_the_table_is_right(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rendseg.engine import train as training

    trained: list[str] = []
    real = training.train
    monkeypatch.setattr(training, "train", lambda config: (trained.append(config.name), real(config))[1])
    run_experiment(file, only=["plain"])
    assert trained == ["plain-seed3", "plain-seed5"]
    assert "Not finished: refined-seed3, refined-seed5." in capsys.readouterr().out
    run_experiment(file)
    assert trained[2:] == ["refined-seed3", "refined-seed5"]
    results = run_experiment(file)
    assert len(trained) == 4
    folder = file.parent / "out" / "small"
    finals = {
        name: json.loads((folder / name / "metrics.json").read_text())["final"]
        for name in ("plain-seed3", "plain-seed5", "refined-seed3", "refined-seed5")
    }
    for kind in ("coarse", "refined"):
        for metric in ("miou", "boundary_iou"):
            a, b = (
                [finals[f"{variant}-seed{seed}"][kind][metric] for seed in (3, 5)] for variant in ("plain", "refined")
            )
            assert results["compare"][0][f"{kind}_{metric}"] == [y - x for x, y in zip(a, b, strict=True)]
    values = [100 * finals[f"refined-seed{seed}"]["refined"]["miou"] for seed in (3, 5)]
    cell = f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"
    row = next(line for line in (folder / "table.md").read_text().splitlines() if line.startswith("| refined |"))
    assert row.split(" | ")[2] == cell
    assert (folder / "plot.png").read_bytes()[:4] == b"\x89PNG"
    # What does not change the training makes no new run; another budget does, and replaces nothing unasked.
    run_experiment(file, ["base.train.log_every=1"])
    assert len(trained) == 4
    for path in folder.glob("*/config.yaml"):  # of before a key existed
        changed(path, lambda c: c["train"].pop("fsdp"))
    run_experiment(file)
    assert len(trained) == 4
    with pytest.raises(ConfigError, match="trained with another configuration.*train.iterations: 2 there, 3 now"):
        run_experiment(file, ["base.train.iterations=3"], only=["plain"])
    run_experiment(file, ["base.train.iterations=3", "seeds=[3]", "base.resume=never"], only=["plain"])
    assert trained[5:] == ["plain-seed3"]


def test_absent_classes_and_single_seeds() -> None:
    row = {"seeds": [0], "ms_per_image": 2.0, "training_seconds": [9.6], "parameters": 1_234_000, "iterations": 1}
    row |= {
        "coarse_miou": [0.5],
        "refined_miou": [None],
        "coarse_boundary_iou": [0.25],
        "refined_boundary_iou": [0.125],
    }
    text = format_results({"variants": {"one": row}, "compare": [], "missing": []})
    assert "| one | 50.00 | - | 25.00 | 12.50 | 2.0 | 10 | 1.23 | 1 |" in text


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(variant={}), "unknown key 'variant' in .*; did you mean 'variants'"),
        (lambda c: c.pop("base"), "the key 'base' is missing"),
        (
            lambda c: c.update(compare=[["plain", "refind"]]),
            r"compare names 'refind', which is no variant \(plain, refined\)",
        ),
        (lambda c: c.update(seeds=[1, 1]), "seeds must differ"),
        (lambda c: c["base"].update(seed=1), "seed belong to the experiment"),
        (lambda c: c["variants"].update(plain={"model": {"nam": "x"}}), r"unknown key model.nam.*variant plain"),
        (lambda c: c.update(speed={"precision": "fp8"}), "speed.precision"),
    ],
)
def test_bad_experiments(file: Path, change: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_experiment(changed(file, change))


@pytest.mark.bad_input
def test_unknown_variant_and_nothing_finished(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"--only plan: no such variant \(plain, refined\)"):
        run_experiment(file, only=["plan"])
    experiment, runs = load_experiment(file)
    with pytest.raises(ConfigError, match="no run in .* is finished"):
        module.report(experiment, runs)


def test_variants_share_the_precision_that_the_first_run_chose(file: Path) -> None:
    _, runs = load_experiment(file, ["base.train.precision=auto"])
    assert module._alike(runs["plain", 5], runs.values()).train.precision == "auto"
    first = runs["plain", 3]
    chosen = dataclasses.replace(first, train=dataclasses.replace(first.train, precision="bf16"))
    first.run_dir.mkdir(parents=True)
    (first.run_dir / "config.yaml").write_text(chosen.to_yaml())
    assert module._alike(runs["refined", 5], runs.values()).train.precision == "bf16"
