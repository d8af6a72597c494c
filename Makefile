# Everything from a fresh machine: `make demo` shows the whole way, `make test` runs every check.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help

# Tests and demo start many processes: each would compile all of hqc again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install demo test lint types tests figures docs clean

help: ## list what there is to make
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

install: $(STAMP) ## make the virtual environment and install hqc with its tools

demo: install ## trace, train, export, sample and evaluate the bundled model; prints one table
	$(BIN)/python scripts/demo.py

test: install lint types tests ## lint, types, then every test

lint: install ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install ## mypy, strict
	MYPY_NUM_WORKERS=2 $(BIN)/mypy

tests: install ## pytest, a file at a time on two cores, the long ones first
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: install lint types ## the same with further cases of what those test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'long or not long'

figures: install ## measure again what the README shows (two to three hours on two cores)
	test -d work/figures/digits.hqc || $(BIN)/hqc trace digits -o work/figures/digits.hqc
	$(MAKE) -j 2 figures-w4a4 figures-w4a3

# A width a core: as one process with two threads it takes longer.
figures-%: install
	OMP_NUM_THREADS=1 $(BIN)/hqc compare-recipes work/figures/digits.hqc --bits $* --seeds 3 --images 1000 \
		--recipes rtn,rtn+hadamard,hqc,hq-dm,efficientdm --work-dir work/figures/cells-$* -o work/figures/digits-$*.md \
		--html work/figures/digits-$*.html --chart work/figures/digits-$*.png --json > work/figures/digits-$*.json
	OMP_NUM_THREADS=1 $(BIN)/hqc compare-recipes work/figures/digits.hqc --bits $* --seeds 3 --images 1000 --recipes hqc \
		--own-budgets --work-dir work/figures/cells-hqc-$* -o work/figures/hqc-$*.md --json > work/figures/hqc-$*.json

docs: install ## write docs/cli.md anew from the command line's own help
	$(BIN)/python scripts/cli_reference.py

clean: ## remove the virtual environment and what demo and tests wrote
	rm -rf $(VENV) work .pytest_cache .mypy_cache .ruff_cache .hypothesis
