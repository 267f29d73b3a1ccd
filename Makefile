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

.PHONY: install native train test soak sanitise lint docs

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

# The native kernels' tests under the address and undefined-behaviour sanitizers, in every instruction set there is here.
SANITISED := build/sanitised
SANITISER_FLAGS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O1
# libstdc++ as well: the sanitizer has to find what throws exceptions before torch brings it.
SANITISERS = $(foreach name,libasan.so libubsan.so libstdc++.so,$(shell $(CXX) -print-file-name=$(name)))
NATIVE_TESTS := tests/native tests/numerics/test_operators.py tests/numerics/kernels/test_equal_reference.py \
  tests/numerics/kernels/test_hopper_native.py tests/ops/kernels tests/training/test_fused_adamw.py

sanitise: $(INSTALLED)
	rm -rf $(SANITISED) && mkdir -p $(SANITISED) && cp -r src setup.py pyproject.toml README.md $(SANITISED)
	cd $(SANITISED) && CXXFLAGS="$(SANITISER_FLAGS)" $(abspath $(BIN))/python setup.py -q build_ext --inplace
	LD_PRELOAD="$(SANITISERS)" ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 PYTHONPATH=$(SANITISED)/src \
	  $(BIN)/python -m pytest -q -p no:cacheprovider -k 'not ten_times_as_fast and not torch and not 2_31' $(NATIVE_TESTS)

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
