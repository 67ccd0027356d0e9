"""The YAML configuration as types: every key with its meaning, unknown keys refused with the nearest known one.

``load_config(path, ["train.optimizer.lr=0.02"])`` reads a file, applies dotted overrides (the part after ``=`` is
YAML), expands ``${NAME}`` and ``${NAME:-default}`` from the environment in every string and a ``~`` at its start, and
resolves a relative ``data.root`` against the folder of the file, then against the current folder.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator
from pydantic_core import ArgsKwargs

from rendseg._options import Count, Flag, NonNegative, O, Options, Positive, Whole, problems
from rendseg.engine.eval_presets import PRESETS

# A name of one folder: not the dots that lead out of it.
FolderName = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^\.*[\w\-][\w.\-]*$")]


class ConfigError(Exception):
    """The configuration cannot be used; the message names the file or the option, the key, and what is wanted."""


class OptimizerConfig(Options):
    """The optimizer and its parameter groups."""

    name: Literal["sgd", "adamw"] = Field(
        default="sgd", description="sgd: stochastic gradient descent with momentum; adamw: Adam with decoupled decay"
    )
    lr: Positive = Field(default=0.01, description="base learning rate, the schedule's highest value")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum of sgd")
    nesterov: Flag = Field(default=False, description="Nesterov momentum (sgd)")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), description="decay of the mean gradient and of its square (adamw)"
    )
    eps: Positive = Field(default=1e-8, description="added to the root of the mean square (adamw)")
    weight_decay: NonNegative = Field(default=1e-4, description="L2 penalty of sgd; decoupled decay of adamw")
    head_lr_factor: Positive = Field(
        default=1.0, description="learning rate of everything outside the backbone, as a factor"
    )
    no_decay_on_norm: Flag = Field(
        default=False,
        description="no weight decay on biases, on parameters of norms, and on what a timm network exempts "
        "(position embeddings and the like)",
    )

    def __post_init__(self) -> None:
        if self.nesterov and self.name != "sgd":
            raise ValueError(f"nesterov: true is for sgd, not {self.name}")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov: true needs momentum > 0")


class ScheduleConfig(Options):
    """Learning rate over iterations; the formula is ``rendseg.engine.optimize.learning_rate``."""

    name: Literal["poly", "step", "cosine", "constant"] = Field(
        default="poly",
        description="poly: (1 - t/T)^power; step: times gamma at each of milestones; cosine: half a wave from lr to "
        "min_lr; constant: lr throughout",
    )
    power: Positive = Field(default=0.9, description="exponent of poly")
    milestones: tuple[Count, ...] = Field(
        default=(), description="iterations at which step multiplies the learning rate by gamma, ascending"
    )
    gamma: float = Field(default=0.1, gt=0, le=1, description="factor of step")
    min_lr: NonNegative = Field(default=0.0, description="learning rate at the end of poly and cosine")
    warmup_iterations: Whole = Field(default=0, description="iterations of linear warm-up; 0: none")
    warmup_factor: float = Field(
        default=0.1, ge=0, le=1, description="the warm-up begins at this share of the schedule"
    )

    def __post_init__(self) -> None:
        if self.name == "step" and not self.milestones:
            raise ValueError("the schedule step needs milestones, such as [40000, 55000]")
        if self.name != "step" and self.milestones:
            raise ValueError(f"milestones are for the schedule step, not {self.name}")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones must ascend, got {list(self.milestones)}")


class FSDPConfig(Options):
    """Fully sharded data parallelism over all processes; see ``rendseg.engine.sharding``."""

    enabled: Flag = Field(
        default=False,
        description="split parameters, gradients and optimizer state over the processes (of which there must be "
        "several), rather than copy them (DDP)",
    )
    reshard_after_forward: Flag = Field(
        default=True,
        description="free the gathered parameters after the forward pass and gather them again for the backward pass",
    )
    min_parameters: Whole = Field(
        default=100_000, description="a block with fewer parameters is gathered together with others"
    )
    gather_dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description="what parameters are gathered and used in; bf16 (with train.precision=bf16) is half"
    )


def _length(value: Any) -> Any:
    if (isinstance(value, float) and value.is_integer()) or (isinstance(value, str) and value.isdecimal()):
        value = int(value)
    if value != "auto" and not _is_side(value):
        raise ValueError("must be a whole number of at least 1, or auto")
    return value


class TrainConfig(Options):
    """The training loop."""

    iterations: Annotated[int | Literal["auto"], BeforeValidator(_length)] = Field(
        description="optimizer steps of the whole run; auto: as many as fit auto_minutes at the speed of the first 20"
    )
    auto_minutes: Positive = Field(
        default=2.0, description="time that training takes, about, with iterations: auto; evaluation comes on top"
    )
    batch_size: Count = Field(default=4, description="images per process and forward pass")
    gradient_accumulation: Count = Field(default=1, description="forward passes per optimizer step")
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(), description="see OptimizerConfig")
    schedule: ScheduleConfig = Field(default=ScheduleConfig(), description="see ScheduleConfig")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto",
        description="arithmetic of the forward pass; bf16 and fp16 by autocast, fp16 (GPU) with loss scaling; auto: "
        "bf16 on a GPU that has it; on a CPU the faster of fp32 and bf16, measured before training",
    )
    fsdp: FSDPConfig = Field(default=FSDPConfig(), description="see FSDPConfig")
    clip_grad_norm: Positive | None = Field(
        default=None, description="largest norm of all gradients together; null: no limit"
    )
    num_workers: Whole = Field(default=2, description="processes that prepare images; 0: in the training process")
    log_every: Count = Field(default=20, description="iterations between rows of metrics.json and TensorBoard scalars")
    eval_every: Whole = Field(default=0, description="iterations between evaluations; 0: only after the last")
    checkpoint_every: Count = Field(default=500, description="iterations between checkpoints")
    keep_checkpoints: Whole = Field(
        default=1, description="numbered checkpoints (iteration_*.pt) kept besides last.pt and best.pt"
    )
    time_limit_minutes: Positive | None = Field(
        default=None,
        description="stop after this much training time, all resumptions together, save and evaluate; null: none",
    )
    tensorboard: Flag = Field(
        default=True, description="write TensorBoard scalars and images to <run folder>/tensorboard"
    )

    def __post_init__(self) -> None:
        if self.fsdp.enabled and self.precision == "fp16":
            raise ValueError("fsdp does not scale losses as precision: fp16 needs; use bf16 or fp32")
        if self.fsdp.gather_dtype == "bf16" and self.precision != "bf16":
            raise ValueError(f"fsdp.gather_dtype: bf16 needs precision: bf16, not {self.precision}")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _side_pair(value: Any) -> list[int]:
    """``[height, width]``; one number stands for both."""
    pair = [value, value] if isinstance(value, int) else value
    if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(_is_side(side) for side in pair):
        raise ValueError("must be [height, width] or one number, whole and at least 1")
    return list(pair)


def _base_size(value: Any) -> int | list[int]:
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(_is_side(side) for side in value):
        return list(value)
    if not _is_side(value):
        raise ValueError("must be one number or [long, short], whole and at least 1")
    return value


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 2**53


class EvalConfig(Options):
    """Evaluation on the validation split, after training and by `rendseg eval`; windows, scales and flip also hold for
    `rendseg predict`."""

    preset: Literal["rendseg", "mmseg", "paddleseg", "detectron2", "pytorch_encoding"] = Field(
        default="rendseg",
        description="the conventions of a framework: what is not given of merge, absent, align_corners, image_resize, "
        "rounding, chain_scales, window_border, flip (see rendseg.engine.eval_presets)",
    )
    batch_size: Count = Field(default=1, description="images of one size that are predicted together")
    num_workers: Whole = Field(default=2, description="processes that read images")
    limit: Count | None = Field(default=None, description="number of images to evaluate, the first ones; null: all")
    scales: Annotated[list[Positive], BeforeValidator(_as_list)] = Field(
        default=[1.0], min_length=1, description="sizes at which each image is predicted, relative to its own"
    )
    flip: Flag = Field(default=False, description="predict the mirror image too")
    flip_vertical: Flag = Field(default=False, description="predict the image upside down too (and, with flip, both)")
    window: Annotated[list[int], BeforeValidator(_side_pair)] | None = Field(
        default=None, description="[height, width] of a sliding window, or one number for both; null: the whole image"
    )
    window_stride: Annotated[list[int], BeforeValidator(_side_pair)] | None = Field(
        default=None, description="[height, width] from window to window; null: two thirds of the window"
    )
    window_border: Literal["shift", "pad"] = Field(
        default="shift",
        description="shift: the last window is moved back into the image, a small image is taken as it is; pad: what "
        "sticks out, and a small image, is filled with black at the right and the bottom",
    )
    merge: Literal["softmax", "logits", "exp"] = Field(
        default="softmax",
        description="how scales and flips are added up: probabilities, logits, or exp of the logits (added over "
        "flips, in each window); windows are averaged before, as logits (exp: as exp)",
    )
    rounding: Literal["half_up", "mmcv", "long_side", "short_side"] = Field(
        default="half_up",
        description="size of a scaled image: half_up: each side rounded; mmcv: the largest of the same shape within "
        "that; long_side, short_side: this side is scaled, the other follows",
    )
    base_size: Annotated[int | list[int], BeforeValidator(_base_size)] | None = Field(
        default=None,
        description="side that scale 1 means for rounding long_side or short_side, box [long, short] for mmcv; null: "
        "the image's own",
    )
    max_size: Count | None = Field(default=None, description="rounding short_side: limit of the longer side")
    scale_divisor: Count | None = Field(
        default=None, description="sides of scaled images are rounded up to a multiple of this; null: no rounding"
    )
    chain_scales: Flag = Field(default=False, description="make each scaled image from the one before (PaddleSeg)")
    image_resize: Literal["bilinear", "aligned", "antialias"] = Field(
        default="antialias",
        description="how images are scaled: bilinear (half-pixel centres), aligned (bilinear with corners aligned), "
        "antialias (bilinear, filtered when shrinking)",
    )
    align_corners: Literal[True, False, "model"] = Field(
        default=False,
        description="bilinear resizing of logits to the label's size: corners aligned or not; model: as in the model",
    )
    absent: Literal["skip", "ignore_without_label", "zero", "one"] = Field(
        default="skip",
        description="classes left out of means: skip: neither labelled nor predicted; ignore_without_label: not "
        "labelled; zero: none, what is not defined is 0",
    )
    boundary_ratio: Positive = Field(
        default=0.02,
        description="width of the band of boundary IoU, as a share of the image diagonal (at least one pixel)",
    )
    best: Literal["miou", "boundary_iou", "pixel_accuracy", "mask_ap", "boundary_ap"] = Field(
        default="miou",
        description="the refined prediction's metric that chooses best.pt; of objects mask_ap by default",
    )
    score_threshold: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="objects of a lower score are left out by `rendseg predict` and in pictures",
    )
    pictures: Whole = Field(
        default=4,
        description="side-by-side pictures written to <run folder>/pictures after training; images in worst.png of "
        "`rendseg eval`",
    )

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, given: Any) -> Any:
        values = (given.kwargs or {}) if isinstance(given, ArgsKwargs) else given
        preset = values.get("preset", "rendseg") if isinstance(values, Mapping) else None
        if not isinstance(preset, str) or preset not in PRESETS:
            return given
        filled = {**PRESETS[preset], **values}
        return ArgsKwargs((), filled) if isinstance(given, ArgsKwargs) else filled

    def __post_init__(self) -> None:
        if self.window is None and self.window_stride is not None:
            raise ValueError("window_stride needs window: [height, width]")
        if self.window is not None and self.window_stride is not None:
            for side, stride, window in zip(("height", "width"), self.window_stride, self.window, strict=True):
                if stride > window:
                    raise ValueError(
                        f"window_stride {self.window_stride} exceeds window {self.window} in {side}: pixels between "
                        "windows would not be predicted; make the stride at most the window"
                    )
        if self.base_size is not None:
            wanted = {"mmcv": list, "long_side": int, "short_side": int}.get(self.rounding)
            if wanted is None:
                raise ValueError(
                    f"base_size {self.base_size} has no meaning with rounding: {self.rounding}; use mmcv, long_side or "
                    "short_side"
                )
            if not isinstance(self.base_size, wanted):
                shape = "[long, short]" if wanted is list else "one number"
                raise ValueError(f"base_size must be {shape} with rounding: {self.rounding}, got {self.base_size}")
        if self.max_size is not None and self.rounding != "short_side":
            raise ValueError(f"max_size needs rounding: short_side, got rounding: {self.rounding}")

    @property
    def stride(self) -> list[int] | None:
        """``window_stride``, or two thirds of the window."""
        if self.window is None or self.window_stride is not None:
            return self.window_stride
        return [max(1, 2 * side // 3) for side in self.window]


# Keys of EvalConfig that objects have no use for.
_LABEL_MAPS_ALONE = (
    "preset scales flip flip_vertical window window_stride window_border merge rounding base_size max_size "
    "scale_divisor chain_scales image_resize align_corners absent boundary_ratio"
).split()


class OutputConfig(Options):
    """Where a run is written."""

    dir: str = Field(default="runs", description="parent folder of runs, relative to the current folder")


class Config(Options):
    """One experiment."""

    name: FolderName = Field(description="name of the run and of its folder")
    seed: Whole = Field(default=0, description="seed of weights, order of the data, augmentation and point sampling")
    device: Literal["auto", "cpu"] = Field(default="auto", description="auto: the accelerator if there is one; cpu")
    resume: str = Field(
        default="auto",
        description="auto: continue if the run folder holds a checkpoint of the same configuration; never: start "
        "again and replace what the run folder holds; or the path of a checkpoint to continue from",
    )
    model: dict[str, Any] = Field(
        description="the network; its keys are the fields of rendseg.models.ModelOptions, or PointRendRCNNOptions"
    )
    data: dict[str, Any] = Field(description="the images; its keys are the fields of the options in rendseg.data")
    train: TrainConfig = Field(description="see TrainConfig")
    eval: EvalConfig = Field(default=EvalConfig(), description="see EvalConfig")
    output: OutputConfig = Field(default=OutputConfig(), description="see OutputConfig")

    # The models and the data sets own their options, check them and fill in what presets say.

    @field_validator("model", mode="before")
    @classmethod
    def _resolved_model(cls, value: Any) -> Any:
        from rendseg.models import parse_options

        try:
            return _plain(dataclasses.asdict(parse_options(value)))
        except TypeError as error:
            raise ValueError(str(error)) from error

    @field_validator("data", mode="before")
    @classmethod
    def _resolved_data(cls, value: Any) -> Any:
        from rendseg.data import parse_options

        return _plain(dataclasses.asdict(parse_options(value)))  # a DataError is a ValueError

    def __post_init__(self) -> None:
        of_objects = self.eval.best in ("mask_ap", "boundary_ap")
        if of_objects != self.learns_objects:
            wanted = "mask_ap or boundary_ap" if self.learns_objects else "miou, boundary_iou or pixel_accuracy"
            raise ValueError(f"eval.best must be {wanted} with model.name {self.model['name']}, got {self.eval.best!r}")
        if not self.learns_objects:
            return
        if self.train.fsdp.enabled:
            raise ValueError(
                "train.fsdp shards models of label maps alone: leave it out with model.name pointrend_rcnn"
            )
        usual = EvalConfig()
        other = (key for key in _LABEL_MAPS_ALONE if getattr(self.eval, key) != getattr(usual, key))
        if key := next(other, None):
            raise ValueError(f"eval.{key} is for label maps: leave it out with model.name pointrend_rcnn")

    @property
    def learns_objects(self) -> bool:
        """Whether the model finds objects with masks, not a label map."""
        return self.model.get("name") == "pointrend_rcnn"

    @property
    def run_dir(self) -> Path:
        """The folder of this run."""
        return Path(self.output.dir).expanduser() / self.name

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, numbers and strings: what YAML and a checkpoint hold."""
        return _plain(dataclasses.asdict(self))  # type: ignore[call-overload]

    def to_yaml(self) -> str:
        """The whole configuration as YAML that ``load_config`` reads back to an equal one."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def _plain(value: Any) -> Any:
    """Lists for tuples throughout, as YAML has it."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


