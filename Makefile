# make film PROMPT="a red ball moves left on a black background"
# make test | sanitize | bench | numbers | cuda | lint | format | clean
#
# Each target sets up what it needs in .venv first (once). Variables:
#   PYTHON       interpreter that makes .venv (>= 3.11)
#   CONSTRAINTS  pinned versions to install; constraints-torch2.11.txt is the older supported pair
#   TORCH_INDEX  extra package index for torch, e.g. https://download.pytorch.org/whl/cpu to avoid the CUDA libraries
#   OUTPUT       where the film goes        PYTEST_ARGS, BENCH_ARGS, RUNS  arguments for make test, make bench, make sanitize

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
TORCH_INDEX ?=
OUTPUT ?= film.mp4
PROMPT ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
RUNS ?=
CUDA_ARCHS ?= 80;90a;100a;120a

VENV := .venv
BIN := $(VENV)/bin
DEPS := $(VENV)/.deps-$(notdir $(CONSTRAINTS))
INSTALLED := $(VENV)/.installed
NATIVE := setup.py $(wildcard csrc/*.py csrc/*.h csrc/*.cpp csrc/*/*)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install -c $(CONSTRAINTS) $(addprefix --extra-index-url ,$(TORCH_INDEX))

SHELL := /bin/bash
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup film test sanitize bench numbers cuda lint format clean

# A prompt is free text: it reaches the shell through the environment, with quotes, $ and backquotes untouched.
override PROMPT := $(value PROMPT)
override OUTPUT := $(value OUTPUT)
export PROMPT OUTPUT

help:
	@sed -n '1,9s/^# \{0,1\}//p' Makefile

setup: $(INSTALLED)

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "pyvideo-kernels needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Use: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	  echo "$(PYTHON) has no ensurepip, which a virtual environment needs. On Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# torch and the build tools come first: the extension is compiled against the installed torch, without a build
# environment of its own (that would fetch torch a second time).
$(DEPS): $(VENV)/pyvenv.cfg $(CONSTRAINTS)
	@echo "Installing the packages pinned in $(CONSTRAINTS) (once, a few minutes)"
	@$(PIP) torch triton numpy setuptools wheel ninja pybind11
	@rm -f $(VENV)/.deps-*
	@touch $@

$(INSTALLED): $(DEPS) pyproject.toml MANIFEST.in $(NATIVE)
	@echo "Installing pyvideo-kernels in place and compiling csrc/"
	@$(PIP) --no-build-isolation -e '.[sampler,bench,dev]'
	@$(BIN)/python -c 'import json; info = json.load(open("pyvideo_kernels/_build_info.json")); \
	  info["native"] or print("Note: installed without the compiled extension:", info["why_not"])'
	@touch $@

film: $(INSTALLED)
	@if [ -z "$$PROMPT" ]; then \
	  echo 'Say what to show: make film PROMPT="a red ball moves left on a black background"' >&2; exit 2; fi
	@$(BIN)/pyvideo sample --output "$$OUTPUT" -- "$$PROMPT"

test: $(INSTALLED)
	@$(BIN)/python -m pytest -n auto --dist loadfile $(PYTEST_ARGS)

# The tests of the compiled CPU kernels under ASan, UBSan and TSan, and as older CPUs would run them;
# RUNS="thread x86-64-v3" for some.
sanitize: $(INSTALLED)
	@$(BIN)/python -m tests.build.sanitize $(RUNS)

bench: $(INSTALLED)
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

numbers: $(INSTALLED)
	@$(BIN)/python -m benchmarks.numbers

# Builds the CUDA kernels for the listed architectures, card or not; CUDA_ARCHS="90a" for one.
cuda: $(INSTALLED)
	@PYVIDEO_CUDA_ARCHS='$(CUDA_ARCHS)' $(PIP) --no-deps --no-build-isolation -e .
	@$(BIN)/python -c 'from pyvideo_kernels import _native as n; why = n.why_not("cuda"); \
	  print("CUDA kernels for", ", ".join(n.cuda_archs())) if not why else exit(why)'

lint: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run -Werror $$(find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')

format: $(INSTALLED)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $$(find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')

clean:
	rm -rf $(VENV) build dist *.egg-info pyvideo_kernels/_C*.so pyvideo_kernels/_build_info.json
