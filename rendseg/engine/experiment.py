"""``rendseg experiment``: variants of one configuration, trained with one budget and several seeds, as table and plot.

The YAML file holds

* ``name`` and ``output.dir``: everything goes to ``<output.dir>/<name>``, each run to ``<variant>-seed<n>`` in it;
* ``base``: a training configuration without ``name``, ``seed`` and ``output``;
* ``variants``: name -> what it changes in ``base``, nested like it; mappings are merged, anything else replaces;
* ``seeds``: a list; every variant is trained with each;
* ``compare``: pairs ``[variant, other]`` whose differences, seed by seed, the table ends with.

Runs that are finished are not repeated and interrupted ones go on where they were: the same command finishes an
experiment that was stopped. Runs of other settings are refused (``base.resume=never`` replaces them). ``--only
VARIANT`` divides the work between machines.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import Field, field_validator

from rendseg._options import Count, Options
from rendseg.data import DataError
from rendseg.engine.assemble import build_data, load_trained
from rendseg.engine.automatic import with_choice
from rendseg.engine.checkpoint import LAST, CheckpointError, write_atomically, write_json, write_text
from rendseg.engine.config import (
    Config,
    ConfigError,
    FolderName,
    OutputConfig,
    build_config,
    override_mapping,
    read_mapping,
    validated,
)
from rendseg.engine.resume import training_differences

# Column title, and where metrics.json has it.
METRICS = (
    ("mIoU coarse", "coarse", "miou"),
    ("mIoU", "refined", "miou"),
    ("boundary IoU coarse", "coarse", "boundary_iou"),
    ("boundary IoU", "refined", "boundary_iou"),
)


class SpeedConfig(Options):
    """The measurement of ms per image: labels from a normalised image, one at a time, the variants taking turns."""

    repeats: Count = Field(default=20, description="timed predictions of each variant, after three that are not")
    precision: str = Field(default="fp32", pattern="^(fp32|bf16)$", description="arithmetic of the network")


class ExperimentConfig(Options):
    """One experiment."""

    name: FolderName = Field(description="name of the experiment and of its folder")
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1, description="every variant is trained with each")
    base: dict[str, Any] = Field(description="a training configuration without name, seed and output")
    variants: dict[str, dict[str, Any] | None] = Field(min_length=1, description="name -> what it changes in base")
    compare: list[tuple[str, str]] = Field(default=[], description="pairs of variants: the second less the first")
    speed: SpeedConfig = Field(default=SpeedConfig(), description="see SpeedConfig")
    output: OutputConfig = Field(default=OutputConfig(dir="runs/experiments"), description="see OutputConfig")

    @field_validator("base")
    @classmethod
    def _owned(cls, value: dict[str, Any]) -> dict[str, Any]:
        given = [key for key in ("name", "seed", "output") if key in value]
        if given:
            raise ValueError(f"{', '.join(given)} belong to the experiment, not to base")
        return value

    def __post_init__(self) -> None:
        for pair in self.compare:
            for variant in pair:
                if variant not in self.variants:
                    raise ValueError(f"compare names {variant!r}, which is no variant ({', '.join(self.variants)})")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must differ, got {self.seeds}")

    @property
    def folder(self) -> Path:
        return Path(self.output.dir).expanduser() / self.name


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes``: mappings are merged, level by level, anything else replaces."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def load_experiment(
    path: str | Path, overrides: Iterable[str] = ()
) -> tuple[ExperimentConfig, dict[tuple[str, int], Config]]:
    """The experiment and the configuration of every run; ``ConfigError`` says what is wrong and where."""
    content, overridden = override_mapping(read_mapping(path), overrides)
    folder = Path(path).resolve().parent
    experiment = validated(ExperimentConfig, content, str(path), overridden)
    runs = {}
    for variant, changes in experiment.variants.items():
        for seed in experiment.seeds:
            values = merge(experiment.base, changes or {})
            values |= {"name": f"{variant}-seed{seed}", "seed": seed, "output": {"dir": str(experiment.folder)}}
            config = build_config(values, source=f"{path} (variant {variant})", folder=folder)
            if config.learns_objects:
                raise ConfigError(
                    f"{path} (variant {variant}): experiments are of models of label maps; use rendseg train"
                )
            runs[variant, seed] = config
    return experiment, runs


def finished(config: Config) -> dict[str, Any] | None:
    """``metrics.json`` of a run that was trained to its end as ``config`` says, else ``None``."""
    try:
        metrics = json.loads((config.run_dir / "metrics.json").read_text(encoding="utf-8"))
        kept = yaml.safe_load((config.run_dir / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not metrics.get("finished") or "refined" not in metrics.get("final", {}):
        return None
    try:
        return None if training_differences(kept, config, str(config.run_dir / "config.yaml")) else metrics
    except ConfigError:
        return None


def run_experiment(path: str | Path, overrides: Sequence[str] = (), only: Sequence[str] = ()) -> dict[str, Any]:
    """Train what is not trained yet, then write ``results.json``, ``table.md`` and ``plot.png``; return the results."""
    from rendseg.engine.train import train

    experiment, runs = load_experiment(path, overrides)
    for variant in only:
        if variant not in experiment.variants:
            raise ConfigError(f"--only {variant}: no such variant ({', '.join(experiment.variants)})")
    # Seed by seed, so that an experiment that is stopped early still compares all variants.
    for seed in experiment.seeds:
        for variant in experiment.variants:
            config = _alike(runs[variant, seed], runs.values())
            if (not only or variant in only) and finished(config) is None:
                print(f"experiment {experiment.name}: {variant}, seed {seed}", flush=True)
                train(config)
    return report(experiment, runs)


def _alike(config: Config, runs: Iterable[Config]) -> Config:
    """``config`` with the precision that another run chose for ``auto``: variants are compared in one precision."""
    if config.train.precision != "auto":
        return config
    for other in runs:
        if other.train.precision == "auto":
            try:
                kept = yaml.safe_load((other.run_dir / "config.yaml").read_text(encoding="utf-8"))
                return with_choice(config, precision=build_config(kept).train.precision)
            except (OSError, yaml.YAMLError, ConfigError, AttributeError):
                continue
    return config


def report(experiment: ExperimentConfig, runs: Mapping[tuple[str, int], Config]) -> dict[str, Any]:
    """Table, plot and ``results.json`` of the runs that are finished."""
    found = {key: metrics for key, config in runs.items() if (metrics := finished(config)) is not None}
    if not found:
        raise ConfigError(f"no run in {experiment.folder} is finished")
    missing = [f"{variant}-seed{seed}" for variant, seed in runs if (variant, seed) not in found]
    speed = measure_speed(experiment, {variant: runs[variant, seed] for variant, seed in found})
    variants: dict[str, Any] = {}
    for variant in experiment.variants:
        mine = {seed: found[variant, seed] for seed in experiment.seeds if (variant, seed) in found}
        if not mine:
            continue
        some = next(iter(mine.values()))
        variants[variant] = {
            "seeds": list(mine),
            **{
                f"{kind}_{name}": [metrics["final"][kind][name] for metrics in mine.values()]
                for _, kind, name in METRICS
            },
            "ms_per_image": speed[variant],
            "training_seconds": [metrics["final"]["seconds"] for metrics in mine.values()],
            "parameters": some["environment"]["parameters"],
            "iterations": some["final"]["iteration"],
        }
    pairs = [
        {"from": one, "to": other, **_differences(variants[one], variants[other])}
        for one, other in experiment.compare
        if one in variants and other in variants
    ]
    results = {"name": experiment.name, "variants": variants, "compare": pairs, "missing": missing}
    write_json(experiment.folder / "results.json", results)
    text = format_results(results)
    write_text(experiment.folder / "table.md", text)
    write_atomically(experiment.folder / "plot.png", lambda file: _plot(results, file))
    print(text)
    print(f"written to {experiment.folder}/results.json, table.md, plot.png")
    return results


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Of each metric and common seed."""
    seeds = [seed for seed in one["seeds"] if seed in other["seeds"]]
    result: dict[str, Any] = {"seeds": seeds}
    for _, kind, name in METRICS:
        key = f"{kind}_{name}"
        result[key] = [other[key][other["seeds"].index(s)] - one[key][one["seeds"].index(s)] for s in seeds]
    return result


