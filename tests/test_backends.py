"""The choice of backend: what is usable, what is refused and with which words."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

import rendseg
from rendseg import _backends, _extension
from tests import fresh

ROOT = Path(__file__).resolve().parents[1]


def run(program: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RENDSEG_")}
    return fresh.run(program, {**clean, "PYTHONPATH": str(ROOT), **env})


@pytest.fixture(autouse=True)
def restore():
    state = (_backends._STATE.name, _backends._STATE.error)
    yield
    _backends._apply(*state)


def test_every_backend_says_whether_and_why_not() -> None:
    assert list(rendseg.backends) == ["cpp", "triton", "reference"]
    for name, status in rendseg.backends.items():
        assert status.name == name
        if status.usable:
            assert status.devices
        else:
            assert status.cause and status.remedy
    assert rendseg.backends["reference"].usable


def test_repr_has_one_line_per_backend() -> None:
    lines = repr(rendseg.backends).splitlines()
    assert [line.split()[0] for line in lines] == list(rendseg.backends)


def test_cuda_is_listed_only_where_a_gpu_is() -> None:
    assert ("cuda" in rendseg.backends["cpp"].devices) <= torch.cuda.is_available()


def test_set_backend_and_context_manager() -> None:
    rendseg.set_backend("auto")
    with rendseg.backend("reference"):
        assert rendseg.current_backend() == "reference"
        with rendseg.backend("auto"):
            assert rendseg.current_backend() == "auto"
        assert rendseg.current_backend() == "reference"
    assert rendseg.current_backend() == "auto"
    rendseg.set_backend("reference")
    assert rendseg.current_backend() == "reference"


def test_context_manager_restores_after_an_error() -> None:
    rendseg.set_backend("auto")
    with pytest.raises(KeyError), rendseg.backend("reference"):
        raise KeyError
    assert rendseg.current_backend() == "auto"


@pytest.mark.bad_input
def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="must be one of auto, cpp, triton, reference, got 'cuda'"):
        rendseg.set_backend("cuda")


@pytest.mark.bad_input
def test_unusable_backend_is_refused_with_cause_and_the_choice_kept() -> None:
    unusable = [status for status in rendseg.backends.values() if not status.usable]
    if not unusable:
        pytest.skip("every backend is usable here")
    rendseg.set_backend("reference")
    for status in unusable:
        with pytest.raises(RuntimeError) as error:
            rendseg.set_backend(status.name)
        assert status.cause in str(error.value) and status.remedy in str(error.value)
        assert rendseg.current_backend() == "reference"


def test_environment_sets_the_default() -> None:
    done = run("import rendseg; print(rendseg.current_backend())", RENDSEG_BACKEND="reference")
    assert (done.returncode, done.stdout.strip()) == (0, "reference"), done.stderr


@pytest.mark.bad_input
@pytest.mark.parametrize("value", ["gpu", "triton-nightly"])
def test_bad_environment_imports_and_the_first_call_raises(value: str) -> None:
    program = (
        "import torch, rendseg\n"
        "from rendseg.ops import _register\n"
        "try:\n"
        "    _register.use_reference('uncertainty', torch.zeros(1))\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    done = run(program, RENDSEG_BACKEND=value)
    assert done.returncode == 0, done.stderr
    assert "RENDSEG_BACKEND must be one of auto, cpp, triton, reference" in done.stdout


def test_disabled_extension_is_named_as_the_cause() -> None:
    program = (
        "import rendseg\n"
        "s = rendseg.backends['cpp']\n"
        "print(s.usable, '|', s.cause, '|', s.remedy)\n"
        "try:\n"
        "    rendseg.set_backend('cpp')\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    done = run(program, RENDSEG_DISABLE_EXTENSION="1")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "False | RENDSEG_DISABLE_EXTENSION=1 is set | unset RENDSEG_DISABLE_EXTENSION"
    assert "RENDSEG_DISABLE_EXTENSION=1 is set" in second


@pytest.mark.skipif(not _extension.LOADED, reason="the extension is not built")
def test_compiled_ops_agree_with_the_dispatcher() -> None:
    for op in _backends.compiled_ops("cpu"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"rendseg::{op}", "CPU")
    assert not _backends.has_kernel("uncertain_points", "mps")
