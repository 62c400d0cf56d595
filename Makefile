# `make demo` and `make test` are all a fresh machine needs. The rest is for those who work on EdgeFlame.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test faults fuzz guides check lock coverage reference docs docs-serve format clean

demo: $(VENV)/.installed
	$(BIN)/edgeflame demo $(DEMO_ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --dist loadfile $(PYTEST_ARGS)

# Every step of the protocol at which site, aggregator or broker can be killed, on both brokers, and disks that lose
# what was written: nearly 500 runs of real processes, each of several seconds.
faults: $(VENV)/.installed-dev
	EDGEFLAME_FAULTS=all $(BIN)/python -m pytest tests/faults $(PYTEST_ARGS)

# 10,000 hostile inputs for each decoder in the table of tests/fuzz.
fuzz: $(VENV)/.installed-dev
	EDGEFLAME_FUZZ=10000 $(BIN)/python -m pytest tests/fuzz $(PYTEST_ARGS)

# The longer guides, typed word by word into a shell.
guides: $(VENV)/.installed-dev
	EDGEFLAME_GUIDES=all $(BIN)/python -m pytest tests/docs/test_guides.py $(PYTEST_ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# The newest of everything, and what the tests then ran with, as constraints for the next installation.
lock: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --upgrade --upgrade-strategy eager -e ".[cpu,train,broker,demo,report,dev]"
	$(BIN)/python requirements/lock.py

# Which lines and branches the tests run, those in child processes included; slower than the tests alone.
coverage: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --dist loadfile --cov --cov-report=term:skip-covered --cov-report=html $(PYTEST_ARGS)

# The pages of docs/reference, made from the code.
reference: $(VENV)/.installed-dev
	$(BIN)/python docs/make_reference.py

# The documentation site in site/; any dead link, missing anchor or page outside of the menu is an error
# (not with --quiet, which silences what makes it one).
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

docs-serve: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The constraints have markers: they hold for the Python and machine that CI has, elsewhere the newest fitting are taken.
$(VENV)/.installed: pyproject.toml requirements/ci.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install -c requirements/ci.txt -e ".[cpu,train,broker,demo,report]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -c requirements/ci.txt -e ".[cpu,train,broker,demo,report,dev]"
	touch $@

# The site is made of text alone: EdgeFlame itself, and all that it needs, can stay away.
$(VENV)/.installed-docs: requirements/ci.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -c requirements/ci.txt "mkdocs>=1.6,<2" "mkdocs-material>=9.5"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
