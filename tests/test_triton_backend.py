"""Triton as a backend: who serves what, without a GPU. The interpreter runs in processes of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import rendseg
import rendseg.ops  # noqa: F401
from rendseg import _backends
from rendseg.ops import _triton
from rendseg.ops.schemas import SCHEMAS
from tests import fresh

ROOT = Path(__file__).resolve().parents[1]
OPS = [schema.split("(", 1)[0] for schema in SCHEMAS]
NO_EXTENSION = {"RENDSEG_DISABLE_EXTENSION": "1"}


def run(program: str, **env: str) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RENDSEG_", "TRITON_"))}
    done = fresh.run(program, {**clean, "PYTHONPATH": str(ROOT), **env})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_operators_with_kernels_are_real() -> None:
    assert set(_backends.triton_ops()) <= set(OPS)
    assert {"point_sample", "_point_sample_backward", "point_labels", "scatter_points_"} <= set(_backends.triton_ops())
    for file in _backends.triton_ops().values():
        assert (ROOT / "kernels" / f"{file}.py").is_file()


@pytest.mark.triton
def test_the_text_agrees_with_the_modules() -> None:
    import importlib

    found = {}
    for file in sorted(set(_backends.triton_ops().values())):
        module = importlib.import_module(f"rendseg.kernels.{file}")
        found.update(dict.fromkeys(module.IMPLEMENTATIONS, file))
        assert callable(importlib.import_module(f"rendseg.kernels._cases.{file}").calls)
    assert found == _backends.triton_ops()


@pytest.mark.triton
def test_nothing_is_imported_or_compiled_at_import(tmp_path: Path) -> None:
    program = (
        "import sys, rendseg, rendseg.ops\n"
        "print([name for name in sys.modules if name == 'triton' or name.startswith('rendseg.kernels.')])\n"
    )
    # Torch itself may import Triton; what counts is that rendseg adds nothing to it.
    alone = run("import sys, torch; print([name for name in sys.modules if name == 'triton'])")
    assert run(program, TRITON_CACHE_DIR=str(tmp_path)) == alone
    assert not list(tmp_path.iterdir())


@pytest.mark.triton
@pytest.mark.parametrize("env", [{}, NO_EXTENSION], ids=["built", "not built"])
def test_who_serves_a_gpu(env: dict[str, str]) -> None:
    program = (
        "import torch, rendseg.ops\n"
        "from rendseg import _backends\n"
        "for op in _backends.triton_ops():\n"
        "    key = torch._C._dispatch_has_kernel_for_dispatch_key('rendseg::' + op, 'CUDA')\n"
        "    cpu = torch._C._dispatch_has_kernel_for_dispatch_key('rendseg::' + op, 'CPU')\n"
        "    serving = _backends.serving(op, 'cuda')\n"
        "    assert key and serving == ('cpp' if _backends.has_kernel(op, 'cuda') else 'triton'), (op, serving)\n"
        "    assert _backends.serving(op, 'cpu') == ('cpp' if cpu else 'reference'), op\n"
        "print('cuda' in _backends.backends['cpp'].devices, _backends.compiled_ops('cuda'))\n"
    )
    out = run(program, **env)
    if env:
        assert out.strip() == "False ()"


def test_without_triton_the_reference_serves() -> None:
    program = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch, rendseg.ops\n"
        "from rendseg import _backends\n"
        "assert not any(_backends.FALLBACKS)\n"
        "print({_backends.serving(op, 'cuda') for op in _backends.triton_ops()})\n"
        "print(_backends.backends['triton'].cause, '|', _backends.backends['triton'].remedy)\n"
    )
    first, second = run(program, **NO_EXTENSION).splitlines()
    assert first == "{'reference'}"
    assert second.startswith('the package triton is not installed | pip install "triton')


@pytest.mark.triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for the words of a machine without a GPU")
def test_without_a_gpu_the_remedy_names_the_interpreter() -> None:
    out = run("import rendseg; s = rendseg.backends['triton']; print(s.usable, s.cause, '|', s.remedy)")
    assert out.startswith("False torch finds no GPU") and "TRITON_INTERPRET=1" in out
    out = run("import rendseg; print(rendseg.backends['triton'].devices)", TRITON_INTERPRET="1")
    assert out.strip() == "('cpu',)"


@pytest.mark.triton
def test_a_broken_triton_falls_to_the_reference_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "failure", lambda: "RuntimeError: no C compiler")
    _triton._warn.cache_clear()
    kernel = _triton.or_reference("point_sample", lambda *args: "the reference")
    with pytest.warns(RuntimeWarning, match="Triton cannot be used: RuntimeError: no C compiler") as warned:
        assert kernel([torch.zeros(1)]) == kernel([torch.zeros(1)]) == "the reference"
    assert len(warned) == 1


EXPLICIT = """
import torch, rendseg
from torch import library
from rendseg.ops import point_sample, scatter_points, scatter_points_, uncertainty, encode
from rendseg import _backends, reference
from rendseg.kernels import point_sample as kernels

calls = []
for op, function in list(kernels.IMPLEMENTATIONS.items()):
    kernels.IMPLEMENTATIONS[op] = lambda *a, _op=op, _f=function, **k: (calls.append(_op), _f(*a, **k))[1]

value = torch.randn(2, 3, 5, 6, requires_grad=True)
coords = torch.rand(2, 7, 2, requires_grad=True)


