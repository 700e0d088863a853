# `make parity` and `make test` do all their own set-up, in .venv.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# Processes that share the tests out; each may take 4 GiB.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS)

.PHONY: parity test test-all test-native test-versions lint docs bench census tpu clean setup
.DEFAULT_GOAL := parity

parity: $(READY)  ## answer the question: why unfold + matmul differs from F.conv2d, and what has the same bits
	@$(BIN)/jaxdw parity

test: $(READY)  ## the tests, with a sample of the random cases
	@$(PYTEST)

test-all: $(READY)  ## the tests, with every random case
	@$(PYTEST) --full

test-native: $(READY)  ## the compiled kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
	@$(BIN)/python -m pip install -qq --disable-pip-version-check cmake
	@PATH=$(abspath $(BIN)):$$PATH $(BIN)/python tests/sanitizers.py

test-versions: $(READY)  ## the tests on the oldest, the newest and other versions, into docs/versions.md; over an hour
	@$(BIN)/python tests/versions.py

lint: $(READY)  ## format, lint and types, as pre-commit runs them
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

docs: $(BIN)/.docs  ## the site of the documentation, into build/site; a warning is an error
	@NO_MKDOCS_2_WARNING=1 PATH=$(abspath $(BIN)):$$PATH $(BIN)/mkdocs build

bench: $(READY)  ## ratios against lax, flax and PyTorch, interleaved
	@$(BIN)/jaxdw bench

census: $(READY)  ## the depthwise layers of 40 models of other libraries, each with its verdict; resumable, about 20 minutes
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[models]'
	@mkdir -p build && $(BIN)/python benchmarks/census.py --out build/census.jsonl --html build/census.html

tpu: $(READY)  ## the compiler for TPUs, for `jaxdw audit --platform tpu:v5e` and the tests that compile for one
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt 'jaxdw[tpu]'  # jaxdw is there: no build

setup: $(READY)

clean:  ## everything that was made here
	rm -rf .venv build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# the compiled kernels are built when jaxdw is installed
$(READY): pyproject.toml constraints.txt $(wildcard jaxdw/native/*.cc jaxdw/native/*.h jaxdw/native/CMakeLists.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "jaxdw needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "jaxdw needs Python's venv and ensurepip; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@echo "Setting up .venv (about a minute) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[test,models]' || \
	  { echo "jaxdw could not install its packages: see pip's message above (the pins of constraints.txt need wheels for this Python and platform)" >&2; exit 1; }
	@touch $@

$(BIN)/.docs: $(READY)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt 'jaxdw[docs]'  # jaxdw is there: no build
	@touch $@
