# Two commands for everyone: `make demo` and `make test`. They need git, make and Python 3.11 or newer, nothing else:
# the first run makes .venv and installs into it; later runs go straight to work.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP := $(BIN)/python -m pip --disable-pip-version-check
ROOMS := fxopt passes export tools
JOBS ?= 2
ARGS ?=

.PHONY: help demo test slow bench check format clean

help:
	@echo "make demo     train a small net on real digits, optimize it, export it, prove it in ONNX Runtime"
	@echo "make test     run the tests (ARGS='-k name' passes on to pytest, JOBS=1 runs them in one process)"
	@echo "make slow     run the long tests"
	@echo "make bench    measure speed and compare with the peers"
	@echo "make check    lint, formatting and types"
	@echo "make format   rewrite the code in the project's format"
	@echo "make clean    remove .venv and everything made here"

demo: $(VENV)/.installed-demo
	$(BIN)/python -m fxopt.tools.demo $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist worksteal $(ARGS)

slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow $(ARGS)

bench: $(VENV)/.installed-test
	$(BIN)/python -m tests.bench $(ARGS)

# fxopt.passes, fxopt.export and fxopt.tools lie beside fxopt/ in the tree, and mypy sees only what lies inside it. So it
# is shown a view of links in which they do, and the number of files it read is compared with the number there are.
check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf .typecheck && mkdir -p .typecheck/fxopt
	@for item in fxopt/*; do ln -s "../../$$item" .typecheck/fxopt/; done
	@for room in $(filter-out fxopt,$(ROOMS)); do ln -s "../../$$room" .typecheck/fxopt/; done
	@files=$$(find $(ROOMS) -name '*.py' | wc -l); \
	MYPYPATH=.typecheck $(BIN)/mypy -p fxopt | sed 's#^\.typecheck/fxopt/\(passes\|export\|tools\)/#\1/#; s#^\.typecheck/##' \
	    | tee .typecheck/report; \
	grep -q "no issues found in $$files source files" .typecheck/report \
	    || { echo "make check: mypy should have read $$files files and found nothing" >&2; exit 1; }

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .typecheck .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find $(ROOMS) tests -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp file per extra: it is older than what it was made from only when that changed.
$(VENV)/.installed-demo: pyproject.toml | $(BIN)/python
	$(PIP) install --editable '.[demo]'
	@touch $@

$(VENV)/.installed-test: pyproject.toml tests/zoo/requirements-no-deps.txt | $(BIN)/python
	$(PIP) install --editable '.[test]'
	$(PIP) install --no-deps --requirement tests/zoo/requirements-no-deps.txt
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(PIP) install --editable '.[dev]'
	@touch $@

$(BIN)/python:
	@[ -n "$(PYTHON)" ] || { echo "make: no python3.11 or python3 found; install Python 3.11 or newer," \
	    "or name it: make PYTHON=/path/to/python $(MAKECMDGOALS)" >&2; exit 1; }
	@"$(PYTHON)" -c '' 2>/dev/null || { echo "make: cannot run $(PYTHON)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: fxopt needs Python 3.11 or newer," \
	    "but $(PYTHON) is $$("$(PYTHON)" -V 2>&1); name another: make PYTHON=/path/to/python $(MAKECMDGOALS)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) cannot make virtual environments;" \
	    "install its venv module (on Debian: apt-get install python3-venv)" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
