# Every target runs from .venv and first creates it, or brings it up to date, when it is missing or older than
# pyproject.toml. Another interpreter: make PYTHON=python3.12. Another package index: pip's own settings
# (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL or pip.conf), for example to get torch without CUDA.
PYTHON  ?= python3
WORKERS ?= 2

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format check-slow bench localbench-quick clean

help:
	@echo "make demo        compare end-to-end, checkpointing and GLCAN on the embedded digits (minutes, no network)"
	@echo "make test        lint, types, contracts and the quick tests"
	@echo "make lint        lint, types, import contracts, sizes of files and README alone"
	@echo "make format      let ruff rewrite what it can"
	@echo "make check-slow  the slow tests"
	@echo "make bench       the benchmarks, into benchmarks/results"
	@echo "make localbench-quick   every rule on every task, reduced to minutes, into runs/localbench-quick"
	@echo "make clean       remove caches and build outputs; .venv and runs stay"

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  "%s is Python %d.%d, but glcan needs 3.11 or newer: make PYTHON=python3.12" % (sys.executable, v[0], v[1]))'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[test]'
	@touch $@

install: $(STAMP)

demo: $(STAMP)
	rm -rf runs/demo
	$(BIN)/glcan compare --out runs/demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/check_sizes.py
	$(BIN)/python tools/check_readme.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One thread for each worker: the tests' tensors are small, and two workers with all threads each fight for the cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n $(WORKERS) --dist worksteal --durations 10

check-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow -n $(WORKERS) --dist worksteal --durations 10

localbench-quick: $(STAMP)
	$(BIN)/python benchmarks/localbench.py --quick --out runs/localbench-quick

bench: $(STAMP)
	$(BIN)/python benchmarks/isolation_overhead.py
	$(BIN)/python benchmarks/accuracy.py fashion_mnist_resnet32

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
