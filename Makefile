# make demo: everything from a bare machine to a report; make test: the tests. Both set up .venv first.
# make kernels: GPU kernels compiled for every shape and architecture, where make test takes one shape of each.
# make faults: annotation killed at 50 random instants instead of the tests' 8, and every other fault.
PYTHON ?= python3
BIN := .venv/bin
FAISS := $(if $(shell command -v nvidia-smi 2>/dev/null),gpu,cpu)

.PHONY: demo test kernels faults lint bench setup clean

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" python tools/demo.py

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

kernels: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m kernels

faults: setup
	OMP_NUM_THREADS=1 FAULT_KILLS=$(or $(KILLS),50) $(BIN)/python -m pytest tests/annotate/test_faults.py --durations 5

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: setup
	for bench in benchmarks/bench_*.py; do OMP_NUM_THREADS=1 $(BIN)/python $$bench || exit 1; done

setup: .venv/kernels

.venv/installed: pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --progress-bar on -e ".[$(FAISS),train,eval,demo,dev]"
	touch $@

.venv/kernels: .venv/installed $(wildcard csrc/*/*)
	$(BIN)/python setup.py build_ext --inplace
	touch $@

clean:
	rm -rf .venv build *.egg-info ldm_sg/ops/*.so
