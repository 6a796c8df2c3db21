# `make help` lists what there is. Each target sets up .venv by itself; `make PYTHON=python3.12 run` picks the Python.
PYTHON ?= python3
JOBS ?= 2
PY := .venv/bin/python
.DEFAULT_GOAL := help
.PHONY: help run test book lab export lint train clean
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

run: .venv/.ready ## draw pictures from text, and from a picture and text, with the tiny model
	@$(PY) -m sdlearn demo

test: .venv/.ready ## check everything: exports, notebooks, style, spelling, then every notebook and every test
	@$(PY) tools/export.py --check
	@$(PY) tools/check_notebooks.py
	@$(PY) tools/journey.py --check
	@$(PY) -m ruff check --quiet .
	@$(PY) tools/spelling.py
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q --nbval --nbval-current-env -n $(JOBS) --dist loadfile

book: .venv/.ready ## build the book as a website in _build/html
	@.venv/bin/jupyter-book build . -W --keep-going --quiet
	@echo "The book: _build/html/index.html"

lab: .venv/.ready ## open your own copy of the chapters, my/, in JupyterLab; `make lab FRESH=05` takes one anew
	@$(PY) tools/lab.py --fresh $(FRESH)

export: .venv/.ready ## write src/sdlearn/*.py from the notebooks
	@$(PY) tools/export.py

lint: .venv/.ready ## check style and spelling; `make lint FIX=--fix` also mends the style
	@$(PY) -m ruff check $(FIX) .
	@$(PY) tools/spelling.py

train: .venv/.ready ## train the tiny model again, all three networks (hours; goes on where it stopped)
	@$(PY) -m sdlearn train all

clean: ## remove the website and caches; the next command checks .venv again (runs/, outputs/, checkpoints/ stay)
	@rm -rf .venv/.ready _build .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	@find book src tests tools -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

.venv/.ready: requirements.txt pyproject.toml
	@test -x .venv/bin/pip || { $(PYTHON) -c 'import sys; v = sys.version_info; \
	  sys.exit(f"Python 3.11 or newer is wanted, this is {v[0]}.{v[1]}; try: make PYTHON=python3.11 ..." if v < (3, 11) else 0)' && \
	  echo "Making .venv with $$($(PYTHON) --version) ..." && $(PYTHON) -m venv .venv; }
	@echo "Installing requirements.txt into .venv (the first time some minutes: PyTorch is large) ..."
	@$(PY) -m pip install -q --disable-pip-version-check -r requirements.txt
	@touch $@
	@echo "Ready."
