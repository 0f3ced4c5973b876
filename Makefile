# Everything runs in a virtual environment that the first command creates; only Python 3.11 is needed.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python -m
READY := $(VENV)/.ready
KERAS := $(VENV)/.keras
MUTATION := $(VENV)/.mutation

.PHONY: demo test test-keras check docs bench conformance mutation stress study study-quick clean

ifndef BACKEND
demo: $(READY)
	$(VENV)/bin/python examples/digits.py
else ifeq ($(BACKEND),jax-native)
demo: $(KERAS)
	$(VENV)/bin/python examples/digits_jax.py
else
demo: $(KERAS)  ## sparse-train a network on handwritten digits; BACKEND=tensorflow, jax or torch: with Keras; jax-native: without
	KERAS_BACKEND=$(BACKEND) $(VENV)/bin/python examples/digits_keras.py
endif

test: $(KERAS)  ## all tests: the core and PyTorch, the core without compilation, then Keras on each of its backends
	$(RUN) pytest -n 2 --dist worksteal
	NUMBA_DISABLE_JIT=1 $(RUN) pytest -n 2 --dist worksteal -m core
	$(MAKE) test-keras BACKEND=tensorflow
	$(MAKE) test-keras BACKEND=jax
	$(MAKE) test-keras BACKEND=torch

test-keras: $(KERAS)  ## the Keras adapter on one backend: BACKEND=tensorflow, jax or torch
	KERAS_BACKEND=$(or $(BACKEND),torch) $(RUN) pytest -n 2 --dist worksteal tests/st3_keras adapters/st3_keras \
		tests/test_docs.py -k "st3_keras or keras.md or tfmot.md"

check: docs  ## style, types, and the documentation
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy

docs: $(KERAS)  ## the documentation as a site: docs/_build/html/index.html
	$(RUN) sphinx --fail-on-warning --keep-going --nitpicky --quiet docs docs/_build/html

bench: $(READY)  ## time every part of a sparse step beside its alternatives; writes docs/performance.md
	$(RUN) benchmarks.speed

conformance: $(KERAS)  ## hold every backend to the specification, and show that broken ones are rejected; writes docs/conformance.md
	$(RUN) benchmarks.conformance

mutation: $(MUTATION)  ## break the core in many small ways, and see whether its tests notice; writes docs/mutation.md
	nice $(RUN) benchmarks.mutation

stress: $(READY)  ## call from many threads and processes at once: no crash, no wrong bit
	$(RUN) benchmarks.stress

study: $(READY)  ## methods against sparsities on three tasks, five seeds; goes on where it was; writes docs/accuracy.md
	$(RUN) benchmarks.study
	$(RUN) benchmarks.accuracy
	$(RUN) benchmarks.accuracy_page

study-quick: $(READY)  ## a few steps of every method on every task: whether the study works
	$(RUN) benchmarks.study --quick --out $(VENV)/study-quick.jsonl

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'st3core needs Python 3.11 or newer, this is ' + sys.version"
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --constraint constraints.txt --editable '.[torch,trainers,dev]'
	touch $@

$(KERAS): $(READY)
	$(RUN) pip install --quiet --constraint constraints.txt --editable '.[keras,jax-libraries]' tensorflow-cpu
	touch $@

$(MUTATION): $(READY)
	$(RUN) pip install --quiet --constraint constraints.txt --editable '.[mutation]'
	touch $@

clean:
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache docs/_build