def gradients(function):
    out = function(value, coords)
    return out.detach(), *torch.autograd.grad(out.square().sum(), (value, coords))


def same(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


wanted = gradients(reference.point_sample)
same(gradients(point_sample), wanted)
assert calls == []
with rendseg.backend("triton"):
    same(gradients(point_sample), wanted)
    assert calls == ["point_sample", "_point_sample_backward"], calls
    torch.ops.rendseg.point_sample([value], coords)  # whoever calls
    assert len(calls) == 3
    for backend in ("aot_eager", "eager"):
        torch._dynamo.reset()
        compiled = torch.compile(lambda m, c: point_sample(m, c) * 1, fullgraph=True, backend=backend)
        same(gradients(compiled), wanted)
    assert len(calls) == 7
    with torch.autocast("cpu", torch.bfloat16):  # the same layers above the kernels
        assert point_sample([value, value.bfloat16()], coords).dtype == torch.float32
    library.opcheck(torch.ops.rendseg.point_sample, ([value], coords))
    with rendseg.backend("reference"):
        count = len(calls)
        same(gradients(point_sample), wanted)
        assert len(calls) == count
    gradients(point_sample)
    assert len(calls) == count + 2
    logits, indices = torch.randn(1, 2, 3, 4), torch.tensor([[3, 7]])
    values = torch.randn(1, 2, 2, requires_grad=True)
    changed = logits * 1
    scatter_points_(changed, indices, values)
    assert torch.equal(changed, scatter_points(logits, indices, values)) and changed.requires_grad
    changed.sum().backward()
    assert (values.grad == 1).all()
count = len(calls)
compiled(value, coords)  # compiled under Triton, called outside of it
same(gradients(point_sample), wanted)
assert len(calls) == count
assert "triton" not in {_backends.serving(op, "cpu") for op in _backends.triton_ops()}
print("done", len(calls))
"""


@pytest.mark.triton
@pytest.mark.parametrize("env", [{}, NO_EXTENSION], ids=["built", "not built"])
def test_an_explicit_request_routes_every_layer(env: dict[str, str]) -> None:
    assert run(EXPLICIT, TRITON_INTERPRET="1", **env).startswith("done")


@pytest.mark.triton
def test_the_environment_routes_too() -> None:
    program = (
        "import torch, rendseg.ops, sys\n"
        "rendseg.ops.point_sample(torch.zeros(1, 1, 2, 2), torch.rand(1, 3, 2))\n"
        "print('rendseg.kernels.point_sample' in sys.modules)\n"
    )
    assert run(program, TRITON_INTERPRET="1", RENDSEG_BACKEND="triton").strip() == "True"
    assert run(program, TRITON_INTERPRET="1").strip() == "False"


@pytest.mark.triton
def test_operators_without_a_kernel_are_refused() -> None:
    # A folder with a single kernel file stands for a time when others are not written.
    program = (
        "import torch, rendseg\n"
        "from rendseg import _backends\n"
        "real = _backends.triton_ops()\n"
        "_backends.triton_ops = lambda: {op: file for op, file in real.items() if file == 'point_sample'}\n"
        "import rendseg.ops\n"
        "with rendseg.backend('triton'):\n"
        "    for call in (rendseg.ops.uncertainty, torch.ops.rendseg.uncertainty):\n"
        "        try:\n"
        "            call(torch.zeros(1, 2, 3, 4))\n"
        "        except RuntimeError as error:\n"
        "            print(error)\n"
        "    print(rendseg.ops.point_sample(torch.zeros(1, 1, 2, 2), torch.rand(1, 3, 2)).shape)\n"
        "print(rendseg.ops.uncertainty(torch.zeros(1, 2, 3, 4)).shape)\n"
    )
    lines = run(program, TRITON_INTERPRET="1").splitlines()
    words = 'backend "triton" has no kernel of uncertainty: none is written. Use set_backend("auto")'
    assert lines == [words, words, "torch.Size([1, 1, 3])", "torch.Size([1, 3, 4])"]


@pytest.mark.triton
def test_another_device_is_refused() -> None:
    program = (
        "import torch, rendseg, rendseg.ops\n"
        "rendseg.set_backend('triton')\n"
        "try:\n"
        "    rendseg.ops.point_sample(torch.zeros(1, 1, 2, 2, device='meta'), torch.rand(1, 3, 2, device='meta'))\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    out = run(program, TRITON_INTERPRET="1")
    assert 'backend "triton" has no kernel of point_sample for device meta' in out


@pytest.mark.triton
def test_doctor_says_who_serves_a_gpu() -> None:
    report = "from rendseg.doctor import report; print(report())"
    lines = {
        line.split()[0]: line.split() for line in run(report, **NO_EXTENSION).split("Operators")[1].splitlines()[2:20]
    }
    for op in OPS:
        if op in lines:
            assert lines[op][-1] == ("triton" if op in _backends.triton_ops() else "reference"), op
    without = run("import sys; sys.modules['triton'] = None\n" + report, **NO_EXTENSION)
    assert " triton\n" not in without.split("Operators")[1].split("\n\n")[0]
    chosen = run(report, RENDSEG_BACKEND="reference").split("Operators")[1].split("\n\n")[0]
    assert "cpp\n" not in chosen and "triton\n" not in chosen
