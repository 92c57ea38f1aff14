# Every target works on a fresh machine: .venv is made when it is missing or older than what it was made from.
PYTHON ?= python3
ARGS ?=
MINUTES ?= 30
BIN := .venv/bin
INSTALLED := .venv/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help train test test-all check docs docs-serve bench chaos clean

help: ## show this text
	@echo "usage: make TARGET [PYTHON=python3.11] [ARGS='...']"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "Every target uses .venv in this folder and makes it when needed, also when another environment is"
	@echo "activated: PYTHON (3.11 or newer) only says which interpreter .venv is made from. A build of torch that"
	@echo "you have put into .venv yourself stays, as long as it is the version of constraints.txt."

# Without ARGS, 8M of the preset's 10M steps: less than four minutes on two cores.
train: $(INSTALLED) ## train HalfCheetah-v5; more options in ARGS, e.g. ARGS='--generations 10 --seed 1'
	@$(BIN)/es-flipout train HalfCheetah-v5 $(or $(ARGS),--env-steps 8000000)

test: $(INSTALLED) ## the tests that need neither a GPU nor patience
	@$(BIN)/python -m pytest -q -m "not slow and not gpu" $(ARGS)

test-all: $(INSTALLED) ## all tests, the slow ones and (where there is a GPU) the GPU ones too
	@$(BIN)/python -m pytest -q -m "" $(ARGS)

check: $(INSTALLED) ## style, format, types and the one-way order of imports
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/pyright
	@said=$$($(BIN)/lint-imports --no-logo --no-cache) || { echo "$$said"; exit 1; }

docs: $(INSTALLED) ## the documentation site, in build/site; a broken link or reference is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

docs-serve: $(INSTALLED) ## the site at http://127.0.0.1:8000, built again when a page changes
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

chaos: $(INSTALLED) ## kill, signal and resume runs for MINUTES, and compare their ends bit by bit
	@$(BIN)/python scripts/checks/chaos.py --minutes $(MINUTES) $(ARGS)

bench: $(INSTALLED) ## speed of rollouts and of the population forward on this machine
	@$(BIN)/es-flipout bench rollout $(ARGS)
	@$(BIN)/es-flipout bench forward $(ARGS)

clean: ## remove what builds and tools left; .venv, runs/ and results/ stay
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone: nothing installed later can then bring another build of it.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "setting up .venv (torch is a large download the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=...")'
	@$(PYTHON) -m venv .venv
	@$(PIP) install -c constraints.txt torch
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@
