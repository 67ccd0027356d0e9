"""The commands of ``rendseg`` as a typer application; ``rendseg/cli.py`` is the way in."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="rendseg",
    help="Point-based and context-encoded segmentation. Errors in the input end with exit code 2 and one line; "
    "RENDSEG_DEBUG=1 shows the traceback.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

IN_PART = 3  # exit code of a command that has done some of several images

data_app = typer.Typer(help="Data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Configuration keys to set, such as train.optimizer.lr=0.02."),
]


def _expanded(value: Any) -> Any:
    """Paths with the home folder for a ``~`` at their start, which not every shell has put there."""
    if isinstance(value, list):
        return [_expanded(item) for item in value]
    return value.expanduser() if isinstance(value, Path) else value


def _one_line_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Print what the user can correct as one message and end with code 2 (128 + n after signal n)."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        # Imported here, so that --help does not wait for torch.
        from rendseg.convert import ConversionError
        from rendseg.data import DataError
        from rendseg.engine.checkpoint import CheckpointError
        from rendseg.engine.config import ConfigError
        from rendseg.engine.export import ExportError
        from rendseg.engine.train import Interrupted, TrainingError

        ours = (ConfigError, DataError, CheckpointError, ConversionError, ExportError, TrainingError, Interrupted)
        try:
            command(*args, **{name: _expanded(value) for name, value in kwargs.items()})
        except ours as error:
            if os.environ.get("RENDSEG_DEBUG") == "1":
                raise
            if os.environ.get("RANK", "0") == "0" or not isinstance(error, Interrupted):
                print(f"rendseg: {error}", file=sys.stderr)
            raise typer.Exit(128 + error.signal if isinstance(error, Interrupted) else 2) from None
        except KeyboardInterrupt:
            print("rendseg: interrupted", file=sys.stderr)
            raise typer.Exit(130) from None

    return run


class _Labels(str, Enum):
    classes = "classes"
    dataset = "dataset"


@app.command()
@_one_line_errors
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML configuration.")],
    overrides: Overrides = None,
) -> None:
    """Train; a run that was interrupted is continued exactly by the same command (see the key resume)."""
    from rendseg.engine.config import load_config
    from rendseg.engine.train import train as run

    run(load_config(config, overrides or ()))


@app.command(name="eval")
@_one_line_errors
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A .pt file of a run.")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results; default: CHECKPOINT without extension + _eval.")
    ] = None,
    labels: Annotated[
        _Labels | None,
        typer.Option(
            help="Write the predicted label maps too: the numbers of the classes, or the data set's own values "
            "(Cityscapes' label ids, those of data.class_map), as servers want them."
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Conventions of rendseg, mmseg, paddleseg, detectron2 or pytorch_encoding; short for "
            "eval.preset=NAME. Keys given here win.",
        ),
    ] = None,
) -> None:
    """Evaluate a checkpoint on its validation data: coarse and refined side by side.

    Exit code 0: all images count; 3: some could not be read; 2: none could.
    """
    from rendseg.engine.evaluate import evaluate_checkpoint

    chosen = [] if preset is None else [f"eval.preset={preset}"]
    result = evaluate_checkpoint(checkpoint, [*chosen, *(overrides or ())], out, labels.value if labels else None)
    if result["left_out"]:
        if os.environ.get("RANK", "0") != "0":
            raise typer.Exit(IN_PART)
        total = len(result["left_out"]) + result["images"]
        print(
            f"rendseg: {len(result['left_out'])} of {total} images could not be read and do not count", file=sys.stderr
        )
        raise typer.Exit(IN_PART)


@app.command()
@_one_line_errors
def predict(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A .pt file of a run.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES...", help="Image files, or folders of them.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set a key, such as device=cpu."),
    ] = None,
    labels: Annotated[
        _Labels,
        typer.Option(help="What label maps hold: the numbers of the classes, or the data set's own values (see eval)."),
    ] = _Labels.classes,
) -> None:
    """Write label map, colour overlay and a side-by-side picture of every image; of objects their masks and a picture.

    Exit code 0: all images are done; 3: some could not be; 2: none could.
    """
    from rendseg.engine.predict import predict_files

    done, failed = predict_files(checkpoint, images, out, overrides or (), labels is _Labels.dataset)
    if failed:
        print(f"rendseg: {failed} of {done + failed} images or folders could not be predicted", file=sys.stderr)
        raise typer.Exit(IN_PART if done else 2)


class _Splits(str, Enum):
    train = "train"
    val = "val"
    all = "all"


@data_app.command(name="check")
@_one_line_errors
def data_check(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML configuration.")],
    overrides: Overrides = None,
    split: Annotated[_Splits, typer.Option(help="The part to read.")] = _Splits.all,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the counts and problems to it.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that read; default: one per core, at most 8.")
    ] = None,
) -> None:
    """Read a data set whole: count its images and classes, suggest class weights, and name every bad file.

    Exit code 0: all files are sound; 1: some are not, or nothing can be learnt from them; 2: none could be read.
    """
    from rendseg.engine.config import load_config
    from rendseg.engine.data_check import check_files

    code = check_files(load_config(config, overrides or ()).data, split.value, json, workers)
    if code:
        raise typer.Exit(code)


class _Split(str, Enum):
    train = "train"
    val = "val"


@data_app.command(name="score")
@_one_line_errors
def data_score(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML configuration of a data set of objects.")],
    detections: Annotated[Path, typer.Argument(metavar="DETECTIONS", help="JSON file in COCO's form of results.")],
    overrides: Overrides = None,
    split: Annotated[_Split, typer.Option(help="The part that was predicted.")] = _Split.val,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures to it.")] = None,
) -> None:
    """Average precision of detected masks and of their boundaries."""
    from rendseg.engine.config import load_config
    from rendseg.engine.instance_metrics import score_files

    score_files(load_config(config, overrides or ()).data, split.value, detections, json)


@app.command()
@_one_line_errors
def experiment(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file with base, variants and seeds.")],
    overrides: Overrides = None,
    only: Annotated[list[str] | None, typer.Option(help="Train this variant only; may be repeated.")] = None,
) -> None:
    """Train variants of one configuration with several seeds; write a table and a plot. Continues where it stopped."""
    from rendseg.engine.experiment import run_experiment

    run_experiment(config, overrides or (), only or ())


@app.command()
@_one_line_errors
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A .pt file of a run.")],
    overrides: Overrides = None,
    format: Annotated[str, typer.Option(help="pt2 (torch.export), aoti (AOTInductor) or onnx.")] = "pt2",
    out: Annotated[Path | None, typer.Option(help="File to write; default: CHECKPOINT with another suffix.")] = None,
    output: Annotated[str, typer.Option(help="labels or logits.")] = "labels",
    size: Annotated[str | None, typer.Option(metavar="H,W", help="Size of images; default: that of training.")] = None,
    dynamic: Annotated[bool, typer.Option("--dynamic/--static", help="Any number of images, or --batch.")] = True,
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size/--fixed-size", help="Any size that is a multiple of the largest stride.")
    ] = False,
    batch: Annotated[int, typer.Option(help="Number of images with --static.")] = 1,
    with_preprocessing: Annotated[
        bool, typer.Option("--with-preprocessing", help="Input uint8 [N, H, W, 3] RGB, not normalised float32.")
    ] = False,
    opset: Annotated[int | None, typer.Option(help="Of ONNX, 18 to 23; default: that of torch.onnx.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    check: Annotated[bool, typer.Option(help="Run the artefact on random images and compare.")] = True,
) -> None:
    """Write a trained model as a file that runs without rendseg's Python: pt2, AOTInductor or ONNX."""
    from rendseg.engine.export import export_checkpoint, parse_size

    export_checkpoint(
        checkpoint,
        format,
        out,
        size=None if size is None else parse_size(size),
        device=device,
        overrides=overrides or (),
        check=check,
        output=output,
        dynamic_batch=dynamic,
        dynamic_size=dynamic_size,
        batch=batch,
        preprocessing=with_preprocessing,
        opset=opset,
    )