# ------------------------------------------------------------------------------------------------------ reading


MOST_VALUES, DEEPEST = 100_000, 100


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key given twice is an error (plain YAML silently keeps the second), and so are a value that
    contains itself and aliases that make a short text very long."""

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        if self.flow_level >= DEEPEST:  # the scanner's time grows with the square of the depth
            raise RecursionError
        super().fetch_flow_collection_start(TokenClass)

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            self._count(node, {})
        return node

    def _count(self, node: yaml.Node, counts: dict[yaml.Node, int]) -> int:
        """The values under ``node``, those behind aliases as often as they occur. 0 in ``counts``: begun."""
        if node not in counts:
            counts[node] = 0
            children = node.value if isinstance(node, yaml.CollectionNode) else []
            if isinstance(node, yaml.MappingNode):
                children = [child for pair in children for child in pair]
            counts[node] = 1 + sum(self._count(child, counts) for child in children)
        if counts[node] == 0:
            raise _error("a value contains itself", node)
        if counts[node] > MOST_VALUES:
            raise _error(f"with its aliases it holds more than {MOST_VALUES} values", node)
        return counts[node]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # <<: *anchor, whose keys may be given again
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, (str, int, float, bool, type(None))):
                raise _error(f"a key must be one word or number, got a {type(key).__name__}", key_node)
            if key in seen:
                raise _error(f"the key {key!r} is given twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _error(message: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, message, node.start_mark)


def _parse(text: str) -> Any:
    """The value of a YAML text; ``YAMLError`` for all that can be wrong with it."""
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError:
        raise
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    except Exception as error:  # what the constructors of numbers and dates raise
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error


def load_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Config:
    """Read, override, expand, validate and resolve a configuration; ``ConfigError`` says what is wrong and where."""
    return build_config(read_mapping(path), overrides, source=str(path), folder=Path(path).resolve().parent)


def read_mapping(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping of a YAML file, as it stands; ``ConfigError`` where there is none."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"there is no configuration file {path}")
    try:
        content = _parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is not readable YAML: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, got {type(content).__name__}")
    return content


def override_mapping(content: Mapping[str, Any], overrides: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """A copy of ``content`` with every ``a.b.c=value`` of ``overrides`` set, and the dotted keys that were."""
    values: dict[str, Any] = _copy(content)
    return values, [_apply(values, override) for override in overrides]


def build_config(
    content: Mapping[str, Any], overrides: Iterable[str] = (), source: str = "configuration", folder: Path | None = None
) -> Config:
    """The ``Config`` of a plain mapping; ``source`` is named in errors, ``folder`` is where relative roots begin."""
    values, overridden = override_mapping(content, overrides)
    values = _expand(values, source)
    data = values.get("data")
    if isinstance(data, dict) and isinstance(data.get("root"), str):
        data["root"] = _resolve(data["root"], folder)
    if {"model", "data"} <= values.keys():
        from rendseg.data import DataError, linked

        try:
            values["model"], values["data"] = linked(values["model"], data)
        except DataError as error:
            raise ConfigError(f"{error} (in {source})") from error
    if isinstance(values.get("model"), dict) and values["model"].get("name") == "pointrend_rcnn":
        given = values.get("eval")
        if given is None or isinstance(given, dict):
            values["eval"] = {"best": "mask_ap", **(given or {})}
    return validated(Config, values, source, overridden)


def _copy(value: Any) -> Any:
    """A deep copy of mappings and lists that shares nothing with a YAML document's anchors."""
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _apply(content: dict[str, Any], override: str) -> str:
    """Set ``a.b.c=value`` in ``content``; returns the dotted key."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        raise ConfigError(f"an override is written key=value with a dotted key, got {override!r}")
    try:
        value = _parse(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {override!r} is not YAML: {_one_line(error)}") from error
    *parents, last = key.split(".")
    target: Any = content
    for i, parent in enumerate(parents):
        if target.get(parent) is None:
            target[parent] = {}
        target = target[parent]
        if not isinstance(target, dict):
            raise ConfigError(f"{override!r}: {'.'.join(parents[: i + 1])} is a value, not a section")
    target[last] = value
    return key


_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def _expand(value: Any, source: str) -> Any:
    """Replace ``${NAME}``, ``${NAME:-default}`` and a ``~`` at the start in all strings of a nested structure."""
    if isinstance(value, dict):
        return {key: _expand(item, source) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, source) for item in value]
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        name, default = match.groups()
        if (found := os.environ.get(name)) or default is not None:
            return found or default
        raise ConfigError(f"{source}: the environment variable {name} of {value!r} is not set")

    value = _VARIABLE.sub(variable, value)
    return os.path.expanduser(value) if value.startswith("~") else value


def _resolve(root: str, folder: Path | None) -> str:
    path = Path(root).expanduser()
    for base in (folder, Path.cwd()):
        if base is not None and (base / path).exists():
            return str((base / path).resolve())
    return os.path.abspath(path)


# ------------------------------------------------------------------------------------------------------- errors


def validated(kind: type[O], values: Mapping[str, Any], source: str, overridden: Iterable[str] = ()) -> O:
    """``kind`` with ``values``; ``ConfigError`` has one line for every problem, unknown keys first because they often
    cause the rest. ``source`` is the file, ``overridden`` are the keys that were set on the command line."""
    try:
        return kind(**{str(key): value for key, value in values.items()})
    except ValidationError as error:
        lines = []
        for problem in problems(error, kind, values):
            key = problem.key
            where = "on the command line" if any(_within(key, o) for o in overridden) else f"in {source}"
            if key in ("model", "data"):  # checked by their owners, whose messages name the key
                lines.append(f"{problem.message.removeprefix(': ')} ({where})")
            elif problem.kind == "missing":
                lines.append(f"the key {key!r} is missing in {source}")
            else:
                lines.append(problem.text(f"{key!r} {where}" if problem.kind == "unknown" else f"{key} {where}"))
        raise ConfigError("\n".join(dict.fromkeys(lines))) from error


def _within(key: str, override: str) -> bool:
    return key == override or key.startswith(override + ".") or override.startswith(key + ".")


def differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """``(dotted key, value in one, value in other)`` wherever two plain configurations differ."""
    result: list[tuple[str, Any, Any]] = []
    for key in [*one, *(k for k in other if k not in one)]:
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            result += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            result.append((prefix + key, a, b))
    return result


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
