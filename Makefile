# Everything runs in a virtual environment that the first command creates; only Python 3.11 is needed.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python -m
READY := $(VENV)/.ready

.PHONY: demo test test-keras check bench study clean

demo: $(READY)  ## sparse-train a network on handwritten digits; BACKEND=tensorflow, jax or torch: with Keras
ifdef BACKEND
	KERAS_BACKEND=$(BACKEND) $(VENV)/bin/python examples/digits_keras.py
else
	$(VENV)/bin/python examples/digits.py
endif

test: $(READY)  ## all tests, then the core once more without compilation
	$(RUN) pytest -n 2
	NUMBA_DISABLE_JIT=1 $(RUN) pytest -n 2 -m core
	$(MAKE) test-keras BACKEND=tensorflow
	$(MAKE) test-keras BACKEND=jax
	$(MAKE) test-keras BACKEND=torch

test-keras: $(READY)  ## the Keras adapter on one backend: BACKEND=tensorflow, jax or torch
	KERAS_BACKEND=$(or $(BACKEND),torch) $(RUN) pytest -n 2 tests/st3_keras tests/test_docs.py adapters/st3_keras

check: $(READY)  ## style and types
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy

bench: $(READY)  ## time the threshold search against its alternatives
	$(RUN) benchmarks.speed

study: $(READY)  ## accuracy at 99 % zeros: ST-3 against its neighbours, five seeds
	$(RUN) benchmarks.accuracy

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'st3core needs Python 3.11 or newer, this is ' + sys.version"
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --constraint constraints.txt --editable '.[torch,keras,dev]' tensorflow-cpu jax
	touch $@

clean:
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache docs/_build
