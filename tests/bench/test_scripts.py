"""The scripts in bench/: they import without what only the models need, and rehearse the rows of a GPU on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulation import build
from tests.limits import TIMEOUT

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, env=dict(os.environ)
    )


def without(*modules: str) -> str:
    """Python code after which the modules cannot be imported."""
    return f"import sys; sys.modules.update(dict.fromkeys({modules!r})); sys.path.insert(0, 'bench'); "


def test_they_import_without_pydantic_and_typer() -> None:
    done = run(
        "-c",
        without("pydantic", "typer")
        + "import encode, models, points, refine; models.build('encnet', 'test_resnet', True); print('imported')",
    )
    assert done.returncode == 0 and done.stdout.strip() == "imported", done.stderr


def test_the_one_of_the_models_says_what_is_missing() -> None:
    done = run("-c", without("timm") + "import runpy; runpy.run_path('bench/models.py', run_name='__main__')")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        done.stderr.strip().splitlines()[-1]
        == "bench/models.py: not run, the package timm is not installed, and the backbones are from it"
    )


@pytest.mark.slow
@pytest.mark.skipif(bool(build.missing()), reason=f"no emulation: {build.missing()}")
@pytest.mark.parametrize(
    "script, workload, rows",
    [
        ("refine", "W1", ["W1", "W1, bfloat16", "W1, torch.compile"]),
        ("points", "T2", ["T2 select 9x1x16x16, 100 points", "T2 select 9x1x16x16 bfloat16, 100 points",
                          "T2 sample forward", "T2 sample backward"]),
        ("encode", "Enc", [f"{what}, {n} images, {dtype}" for n in (16, 4) for dtype in ("bfloat16", "float32")
                           for what in ("forward", "forward + backward")]),
        ("masks", "M2", [f"M2 {what}"
                         for what in ("costs", "selection", "losses forward", "losses backward", "layer")]),
        ("criterion", "K2", [f"K2 {what}" for what in ("step", "matching", "losses", "backward")]),
    ],
)  # fmt: skip
def test_a_rehearsal(script: str, workload: str, rows: list[str], tmp_path: Path) -> None:
    """Every row of the quick run on a GPU, with the emulated CUDA kernels; each figure is marked as meaningless."""
    done = run(f"bench/{script}.py", "--rehearse", "--quick", "--only", workload, "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "REHEARSAL" in done.stdout
    written = json.loads((tmp_path / f"{script}-rehearsal-quick.json").read_text())
    assert written["rehearsal"] is True and written["complete"] and not written["failures"]
    assert list(dict.fromkeys(row["row"] for row in written["rows"])) == rows
    assert {"copy_gb_s", "gemm_bf16_gflops", "gemm_tf32_gflops", "l2_read_gb_s", "launch_us"} <= written[
        "ceilings"
    ].keys()
    lines = [json.loads(line) for line in (tmp_path / f"{script}-rows.jsonl").read_text().splitlines()]
    assert len(lines) == len(written["rows"]) and all(line["rehearsal"] is True for line in lines)
    timed = [line for line in done.stdout.splitlines() if " ms  [" in line]
    assert len(timed) == len(lines) and all("(rehearsal: meaningless)" in line for line in timed)
    ours = [line for line in lines if line["column"] == "rendseg"]
    assert ours and all(line["launches"] > 0 for line in ours), "emulated kernels ran"
    floors = script not in ("masks", "criterion")
    assert all(("percent_of_floor" in line) == floors and "ratio" in line for line in ours)
