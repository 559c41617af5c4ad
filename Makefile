# `make train` and `make test` do all the set-up on a fresh machine: they make .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test lint suite learn clean

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

train: .venv/.installed
	$(BIN)/torchrl-chat train $(ARGS)

test: lint suite learn

lint: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Two workers: the machine of the continuous integration has two cores.
suite: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup --ignore=tests/test_learning.py

# GRPO on the built-in task, three seeds, two at a time: about five minutes.
learn: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 tests/test_learning.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
