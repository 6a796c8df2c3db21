# `make help` lists what there is. Each target sets up .venv by itself; `make PYTHON=python3.12 run` picks the Python.
PYTHON ?= python3
JOBS ?= 2
PY := .venv/bin/python
TEST = OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder
.DEFAULT_GOAL := help
.PHONY: help run check test book lab export lint train clean
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

run: .venv/.ready ## draw pictures from text, and from a picture and text, with the tiny model
	@$(PY) -m sdlearn demo

check: lint ## check what you changed: all that lint says, then the fast tests
	@$(TEST) -m "not slow and not web" tests

test: lint ## check everything: all that lint says, then every notebook and every test
	@$(TEST) --nbval --nbval-current-env

book: .venv/.ready ## build the book as a website in _build/html
	@.venv/bin/jupyter-book build . -W --keep-going --quiet
	@echo "The book: _build/html/index.html"

lab: .venv/.ready ## open your own copy of the chapters, my/, in JupyterLab; `make lab FRESH=05` takes one anew
	@$(PY) tools/lab.py --fresh $(FRESH)

export: .venv/.ready ## write src/sdlearn from the notebooks, and what follows from book/chapters.toml
	@$(PY) tools/export.py
	@$(PY) tools/journey.py

lint: .venv/.ready ## style, types, exports, notebooks; `make lint FIX=--fix` mends the style
	@$(PY) -m ruff check --quiet --output-format concise $(FIX) .
	@$(PY) -m ruff format --quiet $(if $(FIX),,--check) .
	@$(PY) tools/export.py --check
	@$(PY) tools/journey.py --check
	@$(PY) tools/check_notebooks.py
	@$(PY) -m mypy
	@$(PY) tools/spelling.py || echo "(spelling: to be looked at)"
	@$(PY) tools/prose.py

train: .venv/.ready ## train the tiny model again, all three networks (hours; goes on where it stopped)
	@$(PY) -m sdlearn train all

clean: ## remove the website and caches; the next command checks .venv again (runs/, outputs/, checkpoints/ stay)
	@rm -rf .venv/.ready _build .pytest_cache .ruff_cache .mypy_cache .hypothesis src/*.egg-info
	@find book src tests tools -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

.venv/.ready: requirements.txt pyproject.toml
	@test -x .venv/bin/pip || { $(PYTHON) -c 'import sys; v = sys.version_info; \
	  sys.exit(f"Python 3.11 or newer is wanted, this is {v[0]}.{v[1]}; try: make PYTHON=python3.11 ..." if v < (3, 11) else 0)' && \
	  echo "Making .venv with $$($(PYTHON) --version) ..." && $(PYTHON) -m venv .venv; }
	@echo "Installing requirements.txt into .venv (the first time some minutes: PyTorch is large) ..."
	@$(PY) -m pip install -q --disable-pip-version-check -r requirements.txt
	@touch $@
	@echo "Ready."