@torch.no_grad()
def measure_speed(experiment: ExperimentConfig, configs: Mapping[str, Config]) -> dict[str, float]:
    """Median ms of ``predict(image, output="labels")`` for each variant, on the device of its configuration."""
    networks: dict[str, Any] = {}
    images: dict[str, torch.Tensor] = {}
    for variant, config in configs.items():
        path = config.run_dir / LAST
        try:
            _, _, network, _ = load_trained(path)
        except (CheckpointError, ConfigError) as error:
            raise ConfigError(f"the speed of {variant} cannot be measured: {error}") from error
        on_cpu = config.device == "cpu" or not torch.accelerator.is_available()
        device = torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator()
        data = build_data(config, "val")
        if len(data) == 0:
            raise DataError("the validation split holds no images")
        networks[variant] = network.to(device)
        images[variant] = data[0]["image"][None].to(device)
    times: dict[str, list[float]] = {variant: [] for variant in networks}
    narrow = experiment.speed.precision == "bf16"
    for turn in range(3 + experiment.speed.repeats):
        for variant, network in networks.items():
            image = images[variant]
            with torch.autocast(image.device.type, torch.bfloat16, enabled=narrow):
                start = time.perf_counter()
                network.predict(image, output="labels")
                if image.device.type != "cpu":
                    torch.accelerator.synchronize()
            if turn >= 3:
                times[variant].append(1000 * (time.perf_counter() - start))
    return {variant: statistics.median(values) for variant, values in times.items()}


