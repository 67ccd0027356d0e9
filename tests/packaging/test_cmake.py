"""The C++ library and its examples, built by CMake and run by ctest; one of them runs an exported model."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.emulation.build import locked
from tests.limits import TIMEOUT

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str, fails: int = 0) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    said = done.stdout + done.stderr
    assert done.returncode == fails, said[-4000:]
    return said


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build folder; built once for all tests here."""
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("needs cmake and a C++ compiler")
    base = tmp_path_factory.getbasetemp()
    # One folder for all workers: the second finds everything built.
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cmake"
    with locked(folder):
        return _built(folder)


def _built(folder: Path) -> Path:
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    # Unoptimised and without debug information: this test is about the build; the kernels have tests of their own.
    run(
        "cmake",
        "-S",
        str(ROOT),
        "-B",
        str(folder),
        *generator,
        prefix,
        "-DRENDSEG_CUDA=OFF",
        "-DCMAKE_BUILD_TYPE=Debug",
        "-DCMAKE_CXX_FLAGS_DEBUG=-O0",
    )
    run("cmake", "--build", str(folder), "--parallel", os.environ.get("MAX_JOBS", "2"))
    return folder


@pytest.mark.slow
def test_library_and_example(build: Path) -> None:
    said = run("ctest", "--test-dir", str(build), "--output-on-failure", "-V", "-R", "rendseg_example")
    assert "100% tests passed" in said and "1: ok" in said


def photograph() -> Tensor:
    """A CamVid image, or else smooth random colours: uint8 [H, W, 3]."""
    from rendseg.data import DataError, build_dataset, parse_options

    try:
        return torch.from_numpy(build_dataset(parse_options({"name": "camvid"}), "val").read(0)[0].copy())
    except DataError:
        torch.manual_seed(1)
        coarse = F.interpolate(torch.rand(1, 3, 12, 16), size=(360, 480), mode="bilinear")
        return (coarse[0] * 255).to(torch.uint8).permute(1, 2, 0).contiguous()


def write_ppm(path: Path, pixels: Tensor) -> None:
    header = f"P6\n# a comment\n{pixels.shape[1]} {pixels.shape[0]}\n255\n"
    path.write_bytes(header.encode() + pixels.numpy().tobytes())


def read_pgm(path: Path) -> np.ndarray:
    kind, size, largest, pixels = path.read_bytes().split(b"\n", 3)
    assert kind == b"P5" and largest == b"255"
    width, height = map(int, size.split())
    return np.frombuffer(pixels, np.uint8).reshape(height, width)


@pytest.mark.slow
def test_exported_model_in_cpp(build: Path, tmp_path: Path) -> None:
    """A package of AOTInductor, from C++ and from Python, gives the labels that the network gives."""
    if shutil.which("g++") is None:
        pytest.skip("AOTInductor needs g++")
    from rendseg.engine.export import ExportOptions, export, load
    from rendseg.models import build_model

    torch.manual_seed(0)
    model = {
        "backbone": {"name": "test_resnet"},
        "decoder": {"channels": 16, "head_channels": 16},
        "pointrend": {"hidden_channels": 16, "inference_points": 2048},
    }
    network = build_model(model, 5).eval()
    for layer in (network.decoder.predictor, network.head.predictor):  # logits as far apart as trained ones
        torch.nn.init.normal_(layer.weight)
    pixels = photograph()
    mean, std, size = (0.4, 0.45, 0.5), (0.25, 0.2, 0.3), tuple(pixels.shape[:2])
    classes = {"names": list("abcde"), "palette": [[i, i, i] for i in range(5)], "ignore_index": 255}
    package, image, labels = tmp_path / "m.pt2", tmp_path / "image.ppm", tmp_path / "labels.pgm"
    export(network, package, ExportOptions("aoti", size), classes=classes, mean=mean, std=std)
    write_ppm(image, pixels)

    said = run(str(build / "rendseg_segment"), str(package), str(image), str(labels))
    assert f"{size[0]} x {size[1]} pixels, 5 classes" in said
    images = ((pixels / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)[None]
    wanted = network.predict(images, output="labels").labels[0]
    assert len(wanted.unique()) > 1
    for name, got in (("C++", torch.from_numpy(read_pgm(labels).copy())), ("Python", load(package)(images)[0])):
        differing = float((got != wanted).float().mean())
        print(f"{name}: {100 * differing:.4f} % of {wanted.numel()} pixels differ")
        assert differing < 1e-4

    # As a test of ctest, and what it says to input that it cannot use.
    run("cmake", f"-DRENDSEG_PACKAGE={package}", f"-DRENDSEG_IMAGE={image}", str(build))
    said = run("ctest", "--test-dir", str(build), "--output-on-failure", "-R", "rendseg_segment")
    assert "100% tests passed, 0 tests failed out of 1" in said
    write_ppm(image, pixels.repeat(2, 1, 1))
    for arguments, message in (
        ([package, image, labels], f"the package takes height and width [{size[0]}, {size[1]}]"),
        ([package, labels, labels], "it is no binary PPM (P6)"),
        ([package, tmp_path / "none.ppm", labels], "cannot open"),
        ([tmp_path / "none.pt2", image, labels], "cannot open"),
    ):
        said = run(str(build / "rendseg_segment"), *map(str, arguments), fails=1)
        assert message in said and said.count("\n") <= 2
    assert "usage: rendseg_segment" in run(str(build / "rendseg_segment"), fails=2)
