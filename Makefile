# Needs Python 3.11, 3.12 or 3.13 and make; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := suite,dev,vision,wandb,notebooks,report,sweeps,docs

.DEFAULT_GOAL := help
.PHONY: help env demo test test-long test-lowest lint docs figures results-page html reproduce reproduce-gpu bench gpu-check clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

env: .venv/installed ## build .venv

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "Python 3.11, 3.12 or 3.13 is needed (Hydra 1.3 does not start on 3.14): make PYTHON=python3.13")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

demo: env ## the main job on the embedded digits: nine optimizers, five seeds, a table and a figure
	$(BIN)/python run.py experiment=digits_shallow

test test-long: export PYTHONDONTWRITEBYTECODE := # to compile the tests' modules takes 8 s in each process

test: env ## all tests but those of test-long
	$(BIN)/python -m pytest

test-long: env ## the tests that are long by nature, before a release
	$(BIN)/python -m pytest -m long

test-lowest: ## make test with the lowest versions that pyproject.toml allows, in outputs/lowest, before a release
	$(PYTHON) -m venv outputs/lowest
	outputs/lowest/bin/python -m pip install --quiet uv
	outputs/lowest/bin/uv pip install --quiet --python outputs/lowest --resolution lowest-direct --editable '.[$(EXTRAS)]'
	outputs/lowest/bin/python -m pytest

lint: env ## ruff, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: env ## build README, docs/ and the library's reference as a site, outputs/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

figures: env ## redraw every figure and the tables of README and docs/ from results/ alone
	$(BIN)/python -m scripts.figures
	$(BIN)/python -m scripts.benchmarks.performance_page

results-page: env ## write results/README.md, the paper's numbers beside ours, from results/ alone
	$(BIN)/python -m scripts.results_page

html: env ## write outputs/report-results.html, a page of all runs to look through (STORE=outputs: report-outputs.html)
	$(BIN)/python -m scripts.html_page $(STORE)

reproduce: env ## run every experiment that has not been run, then figures and tables (ARGS="key=value ...")
	-$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[faces]' # of the faces alone
	$(BIN)/python -m scripts.reproduce $(ARGS)
	$(MAKE) figures results-page

reproduce-gpu: ## the same on a GPU, Figure 7 at full size
	$(MAKE) reproduce ARGS="--full device=cuda $(ARGS)"

bench: env ## measure speed and memory into results/bench.csv, on an idle machine (ARGS="--against OLD", docs/performance.md)
	$(BIN)/python -m scripts.benchmarks.bench
	$(BIN)/python -m scripts.benchmarks.bench_rivals
	$(BIN)/python -m scripts.benchmarks.bench_parallel
	$(BIN)/python -m scripts.benchmarks.bench_speed $(ARGS)

gpu-check: env ## in eight minutes: is a GPU right, and how fast; results/bench_gpu.csv (ARGS="--seconds 300", docs/gpu.md)
	$(BIN)/python -m scripts.benchmarks.gpu_check $(ARGS)

clean: ## remove .venv and caches, keep data/, results/ and outputs/
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info build
