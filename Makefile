# make venv | demo | test | test-peers | fuzz | sanitize | bench | lint | format | docs | gpu-check | versions | clean
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

.PHONY: help venv demo test test-peers fuzz sanitize bench lint format docs gpu-check versions clean

help:
	@sed -n 1,2p Makefile

# --no-compile: Python compiles what it imports, which is a small part of the packages. It must keep the result: an import of
# torch takes twice as long without, and many tests start processes.
unexport PYTHONDONTWRITEBYTECODE
$(VENV)/.installed: pyproject.toml
	@test -x $(PY) || test -n "$(PYTHON)" || { echo "make: no Python 3.10 or later was found; set PYTHON=path"; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --no-compile --upgrade pip "setuptools>=77" wheel
	RENDSEG_NO_EXTENSION=1 RENDSEG_REQUIRE_EXTENSION=0 $(PY) -m pip install --no-compile --no-build-isolation -e ".[train,dev]"
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(BUILD_INPUTS)
	$(PY) setup.py build_ext --inplace
	@touch $@

venv: $(VENV)/.built

demo: venv
	$(PY) -m rendseg train configs/demo.yaml

test: venv
	$(PY) -m pytest tests/ --durations=30 $(if $(filter-out 0,$(WORKERS)),-n $(WORKERS) --dist worksteal) $(PYTEST_ARGS)

# Comparison with other projects, in an environment of its own on top of the first (mmsegmentation brings a package called
# tests, among others). Where they cannot be installed the tests are skipped.
PEERS := $(VENV)/peers
# Seconds for an installation.
PEERS_LIMIT ?= 900
PURELIB := import sysconfig; print(sysconfig.get_path('purelib'))
$(PEERS)/.installed: $(VENV)/.installed
	test -x $(PEERS)/bin/python || $(PY) -m venv $(PEERS)
	$(PY) -c "$(PURELIB)" > "$$($(PEERS)/bin/python -c "$(PURELIB)")/below.pth"
	timeout $(PEERS_LIMIT) $(PEERS)/bin/python -m pip install --no-compile $$($(PY) -c "import importlib.metadata as m; \
		print(*(r.split(';')[0].replace(' ', '') for r in m.requires('rendseg') if 'peers' in r.partition(';')[2]))") \
		&& timeout $(PEERS_LIMIT) $(PEERS)/bin/python -m pip install --no-compile --no-deps --force-reinstall \
		opencv-python-headless \
		&& touch $@ || echo "make: the other projects could not be installed; their tests are skipped"

test-peers: venv $(PEERS)/.installed
	timeout 900 $(PEERS)/bin/python -m pytest tests/peers -q $(PYTEST_ARGS)

# Drawn calls of every operator against the reference; FUZZ_ARGS="--seed 1234" repeats one.
fuzz: venv
	$(PY) -m tests.fuzz $(or $(FUZZ_ARGS),--calls 50000)

# The CPU extension under AddressSanitizer and UndefinedBehaviorSanitizer, in a copy in build/sanitize: fuzz and tests/ops;
# then the emulated CUDA kernels.
sanitize: venv
	$(PY) -m tests.sanitize $(SANITIZE_ARGS)

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

# What only a GPU can show, in stages that do not stop each other; docs/gpu.md tells how to read the summary at the end.
# STAGES="smoke tests" takes some of build smoke bench-quick tests triton sanitize bench, BUDGET=480 is the time in seconds
# for the whole, OUT the folder of the results; REHEARSE=1 tries it on a machine without a GPU.
# .venv where there is one, else the Python on PATH: a machine with a GPU may have its packages and no network.
GPU_PY ?= $(if $(wildcard $(PY)),$(PY),python3)
gpu-check: export STAGES := $(STAGES)
gpu-check: export BUDGET := $(BUDGET)
gpu-check: export OUT := $(OUT)
gpu-check: export REHEARSE := $(REHEARSE)
gpu-check:
	@$(GPU_PY) tests/gpu/check.py

# The table of docs/versions.md: an environment for each torch, in build/versions. ROWS="2.8 newest" does some of them.
versions: $(VENV)/.installed
	$(PY) tests/packaging/versions.py $(ROWS)

clean:
	rm -rf build dist cmake-build rendseg/*.so rendseg/_build_facts.py *.egg-info $(VENV)/.built
