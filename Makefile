# Every target makes what it needs in .venv first; a second run finds it there and starts at once.
#   make demo ARGS=--quick         pass options to `zeta demo`
#   make test ARGS="-k window"     pass options to pytest
#   make demo PYTHON=python3.12    use another Python
PYTHON ?= $(shell command -v python3.11 || command -v python3)
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# What is installed is compiled where it is imported, or below: pip takes its time, on one core.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
    --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest
# One worker a core; the tests give each its share of the threads.
WORKERS ?= auto
# The few files with tests that run alone: for these no other need be collected.
SERIAL := $$(grep --recursive --files-with-matches --include='test_*.py' 'mark\.serial' tests)
# ARGS may select tests of one of the two runs only; pytest says 5 when there is none.
NONE_IS_FINE := || test $$? -eq 5

.DEFAULT_GOAL := help
.PHONY: help demo native sanitize ready test test-fast histories lint format site pictures wheel clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The stamps lie inside .venv: remove it, and everything is made anew.
$(VENV)/.ready-demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Setting up .venv for the demo (the first time only) ..."
	$(PIP) --editable ".[demo]"
	@touch $@

# What compiles comes first, so that it can compile while pip fetches the rest.
$(VENV)/.ready-tools: constraints.txt | $(BIN)/python
	$(PIP) cmake ninja
	@touch $@

$(VENV)/.ready-dev: pyproject.toml constraints.txt requirements-dev.txt | $(VENV)/.ready-tools
	@echo "Setting up .venv for development (the first time only) ..."
	$(PIP) --requirement requirements-dev.txt --editable ".[demo]"
# Its attention needs torch alone; what the package asks for no longer installs.
	$(PIP) --no-deps torchscale
# The tests make errors of warnings, and packages' own syntax gives some when it is compiled.
	@$(BIN)/python -W ignore -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@ $(VENV)/.ready-native

NATIVE := CMakeLists.txt $(wildcard src/zeta/ops/backends/cpu/native/*)
BUILD_NATIVE = PATH="$(CURDIR)/$(BIN):$$PATH" && \
    cmake --fresh -S . -B build/$(1) -G Ninja --log-level=NOTICE -D $(2)=ON && cmake --build build/$(1)

# The installation above has built the native CPU kernel; this builds it again when it changes.
$(VENV)/.ready-native: $(NATIVE) | $(VENV)/.ready-dev
	@$(call BUILD_NATIVE,native,ZETA_IN_SOURCE)
	@touch $@

# What runs beyond AVX2, with software for its instructions: for tests.
$(VENV)/.ready-emulated: $(NATIVE) | $(VENV)/.ready-tools
	@$(call BUILD_NATIVE,emulated,ZETA_EMULATE)
	@touch $@

native: $(VENV)/.ready-native ## Build the native CPU kernel, if its sources changed.

# With software for what the processor has not. Python itself knows nothing of the sanitizers, which
# therefore come first.
sanitize: $(VENV)/.ready-dev ## Run every unit of the native CPU kernel under AddressSanitizer and UBSan.
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/sanitize -G Ninja --log-level=NOTICE \
	    -D ZETA_SANITIZE=ON -D ZETA_EMULATE=ON
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/sanitize
	for dtype in float32 bfloat16 float16; do \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	    $(BIN)/python -m tests.ops.cpu.guarded_calls $$dtype --ordinary \
	        --library build/sanitize/libzeta_cpu.so || exit; \
	done

demo: $(VENV)/.ready-demo ## Train, generate, translate and time: `zeta demo`.
	$(BIN)/zeta demo $(ARGS)

# All that tests need. The kernel comes last: beside the installation it would be built twice.
ready:
	@$(MAKE) --no-print-directory --jobs 2 $(VENV)/.ready-dev $(VENV)/.ready-emulated
	@$(MAKE) --no-print-directory $(VENV)/.ready-native

test: ready ## Run every test this machine can run.
	$(PYTEST) --numprocesses $(WORKERS) --dist loadgroup -m "not serial" $(ARGS) $(NONE_IS_FINE)
	$(PYTEST) -m serial $(if $(filter tests%,$(ARGS)),,$(SERIAL)) $(ARGS) $(NONE_IS_FINE)

test-fast: ready ## Run the tests that take less than five seconds each.
	$(PYTEST) --numprocesses $(WORKERS) --dist loadgroup -m "not slow and not serial" $(ARGS)

histories: $(VENV)/.ready-dev $(VENV)/.ready-native ## Run 100,000 random histories of caches: up to an hour.
	$(PYTEST) --numprocesses $(WORKERS) --histories 100000 -k full_forward tests/caches $(ARGS)

lint: $(VENV)/.ready-dev ## Check style, formatting and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready-dev ## Mend what the linter and the formatter can mend.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

site: $(VENV)/.ready-dev ## Build the documentation in build/site; a broken link is an error.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

pictures: $(VENV)/.ready-dev ## Draw the pictures of the documentation anew.
	$(BIN)/python docs/pictures.py

wheel: $(VENV)/.ready-dev ## Build the wheel in dist/.
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean: ## Remove what was built, .venv apart.
	rm -rf build dist demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
