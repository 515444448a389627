# The project's verbs; `make` alone lists them. Each installs what it needs, and is fast the second time.
#
# PYTHON  the interpreter to make the environment from
# VENV    the environment's folder. Empty: the environment of PYTHON, as it is; only the package
#         itself is installed there, without its dependencies and without network
#
# VITKD_FAST_CUDA, TORCH_CUDA_ARCH_LIST, MAX_JOBS and CI reach the build (see setup.py); `make -B
# install` builds again after a change of them. Unset, `install` compiles CUDA for the GPUs of this
# machine, or for 9.0+PTX without one, and `wheel` for all.

PYTHON ?= python3
VENV ?= .venv

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
BIN := $(shell $(PYTHON) -c "import sysconfig; print(sysconfig.get_path('scripts'))")
STAMP := build/installed
PACKAGE := --no-deps -e .
else
PY := $(VENV)/bin/python
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
PACKAGE := -e .[dev]
endif

# processes that share the files of tests out, where pytest-xdist is
JOBS ?= 2
PARALLEL = $(shell $(PY) -c "import xdist" 2>/dev/null && echo "-n $(JOBS) --dist loadfile --no-loadscope-reorder")

OLDEST := .venv-oldest
# what test-triton runs with, from the one of torch 2.11 on, and which of the tests
TRITONS ?= 3.6 3.7 3.8 3.9
TRITON_TESTS ?= triton
CXX_SOURCES = $(shell find csrc cmake examples tests -name '*.h' -o -name '*.c' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu*')

# Debian's, for the targets that end in -arm
ARM_TOOLS := g++-aarch64-linux-gnu qemu-user

.PHONY: help install demo test test-all test-arm test-executorch test-oldest test-triton fuzz wheel wheel-arm \
  bench bench-arm arm-tools gpu gpu-test gpu-bench gpu-sanitize docs lint format clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

install: $(STAMP)  ## environment, dependencies, both extensions (CUDA too where there is a toolkit)

demo: install  ## real work, and what it did
	$(BIN)/vitkd demo

# threads of several processes on the same cores wait for one another
test test-all test-arm test-triton: export OMP_NUM_THREADS ?= 1

test: install  ## the tests for every day
	$(BIN)/pytest $(PARALLEL) -m "not slow"

test-all: export VITKD_SAMPLE_SLOW_PATHS ?= 1
test-all: install  ## every test
	$(BIN)/pytest $(PARALLEL)

test-arm: install arm-tools  ## the int8 engine on ARM CPUs that QEMU emulates; of it `test` has the quick part
	$(BIN)/pytest $(PARALLEL) tests/arm

# without them the tests are skipped, and say so
arm-tools:
	@dpkg -s $(ARM_TOOLS) >/dev/null 2>&1 || { apt-get update -qq && \
	  apt-get install -qq --yes --no-install-recommends $(ARM_TOOLS) >/dev/null; } || \
	  echo "make: cannot be installed: $(ARM_TOOLS)"

# the wheel, not the checkout: run from a folder outside it, so that nothing else can be imported
test-oldest: wheel $(OLDEST)/ready  ## the wheel, built with the newest torch, in torch 2.11
	$(OLDEST)/bin/pip install --quiet --no-deps --force-reinstall dist/*.whl
	$(OLDEST)/bin/pip check
	cd $(OLDEST) && bin/vitkd show
	cd $(OLDEST) && bin/pytest -m "not slow" -c ../pyproject.toml $(addprefix ../,$(wildcard tests/ops/test_kd*.py))

# ExecuTorch is built for one torch, and brings much else
test-executorch: wheel .venv-executorch/ready  ## exported programs, by XNNPACK in ExecuTorch
	.venv-executorch/bin/pip install --quiet --no-deps --force-reinstall dist/*.whl
	cd .venv-executorch && bin/pytest -c ../pyproject.toml ../tests/int8/test_export_executorch.py

test-triton: $(TRITONS:%=test-triton-%)  ## the Triton tests with every Triton from 3.6 to 3.9

# Triton alone is another one, found before the installed one: torch and the rest serve all versions
WITH_TRITON = PYTHONPATH="$(CURDIR)/.venv-triton-$*$(PYTHONPATH:%=:%)"

.PHONY: $(TRITONS:%=test-triton-%)
$(TRITONS:%=test-triton-%): test-triton-%: .venv-triton-%/ready
	@$(WITH_TRITON) $(PY) -c "import triton; assert triton.__version__.startswith('$*.'), triton"
	@echo "make test-triton: Triton $*"
	@$(WITH_TRITON) $(BIN)/pytest $(PARALLEL) tests/ops -m "$(TRITON_TESTS)" || \
	  { echo "make test-triton: tests fail with Triton $*" >&2; exit 1; }

fuzz: install  ## damaged int8 files and graphs, through Python and C, under both sanitizers
	$(PY) tests/int8/fuzz.py --files 10000 --sanitize

# manylinux but for torch's libraries and CUDA's, which the installed torch brings; `auditwheel show`
# cannot be told so, and calls a wheel with _C linux
wheel: export PATH := $(BIN):$(PATH)
wheel: install  ## dist/*.whl, for every GPU; both extensions, of which _int8 needs no torch
	rm -rf dist build/lib* build/bdist* build/wheel
	$(PY) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	auditwheel repair --exclude "libtorch*" --exclude "libc10*" --exclude "libcudart*" \
	  --wheel-dir dist build/wheel/*.whl
	@ls dist

wheel-arm: export PATH := $(BIN):$(PATH)
wheel-arm: install arm-tools  ## the same for aarch64, by a cross compiler: _int8 alone, for Debian's Python
	wheel=$$($(PY) tests/support/arm_tools.py) && auditwheel repair --wheel-dir dist $$wheel
	@ls dist

bench: install  ## the CPU benches, and the documentation's tables and plot from them
	for bench in benches/bench_*.py; do stem=$${bench#benches/bench_}; \
	  $(BIN)/pytest $$bench -m "not gpu" --benchmark-json=benches/results/cpu-$${stem%.py}.json || exit 1; \
	done
	$(PY) benches/tables.py
	$(PY) benches/bench_attention_map.py

bench-arm: ARM_TOOLS += llvm-19
bench-arm: install arm-tools  ## instructions and predicted cycles on ARM, beside LiteRT: no times
	PYTHONPATH=tests $(PY) benches/arm_counts.py
	$(PY) benches/tables.py

gpu gpu-test gpu-bench gpu-sanitize: export VITKD_FAST_CUDA ?= 1
gpu gpu-test gpu-bench gpu-sanitize: export TORCH_CUDA_ARCH_LIST ?= 9.0
gpu gpu-test gpu-bench gpu-sanitize: export PIP_BREAK_SYSTEM_PACKAGES ?= 1

gpu:  ## build, GPU tests, GPU benches: 12 minutes, results in OUT or build/gpu; VENV= PYTHON=python3 where torch is
	$(PYTHON) benches/gpu_run.py --python $(PY) --scripts $(BIN) --build "$(MAKE) install"

gpu-test: install  ## the GPU tests alone
	@$(PY) -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'make gpu: torch sees no GPU')"
	$(BIN)/pytest -m gpu

gpu-bench: install  ## the GPU benches alone: benches/results/h200.json, or another GPU's
	gpu=$$($(PY) -c "import torch; print(torch.cuda.get_device_name().lower().removeprefix('nvidia ').replace(' ', '-'))") && \
	  $(BIN)/pytest benches -m gpu --benchmark-json=benches/results/$$gpu.json

gpu-sanitize: export PATH := $(PATH):/usr/local/cuda/bin
gpu-sanitize: export PYTORCH_NO_CUDA_MEMORY_CACHING := 1
gpu-sanitize: install  ## compute-sanitizer over the GPU tests made for it
	@command -v compute-sanitizer >/dev/null || \
	  { echo "make gpu-sanitize: unavailable: no compute-sanitizer on PATH" >&2; exit 1; }
	@compute-sanitizer --error-exitcode 1 $(PY) -c "import torch; torch.ones(1, device='cuda')" || \
	  { echo "make gpu-sanitize: unavailable: compute-sanitizer does not run on this GPU" >&2; exit 1; }
	for tool in memcheck racecheck initcheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 1 $(BIN)/pytest -m "sanitized and gpu" || exit 1; \
	done

# the package is there already: pip adds what the extra names
docs: install  ## the documentation: build/site/index.html
	@$(PY) -c "import mkdocs, material, mkdocstrings" 2>/dev/null || \
	  $(PY) -m pip install --quiet "vitkd-fast[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

lint: install  ## what CI checks before the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/mypy

format: install  ## what can be put right without thought
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

clean:  ## everything made here but the environments
	rm -rf build dist *.egg-info vitkd_fast/*.so .pytest_cache .mypy_cache .ruff_cache .benchmarks $(STAMP)

# a folder is newer than this when a file was added or removed in it
$(STAMP): setup.py pyproject.toml $(shell find csrc)
	@command -v $${CXX:-g++} >/dev/null || \
	  { echo "make: no C++ compiler ($${CXX:-g++}): apt-get install g++" >&2; exit 1; }
	@$(PYTHON) -c "import os, sysconfig; open(os.path.join(sysconfig.get_path('include'), 'Python.h'))" \
	  2>/dev/null || { echo "make: $(PYTHON) has no headers: apt-get install python3-dev" >&2; exit 1; }
ifneq ($(strip $(VENV)),)
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || { rm -f $(PY); \
	  echo "make: $(PYTHON) cannot make an environment: apt-get install python3-venv" >&2; exit 1; }
	$(PY) -m pip install --quiet "setuptools>=77" "pybind11>=3" ninja "torch>=2.11"
endif
	@mkdir -p build
	@echo "building and installing (log: build/install.log)"
	@$(PY) -m pip install --no-build-isolation --verbose $(PACKAGE) >build/install.log 2>&1 || \
	  { tail -n 60 build/install.log; exit 1; }
	@grep "vitkd_fast: " build/install.log
	@touch $@

$(OLDEST)/ready:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet "torch==2.11.*" numpy pillow typer pytest
	@touch $@

.venv-executorch/ready:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet "executorch==1.5.*" "torch>=2.14" numpy pillow typer timm pytest
	@touch $@

.venv-triton-%/ready: | $(STAMP)
	rm -rf $(@D)
	$(PY) -m pip install --quiet --no-deps --target $(@D) "triton==$*.*" || \
	  { echo "make test-triton: pip finds no Triton $* for this machine" >&2; exit 1; }
	@touch $@
