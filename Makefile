# make sweep                         install, build the corpus, train, fit, draw (20 minutes on two cores)
# make sweep BUDGET=cpu-smoke        the same in a minute; SUITE=... picks another suite
# make test                          install and test (10 minutes at most)

PYTHON ?= python3
VENV ?= .venv
BUDGET ?= cpu-small
SUITE ?= allocation
RUN := $(VENV)/bin/python

.PHONY: help sweep test test-all check clean
help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.run: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"Python 3.11 or newer is needed, this is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.11" if v < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(VENV)/bin/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

sweep: $(VENV)/.run  ## train a sweep and draw its curve: BUDGET=cpu-small SUITE=allocation
	$(RUN) -m experiments launch $(SUITE) $(BUDGET)
	$(RUN) -m analysis collect
	$(RUN) -m analysis figures --budget $(BUDGET)

test: $(VENV)/.dev  ## install and run the default tests
	$(RUN) -m pytest -m 'not slow'

test-all: $(VENV)/.dev  ## also the slow tests
	$(RUN) -m pytest

check: $(VENV)/.dev  ## lint, format, types, import contracts
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

clean:  ## remove the environment, shards and runs (results/runs.csv and figures stay)
	rm -rf $(VENV) data results/runs
