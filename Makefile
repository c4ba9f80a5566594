# Every target makes what it needs in .venv first; a second run finds it there and starts at once.
#   make demo ARGS=--quick         pass options to `zeta demo`
#   make test ARGS="-k window"     pass options to pytest
#   make demo PYTHON=python3.12    use another Python
PYTHON ?= $(shell command -v python3.11 || command -v python3)
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest
# One worker a core; the tests give each its share of the threads.
WORKERS ?= auto
# ARGS may select tests of one of the two runs only; pytest says 5 when there is none.
NONE_IS_FINE := || test $$? -eq 5

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast histories lint format types wheel clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The stamps lie inside .venv: remove it, and everything is made anew.
$(VENV)/.ready-demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Setting up .venv for the demo (the first time only) ..."
	$(PIP) --editable ".[demo]"
	@touch $@

$(VENV)/.ready-dev: pyproject.toml constraints.txt requirements-dev.txt | $(BIN)/python
	@echo "Setting up .venv for development (the first time only) ..."
	$(PIP) --requirement requirements-dev.txt --editable ".[demo]"
	@touch $@

demo: $(VENV)/.ready-demo ## Train, generate, translate and time: `zeta demo`.
	$(BIN)/zeta demo $(ARGS)

test: $(VENV)/.ready-dev ## Run every test this machine can run.
	$(PYTEST) --numprocesses $(WORKERS) --dist loadgroup -m "not serial" $(ARGS) $(NONE_IS_FINE)
	$(PYTEST) -m serial $(ARGS) $(NONE_IS_FINE)

test-fast: $(VENV)/.ready-dev ## Run the tests that take less than five seconds each.
	$(PYTEST) --numprocesses $(WORKERS) --dist loadgroup -m "not slow and not serial" $(ARGS)

histories: $(VENV)/.ready-dev ## Run 100,000 random histories of caches: a quarter of an hour.
	$(PYTEST) --numprocesses $(WORKERS) --histories 100000 -k full_forward tests/caches $(ARGS)

lint: $(VENV)/.ready-dev ## Check style, formatting and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready-dev ## Mend what the linter and the formatter can mend.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/.ready-dev ## Build the wheel in dist/.
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean: ## Remove what was built, .venv apart.
	rm -rf build dist demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
