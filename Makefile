# make sweep                         install, build the corpus, train, fit, draw (12 to 16 minutes on two cores)
# make sweep BUDGET=cpu-smoke        the same in two minutes; SUITE=... picks another suite
# make figures                       redraw and judge everything committed, from the committed rows
# make one-minute                    run every suite for a minute, measure its speed and redraw what is shown of it;
#                                    BENCHMARKS=DIR TEXT=DIR score it as well, else benchmarks.csv stays as it was
# make test                          install and test (10 minutes at most)

PYTHON ?= python3
VENV ?= .venv
BUDGET ?= cpu-small
SUITE ?= allocation
RUN := $(VENV)/bin/python

SUITES := allocation sparsity horizon infinite-memory layers ablation baselines noise lr
ONE_MINUTE := results/reference/one-minute
CHOICES := arc_easy,sciq,winogrande
SCORE_IT := $(RUN) -m experiments eval baselines cpu-smoke runtime.runs_dir=build/one-minute

.PHONY: help sweep figures report one-minute notebooks test test-slow check bench clean
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

$(VENV)/.eval: $(VENV)/.dev
	$(VENV)/bin/pip install -q -c constraints.txt -e '.[eval]'
	@touch $@

sweep: $(VENV)/.run  ## train a sweep and draw its curve: BUDGET=cpu-small SUITE=allocation
	$(RUN) -m experiments launch $(SUITE) $(BUDGET)
	$(RUN) -m analysis collect
	$(RUN) -m analysis tables --budget $(BUDGET)
	$(RUN) -m analysis figures --budget $(BUDGET)
	$(RUN) -m analysis report --budget $(BUDGET)

figures: $(VENV)/.run  ## redraw and judge all that is committed from the committed rows: no GPU, no training
	for place in results/reference $(ONE_MINUTE); do for what in tables figures claims; do \
		$(RUN) -m analysis $$what --table $$place/runs.csv --out $$place || exit 1; done; done

report: $(VENV)/.run  ## one HTML page for each budget of your runs, in results/figures
	$(RUN) -m analysis collect
	$(RUN) -m analysis report

one-minute: $(VENV)/$(if $(BENCHMARKS)$(TEXT),.eval,.run)  ## train every suite afresh at its one-minute size, redraw what is committed: a quarter of an hour on two cores
	for place in $(BENCHMARKS) $(TEXT); do test -d $$place || { echo "$$place is no folder"; exit 1; }; done
	rm -rf build/one-minute
	for suite in $(SUITES); do $(RUN) -m experiments launch $$suite cpu-smoke runtime.runs_dir=build/one-minute || exit 1; done
	$(if $(BENCHMARKS),$(SCORE_IT) --data $(BENCHMARKS) --tasks blimp --limit 100)
	$(if $(BENCHMARKS),$(SCORE_IT) --data $(BENCHMARKS) --tasks $(CHOICES) --limit 500)
	$(if $(TEXT),$(SCORE_IT) --text $(TEXT) --tasks bits_per_byte --limit 20)
	$(RUN) -m experiments speed baselines cpu-smoke runtime.runs_dir=build/one-minute
	$(RUN) -m analysis collect --runs build/one-minute --table $(ONE_MINUTE)/runs.csv
	$(MAKE) figures notebooks

notebooks: $(VENV)/.dev  ## execute the notebooks afresh, in place
	$(RUN) notebooks/execute.py

test: $(VENV)/.dev  ## install and run the default tests
	$(RUN) -m pytest -m 'not slow'

test-slow: $(VENV)/.eval  ## only the tests that take minutes
	$(RUN) -m pytest -m slow

check: $(VENV)/.dev  ## lint, format, types, import contracts
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

bench: $(VENV)/.dev  ## time the suite against its peers: a quarter of an hour, on a quiet machine
	$(RUN) -m benchmarks run

clean:  ## remove the environment, shards, runs and your figures
	rm -rf $(VENV) data results/runs results/code results/figures results/*.csv
