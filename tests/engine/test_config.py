"""Configuration: reading, overriding, resolving, and what is said about mistakes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from rendseg._options import Options, all_keys
from rendseg.engine.config import (
    Config,
    ConfigError,
    build_config,
    differences,
    load_config,
    read_mapping,
)
from tests.engine.tiny import tiny_content

REPO = Path(__file__).resolve().parents[2]


def write(folder: Path, content: Any) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_reads_overrides_and_round_trips(tmp_path: Path) -> None:
    path = write(tmp_path, tiny_content(tmp_path))
    config = load_config(path, ["train.optimizer.lr=1e-3", "train.clip_grad_norm=null", "eval.limit=2", "name=other"])
    assert config.train.optimizer.lr == 1e-3
    assert config.train.clip_grad_norm is None and config.eval.limit == 2
    assert config.run_dir == tmp_path / "other"
    again = load_config(write(tmp_path, config.to_yaml()))
    assert again == config
    assert differences(config.to_dict(), again.to_dict()) == []


def test_model_and_data_are_resolved(tmp_path: Path) -> None:
    content = tiny_content(tmp_path)
    content["model"]["pointrend"] = {"preset": "mmseg"}
    config = build_config(content)
    assert config.model["pointrend"]["inference_points"] == 8196  # from the preset
    assert config.model["decoder"]["norm"] == "syncbn"
    assert config.data["flip"] == 0.5


UNKNOWN = [
    ("train.iteration=3", "'train.iterations'"),
    ("train.optimizer.learning_rate=3", "lr"),
    ("trian.iterations=3", "'train'"),
    ("train.schedule.warmup=3", "warmup_"),
    ("eval.batchsize=3", "'eval.batch_size'"),
    ("model.backbone.nam=resnet18", "name"),
    ("model.pointrend.trainpoints=8", "train_points"),
    ("data.siz=[32, 32]", "'size'"),
    ("iterations=3", "'train.iterations'"),
]


@pytest.mark.bad_input
@pytest.mark.parametrize(("override", "nearest"), UNKNOWN)
def test_unknown_key_names_the_nearest(tmp_path: Path, override: str, nearest: str) -> None:
    path = write(tmp_path, tiny_content(tmp_path))
    known = {"train", "eval", "model", "data", "optimizer", "schedule", "backbone", "pointrend"}
    key = next(part for part in override.partition("=")[0].split(".") if part not in known)
    with pytest.raises(ConfigError) as error:
        load_config(path, [override])
    assert key in str(error.value) and nearest in str(error.value)
    assert "on the command line" in str(error.value)


@pytest.mark.bad_input
def test_unknown_key_in_the_file_names_the_file(tmp_path: Path) -> None:
    content = tiny_content(tmp_path)
    content["train"]["batch_sise"] = 2
    with pytest.raises(
        ConfigError, match=r"unknown key 'train\.batch_sise' in .*experiment\.yaml; .*'train\.batch_size'"
    ):
        load_config(write(tmp_path, content))


BAD_VALUES = [
    ("train.iterations=0", "train.iterations"),
    ("train.iterations=many", "train.iterations"),
    ("train.precision=fp8", "train.precision"),
    ("train.optimizer.lr=-1", "train.optimizer.lr"),
    ("train.optimizer.lr=.nan", "train.optimizer.lr"),
    ("train.optimizer={momentum: 0, nesterov: true}", "nesterov"),
    ("name=a/b", "name"),
    ("name=..", "name"),
    ("name=.", "name"),
    (f"name={'a' * 300}", "name"),
    (f"seed={10**30}", "seed"),
    (f"train.iterations={10**30}", "train.iterations"),
    (f"train.batch_size={10**30}", "train.batch_size"),
    ("{1: 2}=3", "1: 2"),
    ("model.name=mask2former", "model.name"),
    ("model.backbone.output_stride=x", "output_stride"),
    ("data.name=imagenet", "imagenet"),
    ("train=3", "train"),
    ("model=3", "model"),
    ("data=null", "data"),
]


@pytest.mark.bad_input
@pytest.mark.parametrize(("override", "named"), BAD_VALUES)
def test_bad_value_names_the_key(tmp_path: Path, override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        build_config(tiny_content(tmp_path), [override])


@pytest.mark.bad_input
@pytest.mark.parametrize("override", ["train.iterations", "=3", "train..iterations=3", "name.x=3", "train=[1", "a.=1"])
def test_malformed_override(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError):
        build_config(tiny_content(tmp_path), [override])


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not readable YAML"),
        ("- 1\n- 2\n", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("name: a\nname: b\n", "'name' is given twice"),
        ("name: !!python/object/apply:os.getcwd []\n", "not readable YAML"),
        ("name: a\nmodel: {}\ndata: {}\n", "'train' is missing"),
    ],
)
def test_bad_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "with its aliases it holds more than 100000 values"),
        (LAUGHS.replace("[", "{<<: [").replace("]", "]}").replace("[x", "[{x: 1}"), "more than 100000 values"),
        ("a: &a [1, *a]\n", "a value contains itself"),
        ("a: &a {b: {c: *a}}\n", "a value contains itself"),
        ("a: &a {<<: *a}\n", "a value contains itself"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("? [1, 2]\n: 3\n", "a key must be one word or number, got a list"),
        ("{{a: 1}: 2}\n", "a key must be one word or number, got a dict"),
        ("a: " + "9" * 5000 + "\n", "ValueError: Exceeds the limit"),
        ("a: !!bool maybe\n", "KeyError: 'maybe'"),
        ("a: 2026-99-99\n", "ValueError: month must be in"),
    ],
    ids="laughs merges itself deeper merged nested list dict integer bool date".split(),
)
def test_yaml_that_is_an_attack_or_a_slip(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, text))
    assert message in str(error.value) and "\n" not in str(error.value) and "experiment.yaml" in str(error.value)
    with pytest.raises(ConfigError, match="is not YAML"):
        build_config(tiny_content(tmp_path), [f"train={{{text.strip()}}}" if "{" not in text else f"train={text}"])


def test_aliases_may_be_used_often(tmp_path: Path) -> None:
    path = write(tmp_path, "a: &a [1, 2]\n" + "".join(f"k{i}: *a\n" for i in range(1000)))
    assert len(read_mapping(path)) == 1001


@pytest.mark.bad_input
def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration file .*nowhere.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = tiny_content("${TINY_OUT:-/elsewhere}/x")
    assert build_config(content).output.dir == "/elsewhere/x"
    monkeypatch.setenv("TINY_OUT", "/there")
    assert build_config(content).output.dir == "/there/x"
    with pytest.raises(ConfigError, match="TINY_UNSET"):
        build_config(tiny_content("${TINY_UNSET}/x"))


def test_root_is_relative_to_the_file_then_to_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "here" / "images").mkdir(parents=True)
    content = tiny_content(tmp_path)
    content["data"] = {"name": "camvid", "root": "images"}
    path = write(tmp_path / "configs", content)
    monkeypatch.chdir(tmp_path / "here")
    assert load_config(path).data["root"] == str(tmp_path / "here" / "images")
    (tmp_path / "configs" / "images").mkdir()
    assert load_config(path).data["root"] == str(tmp_path / "configs" / "images")


def test_every_key_has_a_meaning() -> None:
    def check(section: type[Options]) -> None:
        for name, field in section.__pydantic_fields__.items():
            assert field.description, f"{section.__name__}.{name}"
            if isinstance(field.annotation, type) and issubclass(field.annotation, Options):
                check(field.annotation)

    check(Config)
    assert "train.optimizer.lr" in all_keys(Config)


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_the_shipped_configurations_are_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RENDSEG_DATA", os.environ.get("RENDSEG_DATA", str(REPO)))
    config = load_config(path)
    assert config.name == path.stem


def test_anchors_can_be_merged_and_changed(tmp_path: Path) -> None:
    path = tmp_path / "anchors.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n")
    assert read_mapping(path)["b"] == {"x": 1, "y": 3}
    path.write_text("b: {x: 1, x: 2}\n")
    with pytest.raises(ConfigError, match="the key 'x' is given twice"):
        read_mapping(path)