@app.command()
@_one_line_errors
def convert(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="SOURCE...", help="File or folder of weights; of csail: encoder and decoder."),
    ],
    format: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="NAME",
            help="mmseg, detectron2, paddleseg, pytorch_encoding, csail, unifiedparsing, transformers, torchvision or "
            "rendseg; default: rendseg.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The model's configuration there (.py, .yaml, .json), read as data."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="File to write; default: named as SOURCE.")] = None,
    to: Annotated[str, typer.Option(help="rendseg, safetensors, mmseg or transformers.")] = "rendseg",
    normalize: Annotated[
        str | None,
        typer.Option(help="Normalisation of images, where the source does not say: imagenet, caffe or half."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set a key of the result, such as data.name=cityscapes."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Convert back and compare every tensor, and run the network once.")
    ] = False,
) -> None:
    """Turn weights of another framework into a checkpoint for eval, predict, export and fine-tuning, or back."""
    from rendseg.convert.command import convert as run

    done = run(
        sources,
        format,
        config=config,
        out=out,
        to=to,
        normalize=normalize,
        overrides=overrides or (),
        check=check,
    )
    dead = f", {done.dead} without an effect left out" if done.dead else ""
    print(f"{done.tensors} tensors{dead} -> {done.out} ({done.seconds:.1f} s)")


@app.command()
def doctor() -> None:
    """Say what is installed, built and usable here, and for the rest why not and what to do."""
    from rendseg import doctor as module

    print(module.report())
