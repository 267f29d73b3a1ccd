# make train   trains recipes/tiny.toml in FP8 beside BF16 and writes runs/tiny/report.html
# make test    the whole test suite          make soak   the long runs
# make lint    ruff, mypy, import contracts  make docs   the pages that are written by the code

PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NATIVE := $(wildcard src/tessera/native/source/*)
# One thread a process: two OpenMP threads that spin on a busy machine can be ten times slower than one.
export OMP_WAIT_POLICY ?= passive

.PHONY: install native train test soak lint docs

install: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' \
	  || { echo "tessera needs Python 3.11 or 3.12; choose one with: make PYTHON=python3.12"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --editable '.[test]'
	touch $(INSTALLED)

train: $(INSTALLED)
	$(BIN)/tessera compare recipes/tiny.toml

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

soak: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check --quiet src tests || { echo 'run: .venv/bin/ruff format src tests'; exit 1; }
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(INSTALLED)
	$(BIN)/python -m tessera.recipe.document > docs/recipe.md

# After a change of the kernels' sources: as `make install` does, without asking pip.
native:
	$(BIN)/python -m pip install --quiet 'setuptools>=77'
	$(BIN)/python setup.py -q build_ext --inplace
