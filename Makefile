# make quickstart: set up and do the main job, nothing downloaded but packages.   make test: set up and run the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup quickstart miniature test lint format

setup: $(VENV)/installed

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

quickstart: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/quickstart.sh

# Every method in miniature: its table and figures in runs/tables/miniature-report. Stopped, the same command goes on.
# Runs that failed are left empty in it, and make ends with the sweep's exit code.
# make miniature TABLE=miniature_ranks, or another small table; OPTIONS="--set FIELD=VALUE" goes to sweep and report.
TABLE := miniature
miniature: setup
	status=0; $(BIN)/python launch/sweep.py --table $(TABLE) --jobs 2 $(OPTIONS) || status=$$?; \
	$(BIN)/python launch/report.py --table $(TABLE) $(OPTIONS) --write runs/tables/$(TABLE)-report \
		--figures runs/tables/$(TABLE)-report && exit $$status

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
