# `make demo` and `make test` each set everything up on a machine with Python >= 3.10, a C++ compiler and make.
# They use the active environment (virtualenv or conda), else they create .venv here.

TORCH ?= torch==2.13.0
PYTHON ?= python3
ARGS ?=
DEVICE ?= cpu
WORKERS ?= 2
GPU_WORKERS ?= auto

ENV := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX),$(CURDIR)/.venv)
BIN := $(ENV)/bin
PY := $(BIN)/python
# In the environment, so that it goes when the environment goes; named after this folder, so that two checkouts can share one.
READY := $(ENV)/.pyml-ready-$(shell echo '$(CURDIR)' | cksum | cut -d' ' -f1)
SOURCES := $(shell find csrc tools -type f) setup.py pyproject.toml
CXX_SOURCES := $(shell find csrc tests/cpp -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu')

# A file of tests stays with one worker: its fixtures train a model or build a library once. The order is that of conftest.py.
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 20

# GPU machines come with their own torch, often in the system's Python: nothing there is installed or replaced.
GPU_PY := $(if $(wildcard $(PY)),$(PY),$(PYTHON))

.PHONY: demo test test-full lint format bench sanitize fuzz verify cmake gpu-build gpu-test gpu-bench clean help

help: ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

demo: $(READY) ## train SpectralKAN on a generated image pair, draw the change map, print what the kernels gain
	$(BIN)/pyml demo $(ARGS)

test: $(READY) ## every test for this machine but those marked full, which `make test-full` runs, and what needs a GPU
	$(PY) -m pytest tests $(PARALLEL) $(ARGS)

test-full: $(READY) lint sanitize ## what `make test` leaves out: every GPU target, clean-environment installs, sanitizers
	$(PY) -m pytest tests --full -m full $(PARALLEL) $(ARGS)

lint: $(READY) ## ruff, clang-format, mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(PY) -m mypy

format: $(READY) ## rewrite the sources as `make lint` wants them
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: $(READY) ## benchmarks on this machine; ARGS="bspline --quick" narrows them
	$(BIN)/pyml bench $(ARGS)

verify: ## run every usable kernel once against the reference and note it; DEVICE=cuda for a GPU
	$(GPU_PY) -m pyml.testing.verify --device $(DEVICE) $(ARGS)

fuzz: $(READY) ## random arguments for the public ops, for minutes
	$(PY) -m pytest tests/test_fuzz.py --hypothesis-profile fuzz $(ARGS)

cmake: $(READY) cmake-tool ## C++ build with compile_commands.json, and the C++ tests
	PATH="$(BIN):$$PATH" && cmake --preset release -DPython_EXECUTABLE=$(PY) && cmake --build --preset release && ctest --preset release -j $(WORKERS)

sanitize: $(READY) cmake-tool ## the C++ kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer
	PATH="$(BIN):$$PATH" && cmake --preset sanitize && cmake --build --preset sanitize && ctest --preset sanitize -j $(WORKERS)

gpu-build: ## build against the torch that is there; installs nothing else, needs no network
	$(GPU_PY) -m pip install --no-build-isolation --no-deps -e .

# Triton compiles some 2000 variants, about a second of a core each, and runs each for microseconds: so tests share the
# GPU, also those of one file, and there are as many at once as cores.
gpu-test: ## every test that runs on a GPU
	TORCHINDUCTOR_COMPILE_THREADS=1 $(GPU_PY) -m pytest tests --device cuda --durations 20 \
	  $$($(GPU_PY) -c 'import xdist' 2>/dev/null && echo --numprocesses $(GPU_WORKERS) --maxprocesses 16 --dist worksteal) $(ARGS)

gpu-bench: ## benchmarks on the GPU into $(OUT), by default benchmarks/results/<gpu>
	$(GPU_PY) -m pyml.benchmarks --device cuda --dtype float32,bfloat16 --budget 500 $(ARGS) --out "$${OUT:-benchmarks/results/$$($(GPU_PY) -c \
	  'import re, torch; print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))')}"

clean: ## remove what was built, not the environment
	rm -rf build dist *.egg-info pyml/*.so pyml/_built.json $(READY)

# --- setting up --------------------------------------------------------------------------------------------------------

.PHONY: cmake-tool
cmake-tool: $(READY)
	@PATH="$(BIN):$$PATH"; command -v cmake >/dev/null && command -v ninja >/dev/null || $(PY) -m pip install cmake ninja

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "pyml needs Python 3.10 or newer; set PYTHON=" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))' || \
	  { echo "pyml needs the headers of Python (Python.h): install python3-dev" >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { echo "pyml needs a C++ compiler (g++ or clang++)" >&2; exit 1; }
	$(PYTHON) -m venv $(ENV)

# Also rebuilt when another torch was installed: an extension fits only the torch it was built with.
$(READY): $(SOURCES) $(wildcard $(ENV)/lib/python3*/site-packages/torch/version.py) | $(PY)
	$(PY) -c 'import sys, importlib.util as u; sys.exit(u.find_spec("torch") is None)' || $(PY) -m pip install "$(TORCH)"
	$(PY) -m pip install -e '.[test]'
	@touch $@
