# make train      both stages on real images, to a table and pictures in runs/
# make test       lint, C++ tests, Python tests
# make bench      speed of the kernels, beside what a user would pick instead
# make lint       ruff, mypy, clang-format
# make reproduce  the README's tables: every method, every picture tested once
# make sanitize   the C++ tests under AddressSanitizer and UBSan
# make simulate   every CUDA kernel, dtype and shape in a simulator (ptxsim), to docs/simulated.md; no GPU needed
# make gpu        tests, compute-sanitizer and benchmarks on this machine's GPU, to a report
#
# Each sets up what it needs in .venv first, and does nothing that is done already.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# By its whole name, since what is built is built in other folders; in quotes, since there may be spaces in it.
WITH_BIN = PATH="$(CURDIR)/$(BIN):$$PATH"
# pip's own chatter about indexes and versions is noise here
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Most of ten thousand modules are never imported: those that are get compiled then, once, whatever the shell has.
INSTALL = $(PIP) install --no-compile
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup train reproduce test cpp-tests lint style bench sanitize simulate gpu cuda clean
.PHONY: check-tools check-simulator check-gpu

help:
	@sed -n '1,10s/^# \{0,1\}//p' Makefile

# --- set-up -------------------------------------------------------------------------------------------------

CORE_SOURCES := $(wildcard csrc/core/* csrc/binding/*)

check-tools:
	@command -v $(PYTHON) >/dev/null || { echo "wscl_fast: $(PYTHON) is missing: apt install python3 python3-venv python3-dev"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "wscl_fast: Python 3.10 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1): apt install python3, or make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "wscl_fast: Python's venv module is missing: apt install python3-venv"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || { echo "wscl_fast: Python's headers are missing: apt install python3-dev"; exit 1; }
	@command -v $${CXX:-g++} >/dev/null || { echo "wscl_fast: a C++17 compiler is missing: apt install g++"; exit 1; }
	@echo 'int main() { if constexpr (true) return 0; }' | $${CXX:-g++} -std=c++17 -x c++ -fsyntax-only - 2>/dev/null || { echo "wscl_fast: $${CXX:-g++} does not understand C++17: apt install g++"; exit 1; }

# A folder that was left half-made has no stamp, and is made again.
$(VENV)/.created: | check-tools
	@echo "wscl_fast: creating $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# What the build needs. torch comes first and alone, so that nothing can draw in another build of it.
$(VENV)/.installed: $(VENV)/.created constraints.txt pyproject.toml
	@echo "wscl_fast: installing PyTorch"
	@$(INSTALL) --constraint constraints.txt torch numpy
	@$(INSTALL) --constraint constraints.txt setuptools wheel pybind11 ninja
	@touch $@

# The trainer's extra as pyproject.toml names it.
$(VENV)/.trainer: $(VENV)/.installed
	@echo "wscl_fast: installing what the trainer needs"
	@$(INSTALL) --constraint constraints.txt $$($(BIN)/python tools/requirements.py train)
	@touch $@

# What whoever trains does not wait for.
$(VENV)/.tools: $(VENV)/.trainer
	@echo "wscl_fast: installing the tools"
	@$(INSTALL) --constraint constraints.txt $$($(BIN)/python tools/requirements.py test lint)
	@touch $@

$(VENV)/.built: $(VENV)/.installed setup.py $(CORE_SOURCES)
	@echo "wscl_fast: building the extension"
	@$(WITH_BIN) $(PIP) install --no-build-isolation --no-deps --editable .
	@$(BIN)/python -c 'import wscl_fast; print(wscl_fast.build_info())'
	@touch $@

# Two at a time: what is installed waits for the disk and one core while the compiler has the others.
TOGETHER = $(MAKE) --silent --no-print-directory --jobs=2

setup:
	@$(TOGETHER) $(VENV)/.built $(VENV)/.tools

# What the benchmarks compare with lives in an environment of its own, which sees torch and wscl_fast in .venv
# and never changes it. Without it the comparison is with plain PyTorch alone.
PEERS := .venv-peers

$(PEERS)/.installed: $(VENV)/.built benchmarks/requirements-peers.txt
	@echo "wscl_fast: installing the peers into $(PEERS)"
	@$(PYTHON) -m venv --clear $(PEERS)
	@{ echo "$(CURDIR)"; $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; } \
	  >"$$($(PEERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/wscl_fast.pth"
	@$(PEERS)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps \
	  --requirement benchmarks/requirements-peers.txt && touch $@ || echo "wscl_fast: the peers could not be installed"

# --- the verbs ----------------------------------------------------------------------------------------------

train:
	@$(TOGETHER) $(VENV)/.built $(VENV)/.trainer
	@$(BIN)/wscl-fast compare

reproduce:
	@$(TOGETHER) $(VENV)/.built $(VENV)/.trainer
	@$(BIN)/python -m benchmarks.folds reproduce --recipe reproduce

# What needs one core at a time goes beside what the compiler leaves idle. Files of tests run side by side; threads
# that wait leave the cores to the others.
test: setup
	@$(TOGETHER) style cpp-tests cuda
	@OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

cpp-tests: build/linked/.built
	@build/linked/test_infonce
	@build/linked/test_pairs
	@build/linked/test_tags

lint: setup
	@$(MAKE) --no-print-directory style

style:
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*/*.h csrc/*/*.cpp tests/cpp/*.cpp csrc/core/*.cu csrc/core/*.cuh tests/cuda/*.cu)

bench: setup $(PEERS)/.installed
	@$(BIN)/python -m benchmarks.bench_infonce
	@$(BIN)/python -m benchmarks.bench_memory
	@$(PEERS)/bin/python -m benchmarks.peers_infonce
	@$(PEERS)/bin/python -m benchmarks.bench_kmeans
	@$(BIN)/python -m benchmarks.bench_ring

# cmake comes from the system where it is there, else into .venv.
CMAKE = $$($(WITH_BIN) command -v cmake || { $(PIP) install cmake >&2 && echo $(BIN)/cmake; })

build/%/.built: $(VENV)/.installed CMakeLists.txt CMakePresets.json $(CORE_SOURCES) $(wildcard tests/cpp/* tests/cuda/*.cu)
	@echo "wscl_fast: building by CMake ($*)"
	@mkdir -p build; cmake=$(CMAKE); export $(WITH_BIN); \
	  $$cmake --preset $* >build/cmake-$*.log 2>&1 || $$cmake --preset $* && \
	  $$cmake --build --preset $* >/dev/null || $$cmake --build --preset $*
	@touch $@

# The C++ tests with the extension's own objects, where setup.py keeps them: the core is compiled once. They lie in a
# folder of their own, since a build by the preset has to compile what changed.
build/linked/.built: $(VENV)/.built CMakeLists.txt CMakePresets.json $(CORE_SOURCES) $(wildcard tests/cpp/*)
	@echo "wscl_fast: linking the C++ tests"
	@cmake=$(CMAKE); export $(WITH_BIN); log=build/cmake-linked.log; \
	  objects="$(CURDIR)/build/objects.$$(python -c 'import sysconfig; print(sysconfig.get_config_var("SOABI"))')"; \
	  test -d "$$objects" || { rm $(VENV)/.built; $(MAKE) --no-print-directory $(VENV)/.built; } && \
	  { $$cmake --preset release -B build/linked -DWSCL_CORE_OBJECTS="$$objects" && \
	    $$cmake --build build/linked; } >$$log 2>&1 || { cat $$log; exit 1; }
	@touch $@

sanitize: build/sanitize/.built
	@build/sanitize/test_infonce
	@build/sanitize/test_pairs
	@build/sanitize/test_tags

# The CUDA kernels for one architecture where nvcc is, once: as the simulator runs them where it is, else alone. They
# compile, and ptxas's log says what each needs (tests/cuda/resources.py). Built as a whole, so that the log has
# every kernel.
CUDA_ARCH ?= 80
SIMULATED := $(wildcard $(or $(PTXSIM_PATH),../shared)/ptxsim/__init__.py)

cuda: check-tools
	@if command -v nvcc >/dev/null; then $(MAKE) --no-print-directory build/$(if $(SIMULATED),simulator,cuda)/.built; \
	  else echo "wscl_fast: CUDA kernels are neither compiled nor simulated: nvcc is not on PATH"; fi

CUDA_INPUTS := $(wildcard csrc/core/*.cu csrc/core/*.cuh csrc/core/*_cuda.h)
# $(1): the build's folder in build/; $(2): the preset and its settings; $(3): the target
compile_cuda = rm -rf build/$(1); mkdir -p build/$(1); cmake=$(CMAKE); export $(WITH_BIN); \
  log=build/$(1)/ptxas.log; \
  { $$cmake -B build/$(1) --preset $(2) && $$cmake --build build/$(1) --target $(3); } >$$log 2>&1 || \
    { cat $$log; exit 1; }

build/simulator/.built: $(VENV)/.installed CMakeLists.txt CMakePresets.json $(CUDA_INPUTS) $(wildcard tests/cuda/*.cu)
	@echo "wscl_fast: compiling the CUDA kernels (sm_90) and linking them with the simulator"
	@$(call compile_cuda,simulator,simulator,wscl_simulated)
	@touch $@

build/cuda/.built: $(VENV)/.installed CMakeLists.txt CMakePresets.json $(CUDA_INPUTS)
	@echo "wscl_fast: compiling the CUDA kernels (sm_$(CUDA_ARCH))"
	@$(call compile_cuda,cuda,cuda -DWSCL_CUDA_ARCHITECTURES=$(CUDA_ARCH)-real,wscl_core_cuda)
	@touch $@

# For every architecture that the extension is built for, one after the other: minutes each. Cut it off and go on
# as you like.
.PHONY: cuda-all
cuda-all: build/cuda/.built $(patsubst %,build/cuda-all/%/.built,$(filter-out $(CUDA_ARCH),80 86 89 90 100 120))
build/cuda-all/%/.built: $(VENV)/.installed CMakeLists.txt CMakePresets.json $(CUDA_INPUTS)
	@echo "wscl_fast: compiling the CUDA kernels (sm_$*)"
	@$(call compile_cuda,cuda-all/$*,cuda -DWSCL_CUDA_ARCHITECTURES=$*-real,wscl_core_cuda)
	@touch $@

# Nothing is set up or compiled, minutes each, for what cannot run here.
check-simulator:
	@command -v $${PTXSIM_NVCC:-nvcc} >/dev/null || { echo "wscl_fast: nvcc is not on PATH: the CUDA kernels cannot be compiled"; exit 1; }
	@test -n "$(SIMULATED)" || { echo "wscl_fast: no ptxsim in $(or $(PTXSIM_PATH),../shared): set PTXSIM_PATH to the folder that contains it"; exit 1; }

# Either is there where a GPU may be; what PyTorch finds is asked once it is installed.
check-gpu:
	@command -v nvidia-smi >/dev/null || test -n "$$(ls /dev/nvidia* /dev/dxg 2>/dev/null)" || { echo "wscl_fast: no NVIDIA GPU here: neither nvidia-smi nor /dev/nvidia*"; exit 1; }

# What was simulated already is not simulated again: cut it off and go on as you like.
simulate: check-simulator setup cuda build/cuda/.built
	@$(BIN)/python tests/cuda/matrix.py
	@WSCL_SIMULATE=all $(BIN)/python -m pytest tests/cuda -m simulated
	@$(BIN)/python tests/cuda/tables.py

# The extension is built for the GPU that is here alone, where nothing else is asked for.
gpu: export TORCH_CUDA_ARCH_LIST ?= $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader --id=0 2>/dev/null)
gpu: check-gpu setup
	@$(BIN)/python -m benchmarks.gpu_report --check
	@$(MAKE) --no-print-directory $(PEERS)/.gpu
	@$(PEERS)/bin/python -m benchmarks.gpu_report

$(PEERS)/.gpu: $(PEERS)/.installed benchmarks/requirements-gpu.txt
	@$(PEERS)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps \
	  --requirement benchmarks/requirements-gpu.txt && touch $@ || echo "wscl_fast: some peers could not be installed"

clean:
	rm -rf build dist *.egg-info wscl_fast/*.so $(VENV)/.built
