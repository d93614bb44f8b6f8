# make demo   the main job: trains the tiny model on real digits, then answers questions about held-out ones
# make test   the tests
# Both make their own virtual environment (.venv) from a bare Python with a C++ compiler.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH ?= torch==2.13.0
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu) setup.py pyproject.toml

.PHONY: demo test test-slow lint format bench build wheel clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip

# torch first and by its exact version: a range could bring a CUDA build of several gigabytes.
$(VENV)/.torch: | $(BIN)/python
	$(BIN)/python -m pip install -q "$(TORCH)"
	touch $@

$(STAMP): $(SOURCES) | $(VENV)/.torch
	$(BIN)/python -m pip install -q -e ".[test]"
	touch $@

demo: $(STAMP)
	$(BIN)/gpt4v-fast demo

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

bench: $(STAMP)
	$(BIN)/gpt4v-fast bench

build: $(STAMP)

wheel: $(STAMP)
	$(BIN)/python -m build --wheel

$(VENV)/.lint: pyproject.toml | $(STAMP)
	$(BIN)/python -m pip install -q -e ".[lint]"
	touch $@

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)

clean:
	rm -rf $(VENV) build dist *.egg-info gpt4v_fast/*.so
