# make demo: everything from a bare machine to a report; make test: the tests. Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
FAISS := $(if $(shell command -v nvidia-smi 2>/dev/null),gpu,cpu)

.PHONY: demo test lint bench setup clean

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" python tools/demo.py

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: setup
	for bench in benchmarks/bench_*.py; do OMP_NUM_THREADS=1 $(BIN)/python $$bench || exit 1; done

setup: .venv/installed

.venv/installed: pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --progress-bar on -e ".[$(FAISS),train,eval,demo,dev]"
	touch $@

clean:
	rm -rf .venv build *.egg-info
