# `make demo` and `make test` are all a fresh machine needs. The rest is for those who work on EdgeFlame.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test faults fuzz guides check lock pin-images sbom coverage reference docs docs-serve format clean

demo: $(VENV)/.installed
	$(BIN)/edgeflame demo $(DEMO_ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

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

# The newest of everything; what the tests then ran with, as constraints for the next installation, and the locks of deploy/.
lock: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --upgrade --upgrade-strategy eager -e ".[cpu,train,broker,demo,report,dev]"
	$(BIN)/python requirements/lock.py
	$(BIN)/python requirements/deploy_locks.py

# The digests that the tags of all base images have now, into deploy/docker; needs their registries, and skopeo or buildx.
pin-images:
	deploy/docker/pin.sh

# What a machine of each role consists of, in CycloneDX: from its lock, with every file's hash, for this Python and
# processor or SBOM_TARGET (--python-version 3.10 --platform manylinux_2_28_aarch64); and what is installed in VENV, with
# its licences.
sbom: $(VENV)/.installed-dev
	mkdir -p sbom
	for lock in $(filter-out build,$(basename $(notdir $(wildcard deploy/locks/*.txt)))); do \
		$(BIN)/python deploy/lock_for.py deploy/locks/$$lock.txt $(SBOM_TARGET) >sbom/$$lock.txt && \
		$(BIN)/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible \
			--output-file sbom/$$lock.cdx.json sbom/$$lock.txt || exit 1; \
	done
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
		--output-file sbom/environment.cdx.json $(BIN)/python

# Which lines and branches the tests run, those in child processes included; slower than the tests alone.
coverage: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --cov --cov-report=term:skip-covered --cov-report=html $(PYTEST_ARGS)

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
