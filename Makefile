# Everything goes through .venv, which is made on first use from pyproject.toml (what we need)
# and constraints.txt (the versions we test). GNU make 3.81 or newer.

PYTHON ?= python3
WORKERS ?= 2
FAST ?= 0

BIN := .venv/bin
STAMP := .venv/.installed
ESPRESSO := .venv-espresso/.installed
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
STRIP := $(BIN)/nbstripout --keep-output --keep-count --keep-id

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo docs test espresso lab lint format notebooks lock clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "densitykit needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	       "Name another: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt "$$(grep '^torch==' constraints.txt)" -e ".[dft,lab,test,dask]"
	touch $@

# Quantum ESPRESSO wants an old numpy: it gets an environment of its own (300 MB).
$(ESPRESSO): densitykit/generate/espresso.py | $(STAMP)
	test -f $@ || $(BIN)/python -m densitykit.generate.espresso .venv-espresso
	touch $@

espresso: $(ESPRESSO)  ## install Quantum ESPRESSO for the plane-wave engine

demo: $(STAMP)  ## the quick tour: a trajectory, a model, a rollout and its report
	$(BIN)/python -m experiments.demo

# One thread a worker, else the workers fight for the cores. Notebooks go by file (loadscope):
# the cells of one lesson share a kernel. One call of pytest, so that its last line tells all.
test: export DENSITYKIT_FAST := 1
test: export PLOTLY_RENDERER := plotly_mimetype
test: export OMP_NUM_THREADS := 1
test: $(STAMP)  ## style, unit tests, and every notebook in fast mode; runs all, whatever fails
	@status=0; \
	$(MAKE) --no-print-directory lint || status=1; \
	$(MAKE) --no-print-directory espresso || \
	  echo "No Quantum ESPRESSO on this machine: the tests that need it are skipped."; \
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --continue-on-collection-errors \
	  --nbval-lax --nbval-current-env --nbval-cell-timeout=300 tests notebooks || status=1; \
	exit $$status

lab: $(STAMP)  ## open the lessons in JupyterLab: copies in lab/, which git does not see
	@mkdir -p lab
	@for lesson in $(NOTEBOOKS:notebooks/%=%); do test -e lab/$$lesson || cp notebooks/$$lesson lab/; done
	$(BIN)/jupyter lab lab/00_quickstart.ipynb

lint: $(STAMP)  ## check style, change nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(STAMP)  ## fix what can be fixed, and format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

notebooks: export DENSITYKIT_FAST := $(FAST)
notebooks: $(STAMP)  ## run notebooks in place at full size (FAST=1: fast); keep outputs, not widget state
ifneq ($(NOTEBOOKS),)
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace \
	  --ExecutePreprocessor.store_widget_state=False \
	  --ExecutePreprocessor.kernel_name=python3 --ExecutePreprocessor.timeout=1200 $(NOTEBOOKS)
	$(STRIP) $(NOTEBOOKS)
	$(BIN)/python scripts/shrink_pictures.py $(NOTEBOOKS)
endif

docs: $(STAMP)  ## build the site: lessons, reference, gallery, guides; into build/site
	$(BIN)/pip install -q -c constraints.txt -e ".[docs]"
	$(BIN)/python scripts/make_site.py build/site

lock:  ## resolve the newest versions afresh into constraints.txt (see its head)
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/pip install $$(grep -o '^#pin .*' constraints.txt | cut -c6-) \
	  -e ".[dft,lab,test,dask,docs]"
	{ grep '^#' constraints.txt; .venv-lock/bin/pip freeze --all --exclude pip --exclude-editable \
	  | sed 's/+.*//'; } > constraints.part
	mv constraints.part constraints.txt
	rm -rf .venv-lock

clean:  ## remove what make has made: environment, caches, demo; runs/ stays
	rm -rf .venv .venv-espresso .venv-lock .pytest_cache .ruff_cache build demo *.egg-info
	find . -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
