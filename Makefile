# make venv | demo | test | bench | lint | format | docs | gpu-check | clean
# Everything runs in .venv, which the first target sets up; VENV=path uses another environment's folder.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV ?= .venv
# The first that runs and is new enough; PYTHON=path chooses another.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.10 python3.13; do \
	$$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
PY := $(abspath $(VENV))/bin/python
PYTEST_ARGS ?=
# Tests run in that many processes: one for each usable core. WORKERS=0 runs them in one, without pytest-xdist.
WORKERS ?= $(shell env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || echo 0)
BENCH_ARGS ?=
# Without a compiler the demo and the tests still run, on the pure-PyTorch reference; .ci/run sets this to 1.
export RENDSEG_REQUIRE_EXTENSION ?= 0
# The GPUs of this machine decide; on one without a GPU a single architecture keeps the build short.
ifndef TORCH_CUDA_ARCH_LIST
export TORCH_CUDA_ARCH_LIST := $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null \
	| grep -E '^[0-9]+\.[0-9]+$$' | sort -u | paste -sd ';' -),9.0)
endif

CPP_FILES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cuh csrc/*/*.cu examples/*/*.cpp \
	tests/emulation/*.h tests/emulation/*.cpp)
BUILD_INPUTS := setup.py rendseg/_toolchain.py $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cuh csrc/*/*.cu)

.PHONY: help venv demo test bench lint format docs gpu-check clean

help:
	@sed -n 1,2p Makefile

$(VENV)/.installed: pyproject.toml
	@test -x $(PY) || test -n "$(PYTHON)" || { echo "make: no Python 3.10 or later was found; set PYTHON=path"; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --upgrade pip "setuptools>=77" wheel
	$(PY) -m pip install "torch>=2.11" torchvision numpy ninja
	RENDSEG_NO_EXTENSION=1 RENDSEG_REQUIRE_EXTENSION=0 $(PY) -m pip install --no-build-isolation -e ".[train,dev]"
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(BUILD_INPUTS)
	$(PY) setup.py build_ext --inplace
	@touch $@

venv: $(VENV)/.built

demo: venv
	$(PY) -m rendseg train configs/demo.yaml

test: venv
	$(PY) -m pytest tests/ $(if $(filter-out 0,$(WORKERS)),-n $(WORKERS) --dist worksteal) $(PYTEST_ARGS)

bench: venv
	@for file in bench/[a-z]*.py; do echo "== $$file"; $(PY) $$file $(BENCH_ARGS) || exit 1; done

# The resource report needs the built kernels; it says so where there are none.
lint: $(VENV)/.built
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(abspath $(VENV))/bin/clang-format --dry-run --Werror $(CPP_FILES)
	$(PY) csrc/check_resources.py

format: $(VENV)/.installed
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(abspath $(VENV))/bin/clang-format -i $(CPP_FILES)

# The documentation as a site, in build/site; open index.html there. Fails on a broken link and on every file that a page would load
# from another server.
$(VENV)/.docs: $(VENV)/.installed
	RENDSEG_NO_EXTENSION=1 RENDSEG_REQUIRE_EXTENSION=0 $(PY) -m pip install --no-build-isolation -e ".[docs]"
	@touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# Everything that only a GPU can show: build, tests of the CUDA and of the Triton kernels, sanitizers, benchmarks (their JSON
# and plots go to OUT, by default bench/results/). Fails where there is no GPU.
SANITIZER := $(shell command -v compute-sanitizer || ls $${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer 2>/dev/null)
# Without torch's cache of memory each tensor has bounds of its own. initcheck must see every write, so it checks all kernels.
SANITIZE := PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --error-exitcode 1 --report-api-errors no
# .venv where there is one, else the Python on PATH: a machine with a GPU may have its packages and no network.
GPU_PY ?= $(if $(wildcard $(PY)),$(PY),python3)
gpu-check:
	RENDSEG_CUDA=1 RENDSEG_REQUIRE_EXTENSION=1 $(GPU_PY) setup.py build_ext --inplace
	@$(GPU_PY) -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "gpu-check: the CUDA extension is built, but \
	torch finds NO GPU on this machine: nothing was run, nothing was checked.")'
	$(GPU_PY) csrc/check_resources.py --table
	env -u TRITON_INTERPRET $(GPU_PY) -m pytest tests/ -m "gpu or triton" $(PYTEST_ARGS)
	@if test -n "$(SANITIZER)"; then set -ex; \
	  $(SANITIZE) --tool memcheck --kernel-name kns=rendseg $(GPU_PY) tests/gpu/sanitize.py; \
	  $(SANITIZE) --tool racecheck --kernel-name kns=rendseg $(GPU_PY) tests/gpu/sanitize.py; \
	  $(SANITIZE) --tool initcheck $(GPU_PY) tests/gpu/sanitize.py; \
	else echo "gpu-check: compute-sanitizer is NOT here (PATH, CUDA_HOME/bin): memory errors and races were not looked for"; fi
	@status=0; for file in bench/[a-z]*.py; do echo "== $$file"; \
	  env -u TRITON_INTERPRET $(GPU_PY) $$file --device cuda --output "$${OUT:-bench/results}" $(BENCH_ARGS) || status=1; \
	done; exit $$status

clean:
	rm -rf build dist cmake-build rendseg/*.so rendseg/_build_facts.py *.egg-info $(VENV)/.built
