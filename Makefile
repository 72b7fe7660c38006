# Every target works from a clean clone with Python and make; each installs what it needs into .venv first.
PYTHON ?= python3
ARGS ?=

VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' genscl_loss/__init__.py)
ALIAS ?= latest

VENV := .venv
BIN := $(VENV)/bin

# Each file to one process, the long ones first (tests/conftest.py).
SHARE := --dist loadfile --no-loadscope-reorder

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup test test-all lint types coverage docs docs-release bench gpu demo notebooks build test-wheel
.PHONY: test-oldest clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile
	@echo "  ARGS=... is passed on to pytest, mkdocs, the benchmark or the demo; PYTHON=... chooses the interpreter of a new .venv."

setup: $(VENV)/.installed-dev $(VENV)/.documenting  ## Create .venv and install the package with all development tools

test: lint types setup  ## Lint, check types, run the tests: six minutes
	$(BIN)/python -m pytest -n logical --maxprocesses 4 $(SHARE) $(ARGS)

# Properties again, with more examples.
test-all: setup  ## Run the tests that `make test` leaves out: less than half an hour
	HYPOTHESIS_PROFILE=all $(BIN)/python -m pytest -n logical --maxprocesses 4 $(SHARE) \
	    -m 'exhaustive or hypothesis' $(ARGS)

lint: setup  ## Run ruff
	$(BIN)/python -m ruff check .

types: setup  ## Run mypy on the package
	$(BIN)/python -m mypy

coverage: setup  ## Run the tests and list the lines and branches that none of them takes
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest -n logical --maxprocesses 4 $(SHARE) $(ARGS)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

docs: $(VENV)/.documenting  ## Build the documentation: site/index.html (without torch)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

# A release of an older series is not the newest: ALIAS=
docs-release: $(VENV)/.documenting  ## Add the pages of this version to the branch gh-pages (ARGS=--push publishes them)
	PATH="$(CURDIR)/$(BIN):$$PATH" NO_MKDOCS_2_WARNING=1 mike deploy --update-aliases $(ARGS) $(VERSION) $(ALIAS)
	PATH="$(CURDIR)/$(BIN):$$PATH" mike set-default --allow-undefined $(ARGS) latest

bench: $(VENV)/.installed-bench  ## Measure time and memory of the loss
	$(BIN)/python benchmarks/bench_loss.py $(ARGS)

# With the torch that PYTHON has, which is that of the GPU; nothing is installed.
gpu:  ## All that needs a GPU, in three parts of ten minutes: ARGS="--part 1"; ARGS=--smoke on a CPU
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py $(ARGS)

demo: $(VENV)/.installed-examples  ## Train on scikit-learn's digits and plot the result
	$(BIN)/python examples/digits_demo.py $(ARGS)

notebooks: setup  ## Run the notebooks of examples/ and keep what they print
	$(BIN)/python tests/notebooks.py

build: $(VENV)/.installed-release  ## Build and check the wheel and the source archive: dist/
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*
	DIST=dist $(BIN)/python -m pytest -v tests/test_release.py

# In a folder of its own: the source archive without the package, and an environment with the wheel. Left out is what
# reads the package's files beside the pages that link to them.
test-wheel: build  ## Run the tests against the built wheel
	rm -rf build/wheel
	mkdir -p build/wheel
	tar -xzf dist/*.tar.gz --strip-components 1 -C build/wheel
	rm -r build/wheel/genscl_loss
	$(BIN)/python -m venv build/wheel/.venv
	build/wheel/.venv/bin/python -m pip install --quiet "$$(echo dist/*.whl)[dev]" --constraint constraints.txt
	cd build/wheel && .venv/bin/python -m pytest -n logical --maxprocesses 4 $(SHARE) --ignore tests/test_site.py \
	    --deselect tests/test_docs.py::test_local_link_resolves --pyargs tests/ genscl_loss $(ARGS)

# The oldest versions that pyproject.toml allows, of what a release of torch comes with. Everything else as ever.
OLDEST := torch==2.6.0 triton==3.2.0 sympy==1.13.1 numpy==2.3.5

test-oldest: $(VENV)/.created  ## Run the tests with the oldest PyTorch that is supported
	rm -rf build/oldest
	mkdir -p build/oldest
	grep -vE '^(torch|triton|sympy|numpy)==' constraints.txt > build/oldest/constraints.txt
	printf '%s\n' $(OLDEST) >> build/oldest/constraints.txt
	$(BIN)/python -m venv build/oldest/.venv
	build/oldest/.venv/bin/python -m pip install --quiet --editable '.[dev]' --requirement docs/requirements.txt \
	    --constraint build/oldest/constraints.txt
	build/oldest/.venv/bin/python -m pytest -n logical --maxprocesses 4 $(SHARE) $(ARGS)

clean:  ## Remove .venv, caches and everything built
	rm -rf $(VENV) build dist site *.egg-info demo-results benchmarks/results/local .gpu .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
	find . -type d -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "error: Python 3.10 or newer is needed; name one with make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	    { echo "error: $(PYTHON) cannot create virtual environments. On Debian and Ubuntu: apt install python3-venv" >&2; \
	      exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.documenting: $(VENV)/.created docs/requirements.txt constraints.txt
	$(BIN)/python -m pip install --quiet --requirement docs/requirements.txt --constraint constraints.txt
	@touch $@

# One stamp for each extra of pyproject.toml. `dev` contains the others, so it brings their stamps along.
$(VENV)/.installed-%: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing genscl-loss[$*] into $(VENV) (minutes the first time)"
	$(BIN)/python -m pip install --quiet --editable '.[$*]' --constraint constraints.txt
	@touch $@ $(if $(filter dev,$*),$(addprefix $(VENV)/.installed-,bench examples))
