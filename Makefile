# On a fresh machine with Python >= 3.11, make and a C++ compiler: `make demo`, `make test`.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= test,examples
JOBS ?= 2

BIN := $(VENV)/bin
# Imports the package for its presets, which needs no accelerator; no notice about what replaces mkdocs one day.
MKDOCS := JAX_PLATFORMS=cpu NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs
STAMP := $(VENV)/.installed
CXX_FILES := $(shell find csrc tests/cpp -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
NATIVE := pyproject.toml CMakeLists.txt $(shell find csrc -type f)

# Compiling for GPUs needs no GPU, but JAX's CUDA packages (3.5 GB), which want Python >= 3.12: the versions of the GPU
# machines that curvax is measured on, and the jax-triton that goes with them.
PYTHON312 ?= python3.12
GPU_VENV ?= .venv-gpu
GPU_PACKAGES ?= "jax[cuda13]==0.11.2" jax-triton==0.4.1 triton==3.7.0 pytest
GPU_STAMP := $(GPU_VENV)/.installed

.PHONY: help demo test test-fast test-cpp test-gpu-compile lint package-layout docs docs-serve format wheel-check clean
.DEFAULT_GOAL := help

help:
	@echo "make demo         a physics-informed network and the digits, curvax beside others, on the CPU"
	@echo "make test         run the test suite"
	@echo "make test-fast    what a change breaks first, in a minute and a half"
	@echo "make test-cpp     the C++ and CUDA code under sanitizers, without a GPU"
	@echo "make test-gpu-compile  lower and compile for NVIDIA GPUs, without one (PYTHON312=python3.13 for another Python)"
	@echo "make lint         ruff, pyright and clang-format"
	@echo "make docs         the site, strictly, in build/site; every link and every public name is checked"
	@echo "make docs-serve   the site at http://127.0.0.1:8000, built anew when a page changes"
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
	@JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(BIN)/python examples/demo_pinn.py --picture out/demo_pinn.png
	@JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(BIN)/python examples/digits.py --picture out/digits.png

# Neighbours stay on one worker, which compiles once what they share, until a worker has nothing left.
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -q

test: $(STAMP)
	@$(PYTEST)

# Some tests of every layer, marked `fast`: CONTRIBUTING.md says which to mark.
test-fast: $(STAMP)
	@$(PYTEST) --fast

test-cpp: $(STAMP)
	@$(BIN)/python -m pytest -q tests/cpp

# With nvcc the CUDA extension is built too; without it the tests that need it are skipped.
$(GPU_STAMP): $(NATIVE)
	@$(PYTHON312) -c 'import sys; sys.exit("jax-triton needs Python >= 3.12; say PYTHON312=... make test-gpu-compile" if sys.version_info < (3, 12) else 0)'
	@test -x $(GPU_VENV)/bin/python || $(PYTHON312) -m venv $(GPU_VENV)
	@echo "installing JAX for CUDA, jax-triton and curvax into $(GPU_VENV)"
	@$(GPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile $(GPU_PACKAGES) \
		--editable . $(if $(shell command -v nvcc),-C cmake.define.CURVAX_CUDA=ON)
	@touch $@

test-gpu-compile: $(GPU_STAMP)
	@$(GPU_VENV)/bin/python -m pytest -q tests/lowering

# The very versions of tools and of what pyright reads: a new release of either is taken up by a commit, not by chance.
$(VENV)/.dev: $(STAMP) .ci/constraints.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint .ci/constraints.txt \
		--editable '.[$(EXTRAS),dev]'
	@touch $@

# The package as it is installed, with kernels inside curvax, for whoever reads sources and imports nothing.
package-layout:
	@rm -rf build/typing && mkdir -p build/typing/curvax
	@ln -s $(CURDIR)/python/curvax/* $(CURDIR)/kernels build/typing/curvax/

lint: $(VENV)/.dev package-layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

# The packages of the extra `docs` by themselves: an installation of curvax with it would compile the C++ again.
DOCS_PACKAGES := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])
$(VENV)/.docs: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile $$($(BIN)/python -c '$(DOCS_PACKAGES)')
	@touch $@

# Strict: a page or a link that is missing stops it, and so does a public name that no page shows.
docs: $(VENV)/.docs package-layout
	@$(MKDOCS) build --clean
	@$(BIN)/python docs/_site/check_site.py build/site

docs-serve: $(VENV)/.docs package-layout
	@$(MKDOCS) serve --watch README.md --watch bench --watch python

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

wheel-check: $(STAMP)
	@$(BIN)/python tests/ffi/wheel_check.py

clean:
	rm -rf $(VENV) $(GPU_VENV) build dist wheelhouse .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
