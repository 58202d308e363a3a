# Three commands for a stranger: make demo, make test, make test-all.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-all lint clean

demo: $(STAMP)  ## harvest, train, evaluate and report on embedded defaults (about 5 minutes on 2 cores)
	$(BIN)/python tools/demo.py

test: $(STAMP) lint  ## the fast tests
	$(BIN)/python -m pytest -q -m "not slow"

test-all: $(STAMP) lint  ## all tests, those that take minutes or their own environment included
	$(BIN)/python -m pytest -q --hypothesis-profile=default

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first and pinned: unpinned, it pulls gigabytes of CUDA on some indexes
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) demo-out build *.egg-info
