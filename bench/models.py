"""Every decoder with and without PointRend: parameters, ms per image, a training step, and exports, as one table.

Images are 512x1024 (``--quick``: 128x256), 19 classes, random weights; ``reference`` is the same network whose
operators run as plain PyTorch. ``--export`` also writes every model as pt2, AOTInductor package and ONNX (a minute or
more each) and compares the labels with PyTorch's; ``--only TEXT`` takes the models whose name holds TEXT;
``--backbone NAME`` another timm network than ResNet-50.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch  # noqa: E402
from _harness import Bench  # noqa: E402

import rendseg  # noqa: E402

if importlib.util.find_spec("timm") is None:  # which the operators do without
    print("bench/models.py: not run, the package timm is not installed, and the backbones are from it", file=sys.stderr)
    raise SystemExit(1)
from rendseg.models import build_model  # noqa: E402

CLASSES = 19
FORMATS = ("pt2", "aoti", "onnx")
# Decoder, output stride of the backbone.
DECODERS = {
    "fcn": 8,
    "semantic_fpn": 32,
    "deeplabv3": 8,
    "deeplabv3plus": 16,
    "encnet": 8,
    "upernet": 32,
}


def build(decoder: str, backbone: str, pointrend: bool) -> Any:
    options = {
        "name": "pointrend" if pointrend else "segmenter",
        "backbone": {"name": backbone, "output_stride": DECODERS[decoder]},
        "decoder": {"name": decoder},
    }
    torch.manual_seed(0)
    return build_model(options, CLASSES)


def train_step(model: Any, device: torch.device, size: tuple[int, int]) -> str:
    """``yes`` when a step changes every parameter by a finite amount, else what went wrong."""
    model.train()
    images = torch.randn(2, 3, *size, device=device)
    labels = torch.randint(0, CLASSES, (2, *size), device=device)
    try:
        sum(model(images, labels).values()).backward()
    except Exception as error:  # noqa: BLE001 - the table says why
        return f"no: {type(error).__name__}: {error}".splitlines()[0]
    finally:
        model.eval()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    bad = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    model.zero_grad(set_to_none=True)
    if without or bad:
        return f"no: no gradient {without[:2]}, not finite {bad[:2]}"
    return "yes"


def exported(model: Any, form: str, size: tuple[int, int]) -> str:
    """``yes`` with the largest share of differing labels that the export's own check met, or the reason why not."""
    from rendseg.engine.export import SUFFIXES, ExportOptions, export

    said: list[str] = []
    classes = {
        "names": [str(i) for i in range(CLASSES)],
        "palette": [[i, i, i] for i in range(CLASSES)],
        "ignore_index": 255,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{SUFFIXES[form]}"
        try:
            export(model, path, ExportOptions(form, size), classes=classes, say=said.append)
        except Exception as error:  # noqa: BLE001 - the table says why
            return f"no: {type(error).__name__}: {error}".splitlines()[0][:160]
    shares = [float(share) for text in said for share in re.findall(r"([0-9.]+) ?%", text)]
    return f"yes ({max(shares):g} %)" if shares else "yes"


def main() -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--export", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--backbone", default="resnet50")
    own, rest = parser.parse_known_args()
    bench = Bench("models", __doc__, rest)
    return bench.main(lambda bench: rows(bench, own))


def timed(
    bench: Bench, own: argparse.Namespace, name: str, decoder: str, pointrend: bool, size: tuple[int, int]
) -> list[str]:
    """One line of the table."""
    model = build(decoder, own.backbone, pointrend).to(bench.device).eval()
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    image = torch.randn(1, 3, *size, device=bench.device)

    def reference() -> Any:
        with rendseg.backend("reference"):
            return model.predict(image, output="labels").labels

    def predict() -> Any:
        return model.predict(image, output="labels").labels

    bench.compare(
        name,
        {"reference": reference, "rendseg": predict},
        baseline="reference",
        images=1,
        samples=bench.args.samples or (0 if bench.device.type == "cuda" else 3 if bench.quick else 5),
        size=list(size),
        parameters=parameters,
    )
    row = [name, f"{parameters:.1f}", f"{bench.median(name, 'rendseg'):.1f}"]
    row.append(f"{bench.ratio(name, 'reference', 'rendseg'):.2f}x")
    row.append(train_step(model, bench.device, (128, 256)))
    row += [exported(model, form, (128, 256)) if own.export else "not tried" for form in FORMATS]
    bench.note("| " + " | ".join(row) + " |")
    return row


def rows(bench: Bench, own: argparse.Namespace) -> None:
    size = (128, 256) if bench.quick else (512, 1024)
    table: list[list[str]] = []
    for decoder in DECODERS:
        for pointrend in (False, True):
            name = f"{decoder}{' + PointRend' if pointrend else ''}, {own.backbone}"
            if own.only in name:
                row = bench.run(name, timed, bench, own, name, decoder, pointrend, size)
                table += [row] if row else []
    titles = ["model", "parameters (M)", f"ms per {size[0]}x{size[1]} image", "against reference", "trains", *FORMATS]
    print("\n| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
    for row in table:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    raise SystemExit(main())
