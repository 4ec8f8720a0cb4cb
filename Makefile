# make quickstart     set up .venv and run the quickstart; only packages are downloaded
# make miniature      every method on the quickstart's base: a table and figures
# make test           what CI runs: units and real launches of every engine, 1 to 4 ranks; 13 minutes on 2 cores
# make test-fast      units only; a minute and a half
# make test-full      everything, with the further cells of every matrix; 22 minutes
# make lint, format   check, or mend, style
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup quickstart miniature test test-fast test-full lint format

setup: $(VENV)/installed

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

quickstart: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/quickstart.sh

# The table and figures are in runs/tables/TABLE-report. Interrupted, the same command resumes.
# Failed runs are left empty in the table, and make ends with the sweep's exit code.
# TABLE names another small table; OPTIONS="--set FIELD=VALUE" goes to sweep.py and report.py.
TABLE := miniature
miniature: setup
	status=0; $(BIN)/python launch/sweep.py --table $(TABLE) --jobs 2 $(OPTIONS) || status=$$?; \
	$(BIN)/python launch/report.py --table $(TABLE) $(OPTIONS) --write runs/tables/$(TABLE)-report \
		--figures runs/tables/$(TABLE)-report && exit $$status

test: setup
	$(BIN)/python -m pytest -m "not full"

test-fast: setup
	$(BIN)/python -m pytest -m "not full and not slow" --ignore tests/distributed

test-full: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
