"""The commands of ``rendseg`` as a typer application; ``rendseg/cli.py`` is the way in."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
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

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Configuration keys to set, such as train.optimizer.lr=0.02."),
]


def _one_line_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Print what the user can correct as one message and end with code 2 (128 + n after signal n)."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        # Imported here, so that --help does not wait for torch.
        from rendseg.data import DataError
        from rendseg.engine.checkpoint import CheckpointError
        from rendseg.engine.config import ConfigError
        from rendseg.engine.train import Interrupted, TrainingError

        try:
            command(*args, **kwargs)
        except (ConfigError, DataError, CheckpointError, TrainingError, Interrupted) as error:
            if os.environ.get("RENDSEG_DEBUG") == "1":
                raise
            if os.environ.get("RANK", "0") == "0" or not isinstance(error, Interrupted):
                print(f"rendseg: {error}", file=sys.stderr)
            raise typer.Exit(128 + error.signal if isinstance(error, Interrupted) else 2) from None
        except KeyboardInterrupt:
            print("rendseg: interrupted", file=sys.stderr)
            raise typer.Exit(130) from None

    return run


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
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Conventions of rendseg, mmseg, paddleseg, detectron2 or pytorch_encoding; short for "
            "eval.preset=NAME. Keys given here win.",
        ),
    ] = None,
) -> None:
    """Evaluate a checkpoint on its validation data: coarse and refined side by side."""
    from rendseg.engine.evaluate import evaluate_checkpoint

    chosen = [] if preset is None else [f"eval.preset={preset}"]
    evaluate_checkpoint(checkpoint, [*chosen, *(overrides or ())], out)


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
) -> None:
    """Write label map, colour overlay and a side-by-side picture of every image."""
    from rendseg.engine.predict import predict_files

    done, failed = predict_files(checkpoint, images, out, overrides or ())
    if failed:
        print(f"rendseg: {failed} of {done + failed} images could not be read", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def doctor() -> None:
    """Say what is installed, built and usable here, and for the rest why not and what to do."""
    from rendseg import doctor as module

    print(module.report())