def _spread(values: Sequence[float | None], factor: float = 100.0, digits: int = 2, sign: bool = False) -> str:
    """``mean +- standard deviation`` over the seeds."""
    numbers = [factor * value for value in values if value is not None]
    if not numbers:
        return "-"
    mean = f"{statistics.fmean(numbers):{'+' if sign else ''}.{digits}f}"
    return f"{mean} ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else mean


def format_results(results: Mapping[str, Any]) -> str:
    """Markdown: one row per variant, then the differences of the compared pairs."""
    titles = [title for title, _, _ in METRICS]
    head = ["variant", *titles, "ms per image", "training s", "parameters (M)", "seeds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, row in results["variants"].items():
        cells = [name, *(_spread(row[f"{kind}_{metric}"]) for _, kind, metric in METRICS)]
        cells += [f"{row['ms_per_image']:.1f}", _spread(row["training_seconds"], 1, 0)]
        cells += [f"{row['parameters'] / 1e6:.2f}", str(len(row["seeds"]))]
        lines.append("| " + " | ".join(cells) + " |")
    if results["compare"]:
        lines += ["", "| difference, seed by seed | " + " | ".join(titles) + " |", "|" + "---|" * (len(titles) + 1)]
        for pair in results["compare"]:
            cells = [_spread(pair[f"{kind}_{metric}"], sign=True) for _, kind, metric in METRICS]
            lines.append(f"| {pair['to']} less {pair['from']} | " + " | ".join(cells) + " |")
    if results["missing"]:
        lines += ["", f"Not finished: {', '.join(results['missing'])}."]
    return "\n".join(lines) + "\n"


def _plot(results: Mapping[str, Any], file: Any) -> None:
    """Boundary IoU and mIoU against ms per image: one colour per variant, a dot per seed, hollow for the coarse
    prediction."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, metric, title in zip(
        figure.subplots(1, 2), ("miou", "boundary_iou"), ("mIoU", "boundary IoU"), strict=True
    ):
        for i, (name, row) in enumerate(results["variants"].items()):
            x = row["ms_per_image"]
            for kind, fill in (("coarse", "none"), ("refined", f"C{i}")):
                values = [math.nan if v is None else 100 * v for v in row[f"{kind}_{metric}"]]
                label = name if kind == "refined" else None
                axes.scatter([x] * len(values), values, facecolors=fill, edgecolors=f"C{i}", label=label)
        axes.set(xlabel="ms per image", ylabel=f"{title}, %", title=f"{title} (hollow: coarse)")
        axes.set_xlim(0, 1.15 * max(row["ms_per_image"] for row in results["variants"].values()))
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(file, format="png", dpi=120)
