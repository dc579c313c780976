# nvfp4lab: `make study` and `make test` set up what is missing in .venv and run.
# Paths in targets are relative, so the checkout may lie in a folder whose name has a space.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

PEERS  := .venv-peers

.PHONY: help setup study test lint conformance clean
.DELETE_ON_ERROR:

help:
	@echo "make setup   make .venv and install what is pinned in constraints.txt"
	@echo "make study   run every notebook into build/study/*.html"
	@echo "make test    run the tests"
	@echo "make lint    ruff and pyright"
	@echo "make conformance   hold the recipes against the installed peers (minutes, its own $(PEERS))"
	@echo "make clean   remove .venv, build and caches"
	@echo "make clean setup PYTHON=python3.12   with another interpreter (3.11 or later)"

setup: $(READY)

study: $(READY)
	@$(BIN)/nvfp4lab study

# The kernels' interpreter is single-threaded: one test process a core, one thread each.
test: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/pyright --pythonpath $(BIN)/python

conformance:
	@"$(PYTHON)" -m venv $(PEERS)
	@bash tests/conformance/install.sh $(PEERS)
	@PYTHONPATH=. $(PEERS)/bin/python tests/conformance/run.py $(PEERS)

clean:
	rm -rf $(VENV) $(PEERS) build dist .pytest_cache .ruff_cache

# Of the 16,000 modules installed a quarter is ever imported: these are compiled, and kept, by their
# first import; pip compiles none.
export PYTHONDONTWRITEBYTECODE :=

# .ready is written last and holds the checkout's folder. Newer pins are installed into the .venv
# that is there; one that is half made, came along in a moved checkout, or has lost its
# interpreter, is made anew.
ifneq "$(filter clean,$(MAKECMDGOALS))$(shell cat $(READY) 2>/dev/null)" "$(CURDIR)"
.PHONY: $(READY)
FRESH := yes
endif

ifneq "$(filter clean,$(MAKECMDGOALS))" ""
$(READY): | clean   # with -j too
endif

$(READY): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { \
	    echo "nvfp4lab needs Python 3.11 or later; '$(PYTHON)' was not found. Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "nvfp4lab needs Python 3.11 or later; '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
	    echo "'$(PYTHON)' has no venv module. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@{ [ -z "$(FRESH)" ] && $(BIN)/python -c '' 2>/dev/null; } || "$(PYTHON)" -m venv --clear $(VENV)
	@echo "setup 1/3  $(VENV) with $$($(BIN)/python -V)"
	@echo "setup 2/3  torch (minutes; with CUDA on Linux it is several GB)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt torch
	@echo "setup 3/3  JupyterLab, the scientific stack, the test and lint tools"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e ".[test,lint]"
	@pwd > $@
