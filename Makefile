# Everything runs in a virtual environment that the first command creates; only Python 3.11 is needed.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python -m
READY := $(VENV)/.ready

.PHONY: demo test check bench stress study clean

demo: $(READY)  ## sparse-train a network on handwritten digits
	$(VENV)/bin/python examples/digits.py

test: $(READY)  ## all tests, then the core once more without compilation
	$(RUN) pytest -n 2
	NUMBA_DISABLE_JIT=1 $(RUN) pytest -n 2 -m core

check: $(READY)  ## style and types
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy

bench: $(READY)  ## time every part of a sparse step beside its alternatives; writes docs/performance.md
	$(RUN) benchmarks.speed

stress: $(READY)  ## call from many threads and processes at once: no crash, no wrong bit
	$(RUN) benchmarks.stress

study: $(READY)  ## accuracy at 99 % zeros: ST-3 against its neighbours, five seeds
	$(RUN) benchmarks.accuracy

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'st3core needs Python 3.11 or newer, this is ' + sys.version"
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --constraint constraints.txt --editable '.[torch,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache docs/_build
