# On a fresh machine with Python >= 3.11, make and a C++ compiler: `make demo`, `make test`.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= test,examples
JOBS ?= 2

# LAPACK's own threads and XLA's wait for each other's cores; one LAPACK thread is as fast and never stalls.
export OPENBLAS_NUM_THREADS ?= 1

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := pyproject.toml CMakeLists.txt $(shell find csrc -type f)

.PHONY: help demo test lint format wheel-check clean
.DEFAULT_GOAL := help

help:
	@echo "make demo         train on the digits data set, on the CPU"
	@echo "make test         run the test suite"
	@echo "make lint         ruff, pyright and clang-format"
	@echo "make format       let ruff and clang-format rewrite the files"
	@echo "make wheel-check  build a wheel and call it on the oldest and the newest JAX"
	@echo "make clean        remove the virtual environment and everything built"
	@echo "PYTHON=python3.12 make test   with another Python"

# Editable: edits of Python files need no reinstall, edits of C++ files or of the packaging trigger one.
$(STAMP): $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit("curvax needs Python >= 3.11; say PYTHON=python3.12 make ..." if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing curvax[$(EXTRAS)] into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[$(EXTRAS)]'
	@touch $@

demo: $(STAMP)
	@JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(BIN)/python examples/digits.py

test: $(STAMP)
	@$(BIN)/python -m pytest -n $(JOBS) -q

$(VENV)/.dev: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[$(EXTRAS),dev]'
	@touch $@

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/typing && mkdir -p build/typing/curvax
	@ln -s $(CURDIR)/python/curvax/* $(CURDIR)/kernels build/typing/curvax/
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.cc' -o -name '*.h' -o -name '*.inc')

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.cc' -o -name '*.h' -o -name '*.inc')

wheel-check: $(STAMP)
	@$(BIN)/python tests/ffi/wheel_check.py

clean:
	rm -rf $(VENV) build dist wheelhouse .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
