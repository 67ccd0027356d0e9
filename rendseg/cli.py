"""The command ``rendseg``: train, eval, predict, export, convert, experiment, data check and score, doctor.

``doctor`` must work where nearly nothing is installed, so that this module imports the standard library only; the
commands themselves are in ``rendseg/engine/commands.py``, imported once it is known that their packages are there.
"""

from __future__ import annotations

import importlib.util
import io
import sys
from collections.abc import Sequence

# Module that the trainer imports -> package that pip installs.
NEEDED = {
    "typer": "typer",
    "pydantic": "pydantic",
    "yaml": "pyyaml",
    "tqdm": "tqdm",
    "numpy": "numpy",
    "PIL": "pillow",
    "torchvision": "torchvision",
    "timm": "timm",
    "accelerate": "accelerate",
}
USAGE = """\
usage: rendseg train CONFIG [key=value ...]
       rendseg eval CHECKPOINT [--preset NAME] [--labels classes|dataset] [key=value ...]
       rendseg predict CHECKPOINT IMAGES... --out DIR [--labels classes|dataset]
       rendseg export CHECKPOINT --format pt2|aoti|onnx [--out FILE] [key=value ...]
       rendseg convert SOURCE... --from NAME [--config FILE] [--out FILE] [--to NAME] [--check]
       rendseg experiment CONFIG [--only VARIANT] [key=value ...]
       rendseg data check CONFIG [key=value ...]
       rendseg data score CONFIG DETECTIONS [key=value ...]
       rendseg doctor"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0 when done, 1 when ``data check`` found problems, 2 when the input cannot be used, 3
    when some of several images were done, 128 + n after signal n."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console that lacks a character, a file name of any bytes
            stream.reconfigure(errors="backslashreplace")
    argv = list(sys.argv[1:] if arguments is None else arguments)
    asks_help = bool({"-h", "--help"} & set(argv)) or not argv
    if argv[:1] == ["doctor"] and not asks_help:
        from rendseg import doctor

        print(doctor.report())
        return 0
    if argv[:1] == ["--version"]:
        from rendseg import __version__

        print(f"rendseg {__version__}")
        return 0
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        if asks_help:
            print(USAGE)
        what = f"rendseg {argv[0]}" if argv else "rendseg"
        print(f"{what} needs {', '.join(missing)}, not installed here: pip install 'rendseg[train]'", file=sys.stderr)
        return 2
    from rendseg.engine.commands import app

    try:
        app(args=argv, prog_name="rendseg")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
