# make demo   on a fresh machine: installs into .venv, then draws the uncertainty maps
# make PYTHON=python3.12 …   chooses the interpreter (3.10 or newer)

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
UNFINISHED := $(VENV)/.unfinished
PIP := $(PY) -m pip install --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: demo test lint types clean help

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 8

demo: $(READY) ## images of the shipped model and their uncertainty, in maps/demo
	$(VENV)/bin/bayesdiff demo --out maps/demo

test: $(READY) ## the tests
	$(PY) -m pytest --numprocesses auto --dist worksteal

lint: $(READY) ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(READY) ## mypy
	$(PY) -m mypy

clean: ## remove the environment, the caches and the maps of the demo
	rm -rf $(VENV) maps/demo dist .pytest_cache .mypy_cache .ruff_cache
	find bayesdiff experiments tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

# An install that was interrupted leaves $(UNFINISHED) behind; the next one then starts from nothing.
# The interpreter is the first thing removed, so that an interrupted removal is noticed as well.
# torch comes first and alone, so that a failure to get it is seen before everything else is fetched.
$(READY): pyproject.toml constraints.txt tools/drop_broken_torchvision.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "bayesdiff needs Python 3.10 or newer, got %s from $(PYTHON). Try: make PYTHON=python3.12" % sys.version.split()[0])'
	@if [ -e $(UNFINISHED) ] || [ ! -x $(PY) ]; then rm -rf $(PY) $(VENV); fi
	@mkdir -p $(VENV) && touch $(UNFINISHED)
	[ -x $(PY) ] || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[test,experiments]'
	$(PIP) --no-deps k-diffusion # its samplers are tested; the packages that it asks for are not needed for them
	$(PY) tools/drop_broken_torchvision.py
	@rm $(UNFINISHED) && touch $@
