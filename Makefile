# `make help` lists the targets. Each makes its own virtual environment (.venv) from a bare Python with a C++ compiler.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH ?= torch==2.13.0
CPP := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')
SOURCES := $(filter csrc/%,$(CPP)) setup.py pyproject.toml

.PHONY: help demo test test-slow test-gpu sanitized test-sanitize test-sanitized lint types format bench build wheel \
	clean

help:
	@echo "make demo           train the tiny model on real digits, then ask it about held-out ones"
	@echo "make test           the tests"
	@echo "make test-slow      the longer sweeps"
	@echo "make test-gpu       the GPU kernels' tests, on a GPU"
	@echo "make test-sanitize  the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make bench          times the ops beside their peers"
	@echo "make build          an editable install with everything that demo and tests need"
	@echo "make wheel          a wheel in dist/"
	@echo "make lint           ruff, mypy, clang-format;  make format  mends what they can"
	@echo "make clean          removes the environment and what was built"

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

# Threads that wait asleep: where other programs share the cores, spinning ones made a step of the demo five times slower
# (3.1 s against 0.6 s at load 8 on 2 cores of an AMD EPYC, 2026-11-22).
demo test test-slow test-sanitized: export OMP_WAIT_POLICY = passive

demo: $(STAMP)
	$(BIN)/gpt4v-fast demo

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# Where there is a GPU: the Triton tests on it instead of in the interpreter, and the ops on its tensors.
test-gpu: export GPT4V_FAST_TEST_DEVICE = cuda
test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" tests/test_gpu.py tests/*/test_triton_*.py

# The kernels again, built with AddressSanitizer and UndefinedBehaviorSanitizer, in a package of their own.
SANITIZED := build/sanitized
test-sanitize: sanitized
	$(MAKE) test-sanitized

sanitized: $(STAMP)
	rm -rf $(SANITIZED)
	GPT4V_FAST_SANITIZE=address,undefined GPT4V_FAST_CUDA=0 \
		$(BIN)/python -m pip install -q --no-deps --no-build-isolation --target $(SANITIZED) .

test-sanitized:
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 \
		PYTHONPATH=$(SANITIZED) $(BIN)/pytest -q -m "not slow" -k "not compile and not gradcheck" --timeout=900 \
		$(addprefix tests/native/test_,native.py plain_calls.py wide_integers.py) \
		$(addprefix tests/attention/test_attention,.py _varlen.py _kvcache.py _kvcache_refusals.py) \
		$(addprefix tests/loss/test_,cross_entropy.py linear_cross_entropy.py linear_cross_entropy_gradients.py \
			kept_logits.py inplace_backward.py) \
		tests/patch_embed/test_patch_embed.py

bench: $(STAMP)
	$(BIN)/gpt4v-fast bench

build: $(STAMP)

wheel: $(STAMP)
	$(BIN)/python -m build --wheel

$(VENV)/.lint: pyproject.toml | $(STAMP)
	$(BIN)/python -m pip install -q --group lint
	touch $@

lint: $(VENV)/.lint types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)

# Laid out as in a wheel, with kernels/ and benchmarks/ inside gpt4v_fast; and calls as users write them.
types: $(VENV)/.lint
	rm -rf build/typed
	$(BIN)/python setup.py -q build_py --build-lib build/typed
	cp tests/package/typed_calls.py build/typed
	cd build/typed && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache \
		-p gpt4v_fast -m typed_calls

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf $(VENV) build dist *.egg-info gpt4v_fast/*.so
