# On a fresh machine with python3 (3.11 to 3.13, with venv and pip), make and git, every target sets itself up:
# the first one that needs Python makes .venv, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Extra arguments for pip and pytest, for example PYTEST_ARGS="-k cli" or PIP_ARGS="--index-url ...".
PIP_ARGS ?=
PYTEST_ARGS ?=
# Two processes halve the time on two cores; more than four only wait for each other's imports.
PYTEST_WORKERS ?= -n auto --maxprocesses 4 --dist worksteal
# On Linux PyPI's torch brings gigabytes of CUDA. Where no other index offers a CPU build, name the one to ask:
# make venv TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"
TORCH_ARGS ?=
# The versions to install; CONSTRAINTS=/dev/null takes the newest that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
TORCH := $(or $(shell sed -n 's/^torch==/torch==/p' $(CONSTRAINTS)),torch)

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-long servers venv lint types format parity docs bench tiny-base dist clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|' 2>/dev/null || grep '## ' Makefile

quickstart: $(STAMP) ## render a small dataset, train, generate, score; writes quickstart/report.html
	$(BIN)/echo4o quickstart

test: $(STAMP) ## run the fast tests, in under three minutes on two cores
	$(BIN)/python -m pytest $(PYTEST_WORKERS) $(PYTEST_ARGS)

test-long: $(STAMP) ## run the other tests: real training runs, guides, publishing, servers, the installed wheel
	$(BIN)/python -m pytest $(PYTEST_WORKERS) --dist loadfile -m long $(PYTEST_ARGS)

servers: $(STAMP) ## install what long tests need beside the package: the app, Ray, servers of others, a browser's driver
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c $(CONSTRAINTS) -e '.[app,ray]' llm-katan playwright

venv: $(STAMP) ## only the set-up: .venv with the package and its tools

lint: $(STAMP) ## ruff: rules and format; types of all rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/link_rooms.py
	$(BIN)/basedpyright

types: $(STAMP) ## check types; make types ROOM=training for one room
	$(BIN)/python .ci/link_rooms.py
	$(BIN)/basedpyright $(if $(ROOM),build/rooms/echo4o/$(ROOM))

format: $(STAMP) ## let ruff fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

parity: $(STAMP) ## compare with a golden directory: make parity GOLDEN=dir
	@test -n "$(GOLDEN)" || { echo "error: say which golden directory: make parity GOLDEN=tests/parity/golden" >&2; exit 2; }
	$(BIN)/python -m tests.parity $(GOLDEN)

docs: $(STAMP) ## build the documentation site into build/site; broken links are errors
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c $(CONSTRAINTS) -e '.[docs]'
	$(BIN)/python .ci/link_rooms.py
	$(BIN)/python .ci/build_docs.py

bench: $(STAMP) ## measure speed and memory
	$(BIN)/python -m benchmarks

tiny-base: $(STAMP) ## make the tiny base model of the quickstart again
	$(BIN)/python -m echo4o.quickstart.tiny_base

dist: $(STAMP) ## build the wheel and the sdist into dist/; make dist TAG=v1.2.3 checks that the version is the tag's
	$(BIN)/python .ci/build_dist.py $(TAG)

clean: ## remove caches, builds and what the quickstart wrote (.venv stays)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache quickstart
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# torch first and alone: the constraint fixes the version, and no later step can trade the build for another one.
$(STAMP): pyproject.toml setup.py $(filter-out /dev/null,$(CONSTRAINTS))
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
	  echo "error: echo4o needs Python 3.11, 3.12 or 3.13, but '$(PYTHON)' is `$(PYTHON) --version 2>&1`. Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@echo "Setting up $(VENV), once; this takes some minutes."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) $(TORCH_ARGS) -c $(CONSTRAINTS) $(TORCH)
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c $(CONSTRAINTS) -e '.[dev]'
	@$(BIN)/python .ci/link_rooms.py
	@touch $@
