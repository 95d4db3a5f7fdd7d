# Needs Python 3.11 or newer and make; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help env demo test lint figures bench clean

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

env: .venv/installed ## build .venv

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,vision,wandb]'
	touch $@

demo: env ## the main job on the embedded digits: nine optimizers, five seeds, a table and a figure
	$(BIN)/python run.py experiment=digits_shallow results=outputs/demo

test: env ## all tests
	$(BIN)/python -m pytest

lint: env ## ruff, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

figures: env ## redraw every figure and table from results/ alone
	$(BIN)/python -m scripts.figures

bench: env ## measure speed and memory into results/bench.csv (on an idle machine)
	$(BIN)/python -m scripts.bench
	$(BIN)/python -m scripts.bench_rivals

clean: ## remove .venv and caches, keep data/, results/ and outputs/
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
